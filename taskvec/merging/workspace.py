"""What a chain needs for one tensor of files, known from names, shapes and dtypes alone.

The programs that a merge will run are traced without numbers: transforms say then which of a method's extras (Gram
matrices, Fisher information, LoRA factors) do not fit a tensor, and XLA says how much memory a whole matrix takes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from taskvec.transforms import Chain
from taskvec.transforms.base import Leaf
from taskvec.transforms.plan import Plan, Tensor, make_leaf
from taskvec.transforms.programs import programs

Extras = Mapping[str, Sequence[Any]]  # name -> a reader for each task


def check_extras(extras: Extras, specs: Mapping[str, Any], plan: Plan) -> None:
    """Raises `ValueError` unless every extra is there for all tasks alike, under names of the model's tensors."""
    names = {name: set(readers[0].specs) if readers else set() for name, readers in extras.items()}
    for name, readers in extras.items():
        if len(readers) != plan.info.num_tasks:
            raise ValueError(f"extra {name!r} is needed once for each of the {plan.info.num_tasks} models")
        for number, reader in enumerate(readers):
            odd = sorted(names[name] ^ set(reader.specs))
            odd += [path for path in readers[0].specs if not odd and _kind(reader, path) != _kind(readers[0], path)]
            if odd:
                raise ValueError(
                    f"extra {name!r} differs between models 0 and {number} in names, shapes or dtypes: {odd[0]} is "
                    f"{_kind(readers[0], odd[0])} and {_kind(reader, odd[0])}"
                )
        unknown = sorted(names[name] - specs.keys())
        if unknown:
            raise ValueError(
                f"extra {name!r} holds {unknown[0]}, which is no tensor of the model: an extra has the name of the "
                f"tensor it belongs to, such as {next(iter(plan.tensors))}"
            )
        if not names[name] & plan.tensors.keys():
            raise ValueError(f"extra {name!r} holds nothing for the tensors that take part")
    for name in names:
        alone = sorted(names[name] - set.intersection(*names.values()))
        if alone:
            raise ValueError(f"{alone[0]} has {name!r} but not all of the extras {sorted(names)}")


def _kind(reader: Any, path: str) -> str:
    spec = reader.specs.get(path)
    return "absent" if spec is None else f"{spec.dtype}{list(spec.shape)}"


def extra_specs(extras: Extras, path: str, tensor: Tensor) -> dict[str, jax.ShapeDtypeStruct]:
    """What a tensor's extras are stacked to: ``[T, ...]``, or ``[L, T, ...]`` if it is stacked; only those it has."""
    found = {}
    for name, readers in extras.items():
        if path in readers[0].specs:
            shape, dtype = readers[0].specs[path].shape, readers[0].specs[path].dtype
            layers = int(tensor.stacked)
            found[name] = jax.ShapeDtypeStruct((*shape[:layers], len(readers), *shape[layers:]), dtype)
    return found


class Workspace:
    """The programs of a merge, for any of its tensors.

    Args:
      transform, plan: the chain and the tensors.
      specs: shapes and dtypes of each model, the pretrained one first; `None` where a merge has none.
      extras: readers.
      dtype, task: as `merge_streamed` takes them.
    """

    def __init__(
        self, transform: Chain, plan: Plan, specs: Sequence[Mapping[str, Any] | None], extras: Extras, dtype, task
    ):
        self.transform, self.plan, self.specs, self.extras = transform, plan, specs, extras
        self.dtype, self.task = None if dtype is None else np.dtype(dtype), task

    def leaf(self, path: str) -> Leaf:
        """A tensor as a merge reads it, without its numbers."""
        spec = lambda specs: None if specs is None else jax.ShapeDtypeStruct(specs[path].shape, specs[path].dtype)
        theta0, *experts = map(spec, self.specs)
        tensor = self.plan.tensors[path]
        extras = extra_specs(self.extras, path, tensor)
        start = experts[0] if theta0 is None else theta0
        return make_leaf(tensor, self.plan.info, start, tuple(experts), extras)

    def kinds(self) -> list[str]:
        """One tensor of each kind that has programs of its own, the largest first."""
        found: dict[Any, str] = {}
        for path, tensor in self.plan.tensors.items():
            leaf = self.leaf(path)
            arrays, tree = jax.tree.flatten((leaf.theta0, leaf.tau, leaf.extras))
            found.setdefault((tree, *((x.shape, x.dtype) for x in arrays), tensor.stacked, tensor.holds), path)
        return sorted(found.values(), key=lambda path: -self._arguments(path))

    def _arguments(self, path: str) -> int:
        leaf = self.leaf(path)
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((leaf.tau, leaf.extras)))

    def check(self) -> None:
        """Raises `ValueError` naming a tensor whose extras do not fit it."""
        for path in self.kinds():
            if self.leaf(path).extras:
                try:
                    for program, arguments in self.programs(path):
                        program.eval_shape(*arguments)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{path}: {error}") from error

    def bytes(self, path: str) -> int:
        """The most that XLA plans for a program of one tensor: arguments, result and everything between."""
        most = 0
        for program, arguments in self.programs(path):
            memory = program.lower(*arguments).compile().memory_analysis()
            parts = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
            most = max(most, sum(parts))
        return most

    def programs(self, path: str) -> Iterator[tuple[Callable, tuple]]:
        """`transforms.programs.programs` of a tensor."""
        host, stacked = jax.default_backend() == "cpu", self.plan.tensors[path].stacked
        return programs(self.transform, self.plan.info, self.leaf(path), stacked, host, self.dtype, self.task)
