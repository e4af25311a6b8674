"""`merge`: one method, run on parameter trees in memory or streamed from tensor to tensor."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from taskvec import tree as trees, vectors
from taskvec.merging import registry
from taskvec.merging.results import PerTask
from taskvec.transforms import Chain, LeafPolicy, Transform
from taskvec.transforms.base import Leaf
from taskvec.transforms.plan import make_leaf, make_plan
from taskvec.transforms.run import run, where
from taskvec.transforms.stored import Stored
from taskvec.tree import Tree

Which = str | registry.Method | Transform | Chain


def merge(
    method: Which,
    pretrained: Tree | None,
    finetuned: Sequence[Tree],
    *,
    policy: LeafPolicy = LeafPolicy(),
    extras: Mapping[str, Tree] | None = None,
    **settings: Any,
) -> Tree | PerTask:
    """Merges fine-tuned models into one.

    >>> merged = tv.merge("ties", pretrained, [model_a, model_b], density=0.2)  # doctest: +SKIP

    Args:
      method: a registered name (`methods()` lists them), or a chain of transforms.
      pretrained: parameters theta_0, a nested dict of arrays; ``None`` for methods that can do without (averages,
        means on the sphere), which then work on the weights themselves.
      finetuned: T parameter trees of the same names and shapes.
      policy: which leaves take part. The others are copied from the pretrained model (or the first fine-tuned one).
      extras: further trees that the method's card asks for, by name: leaves ``[T, ...]``.
      **settings: of the method; its published defaults otherwise.

    Returns:
      The merged parameters, in the names, shapes and dtypes of `pretrained`; a `PerTask` if the method is
      task-conditioned.

    Raises:
      ValueError: unknown method or setting, models that do not match, NaN or infinity in a model.
    """
    if isinstance(finetuned, Mapping):
        raise ValueError("finetuned must be a list of parameter trees; for one model write [params]")
    finetuned = list(finetuned)
    transform = resolve(method, settings, len(finetuned), pretrained is not None, extras or {})
    first = finetuned[0] if pretrained is None else pretrained
    for i, params in enumerate(finetuned):
        vectors.check_same_model(first, params, f"fine-tuned model {i}")
    flat0, flats = trees.flatten(first), [trees.flatten(params) for params in finetuned]
    flat_extras = {name: trees.flatten(extra) for name, extra in (extras or {}).items()}
    plan = make_plan(transform, flat0, len(finetuned), policy)

    def leaf_of(path: str, rows: slice | None) -> Leaf:
        extra = {name: flat[path] for name, flat in flat_extras.items() if path in flat}
        theta0 = jnp.zeros_like(flat0[path]) if pretrained is None else flat0[path]
        return make_leaf(plan.tensors[path], plan.info, theta0, tuple(flat[path] for flat in flats), extra)

    def not_finite(path: str) -> None:
        named = [("the pretrained model", flat0), *((f"fine-tuned model {i}", flat) for i, flat in enumerate(flats))]
        for name, flat in named:
            vectors.check_finite({path: flat[path]}, name)

    out: dict[str, Any] = {}
    place = where(x for flat in (flat0, *flats) for x in flat.values())
    run(transform, plan, leaf_of, lambda path, rows, x: out.update({path: x}), where=place, not_finite=not_finite)
    if any(isinstance(x, Stored) for x in out.values()):
        start = {p: jnp.zeros_like(x) if p in out else x for p, x in flat0.items()} if pretrained is None else flat0
        return PerTask(trees.unflatten(start), out, len(finetuned))
    return trees.unflatten({**flat0, **out})


def resolve(method: Which, settings: Mapping, num_tasks: int, has_base: bool, extras: Mapping) -> Chain:
    """The chain of a method, after checking what its card asks of the inputs."""
    if not num_tasks:
        raise ValueError("a merge needs at least one fine-tuned model")
    transform = registry.resolve(method, **settings)
    if isinstance(method, str):
        method = registry.get(method)
    if isinstance(method, registry.Method):
        method.card.check(method.name, num_tasks, has_base, extras)
    return transform
