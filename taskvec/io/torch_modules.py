"""Reads tensors out of pickled PyTorch modules, without PyTorch and without running anything of theirs.

Some published checkpoints are not state dicts but whole modules (``torch.save(model)``: the image encoders and heads of
the task_vectors line, arXiv 2212.04089), or archives of TorchScript (OpenAI's CLIP). Such a pickle names classes and
functions of its authors. None is imported: each name becomes an empty class of our own, which takes any arguments,
does nothing, and keeps the state that the pickle has for it. What remains of a module are its parameters and buffers.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from taskvec.io.atomic import PathLike
from taskvec.io.torch_checkpoint import Odd, TorchTensor, TorchUnpickler, read

# Where training scripts keep the model among other things (optimisers, numbers of steps), in the order of search.
WRAPPERS = ("state_dict", "model_state_dict", "model")
_DEEPEST, _MOST = 60, 100_000  # modules in modules, and modules; a file may also nest one in itself


class Inert:
    """Takes the place of an object of an unknown class, or of what an unknown function returns."""

    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        del args, kwargs
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        del args, kwargs

    # The pickle's only ways to act on an object; a list or a dict of an unknown class loses its items.
    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        del key, value

    def append(self, item: Any) -> None:
        """Keeps nothing."""

    def extend(self, items: Any) -> None:
        """Keeps nothing."""


class ModuleUnpickler(TorchUnpickler):
    """Gives an `Inert` class for every name that is not on the list."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._allowed:
            return super().find_class(module, name)
        if module in ("builtins", "__builtin__") and name == "set":
            return lambda *args: set(*args)
        if (module, name) == ("torch._utils", "_rebuild_parameter_with_state"):
            return lambda data, requires_grad, hooks, state: data
        # A class of its own for every file and name: the pickle can do nothing to one that another would meet.
        return type("Inert", (Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        # Before PyTorch 1.6 a class travels with its source, which is not looked at.
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module":
            return pid[1]
        if isinstance(pid, tuple) and len(pid) > 1 and isinstance(pid[1], type) and issubclass(pid[1], Inert):
            raise ValueError("a storage of an unknown type")
        return super().persistent_load(pid)


def load_module(path: PathLike) -> dict[str, np.ndarray]:
    """The state dict of a pickled module, or of what else holds one.

    Args:
      path: a file of ``torch.save`` that holds a module, a state dict, or a dict with one of them under a name of
        `WRAPPERS` (then what is beside it is left out); or an archive of TorchScript.

    Returns:
      name -> array, as `taskvec.io.torch_checkpoint.load_state_dict`; the names that ``module.state_dict()`` has.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is cut short or damaged, or there are no tensors in it.
    """
    return read(path, ModuleUnpickler, _tensors)


def _tensors(table: Any) -> dict[str, TorchTensor]:
    if isinstance(table, dict):
        found = {name: x for name, x in table.items() if isinstance(name, str) and isinstance(x, TorchTensor)}
        inside = next((table[name] for name in WRAPPERS if isinstance(table.get(name), dict | Inert)), None)
        found = found if found or inside is None else _tensors(inside)
    else:
        found = dict(_walk(table, "", 0, itertools.count()))
    if not found:
        raise Odd(" holds no tensors that belong to a module or a state dict")
    return found


def _walk(module: Any, prefix: str, depth: int, count: Iterator[int]) -> Iterator[tuple[str, TorchTensor]]:
    """Names and tensors of a module, in the order of PyTorch: its parameters, its buffers, its children."""
    state = module.state if isinstance(module, Inert) else None
    if not isinstance(state, dict):
        return
    if depth > _DEEPEST or next(count) > _MOST:
        raise Odd(" holds modules nested in themselves, or too many")
    part = lambda name: state[name] if isinstance(state.get(name), dict) else {}
    if "_modules" in state:
        passing = state.get("_non_persistent_buffers_set") or ()
        tensors = {**part("_parameters"), **{k: x for k, x in part("_buffers").items() if k not in passing}}
        children = part("_modules")
    else:  # TorchScript keeps all of them as plain attributes
        tensors = children = state
    yield from ((f"{prefix}{name}", x) for name, x in tensors.items() if isinstance(x, TorchTensor))
    for name, child in children.items():
        yield from _walk(child, f"{prefix}{name}.", depth + 1, count)
