"""`merge`: one method, run on parameter trees in memory or streamed from tensor to tensor."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from taskvec import tree as trees, vectors
from taskvec.merging import registry
from taskvec.transforms import Chain, LeafPolicy, Transform
from taskvec.transforms.run import make_leaf, make_plan, run
from taskvec.tree import Tree

Which = str | registry.Method | Transform | Chain


def merge(
    method: Which,
    pretrained: Tree,
    finetuned: Sequence[Tree],
    *,
    policy: LeafPolicy = LeafPolicy(),
    extras: Mapping[str, Tree] | None = None,
    **settings: Any,
) -> Tree:
    """Merges fine-tuned models into one.

    >>> merged = tv.merge("ties", pretrained, [model_a, model_b], density=0.2)  # doctest: +SKIP

    Args:
      method: a registered name (`methods()` lists them), or a chain of transforms.
      pretrained: parameters theta_0, a nested dict of arrays.
      finetuned: T parameter trees of the same names and shapes.
      policy: which leaves take part.
      extras: further trees that the method's card asks for, by name.
      **settings: of the method; its published defaults otherwise.

    Returns:
      The merged parameters, in the names, shapes and dtypes of `pretrained`.

    Raises:
      ValueError: unknown method or setting, models that do not match, NaN or infinity in a model.
    """
    transform = _resolve(method, settings, extras or {})
    if isinstance(finetuned, Mapping):
        raise ValueError("finetuned must be a list of parameter trees; for one model write [params]")
    finetuned = list(finetuned)
    for i, params in enumerate(finetuned):
        vectors.check_same_model(pretrained, params, f"fine-tuned model {i}")
    vectors.check_finite(pretrained, "the pretrained model")
    for i, params in enumerate(finetuned):
        vectors.check_finite(params, f"fine-tuned model {i}")
    flat0, flats = trees.flatten(pretrained), [trees.flatten(params) for params in finetuned]
    flat_extras = {name: trees.flatten(extra) for name, extra in (extras or {}).items()}
    plan = make_plan(transform, flat0, len(finetuned), policy)

    def leaves():
        for path, tensor in plan.tensors.items():
            extra = {name: flat[path] for name, flat in flat_extras.items() if path in flat}
            yield path, make_leaf(tensor, plan.info, flat0[path], tuple(flat[path] for flat in flats), extra)

    return trees.unflatten({**flat0, **dict(run(transform, plan, leaves, add=True))})


def _resolve(method: Which, settings: Mapping, extras: Mapping) -> Chain:
    transform = registry.resolve(method, **settings)
    card = getattr(registry.get(method) if isinstance(method, str) else method, "card", None)
    missing = [name for name in (card.extras if card else ()) if name not in extras]
    if missing:
        raise ValueError(f"{method} needs extras {missing}: trees computed from data, see its card")
    return transform


class Reader(Protocol):
    """Where a model's tensors come from; `taskvec.io.safetensors.SafetensorsReader` is one."""

    specs: Mapping[str, Any]

    def read(self, name: str) -> np.ndarray:
        """One tensor."""


def merge_streamed(
    method: Which,
    pretrained: Reader,
    finetuned: Sequence[Reader],
    write: Callable[[str, np.ndarray], None],
    *,
    policy: LeafPolicy = LeafPolicy(),
    on_tensor: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> None:
    """Merges models tensor by tensor: the same definition as `merge`, with memory bounded by the largest tensor.

    Every measuring round of the chain and the final application read each model once.

    Args:
      method: as for `merge`.
      pretrained, finetuned: readers; names, shapes and dtypes are compared before any tensor is read.
      write: receives every tensor of the merged model once, in the pretrained model's dtype.
      policy: which tensors take part.
      on_tensor: called with (tensors done, tensors in all passes together).
      **settings: of the method.
    """
    transform = _resolve(method, settings, {})
    specs = dict(pretrained.specs)
    for i, reader in enumerate(finetuned):
        vectors.check_same_model(specs, dict(reader.specs), f"fine-tuned model {i}")
    plan = make_plan(transform, specs, len(finetuned), policy)
    passes = 1 + sum(len(stage.measures) for stage in transform.stages)
    done, total = 0, passes * len(plan.tensors)

    def leaves():
        nonlocal done
        for path, tensor in plan.tensors.items():
            theta0 = pretrained.read(path)
            yield path, make_leaf(tensor, plan.info, theta0, tuple(reader.read(path) for reader in finetuned), {})
            done += 1
            if on_tensor:
                on_tensor(done, total)

    for path, weights in run(transform, plan, leaves, add=True):
        write(path, np.asarray(weights))
    for path in sorted(specs.keys() - plan.tensors.keys()):
        write(path, pretrained.read(path))
