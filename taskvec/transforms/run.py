"""Runs a chain of transforms over the leaves of a model, wherever they come from.

There is one loop, `run`. It asks for passes over the leaves: arrays in memory (also under an enclosing `jax.jit`,
sharded or not) or tensors read from files one by one. `measured` and `applied` treat one leaf, compiled once for all
leaves of the same shape; stacked layers go by `jax.vmap`.
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from taskvec import tree as trees
from taskvec.transforms.base import Array, Chain, Leaf, ModelInfo, Transform, chain

Tree = Any


class LeafPolicy(NamedTuple):
    """Which leaves take part in a merge.

    Attributes:
      include: regular expression searched in the per-layer path, or ``path -> bool``; ``None`` takes every
        floating-point leaf. Leaves left out, and integer leaves, are copied from the pretrained model.
      count_excluded: whether the entries of floating-point leaves left out count in a density's denominator. The CLIP
        literature counts 25.6 M frozen text-side entries of a B/32 model.
    """

    include: str | Callable[[str], bool] | None = None
    count_excluded: bool = False

    def takes(self, path: str) -> bool:
        """Whether the tensor at a per-layer path takes part."""
        if self.include is None:
            return True
        return bool(self.include(path) if callable(self.include) else re.search(self.include, path))


class Tensor(NamedTuple):
    """The static description of a leaf: one tensor, or L of them stacked.

    Attributes:
      stacked: whether the data below have a leading layer axis.
      depth, path_hash: as in `Leaf`; ``[L]`` for a stacked leaf.
      holds: predicates of the chain that are true.
    """

    stacked: bool
    depth: np.ndarray
    path_hash: np.ndarray
    holds: frozenset


class Plan(NamedTuple):
    """What a chain will do with a model: the leaves that take part, and the whole model's sizes."""

    tensors: dict[str, Tensor]
    info: ModelInfo


def make_plan(stages: Chain, specs: Mapping[str, Any], num_tasks: int, policy: LeafPolicy = LeafPolicy()) -> Plan:
    """Describes every leaf that takes part, from shapes and dtypes alone.

    Args:
      stages: the chain.
      specs: ``{path: array or ShapeDtypeStruct}`` of the pretrained model.
      num_tasks: T.
      policy: which leaves take part.

    Raises:
      ValueError: no task, no leaf takes part, or the policy takes some layers of a stacked leaf only.
    """
    if num_tasks < 1:
        raise ValueError("a merge needs at least one fine-tuned model")
    predicates = [p for stage in stages.stages for p in stage.predicates]
    tensors, size, unseen, blocks = {}, 0, 0, 0
    _check_specs(specs)
    for path, spec in specs.items():
        if not trees.is_float(spec):
            continue
        stacked = trees.is_stacked(path)
        names = [trees.layer_path(path, i) for i in range(spec.shape[0])] if stacked else [path]
        shape = tuple(spec.shape[1:]) if stacked else tuple(spec.shape)
        taken = {policy.takes(name) for name in names}
        if len(taken) > 1:
            raise ValueError(f"include takes some layers of the stacked leaf {path!r} and not others; unstack it first")
        blocks = max([blocks, *((trees.depth(name) or 0) + 1 for name in names if trees.depth(name) is not None)])
        count = int(np.prod(spec.shape))
        if not taken.pop():
            unseen += count
            continue
        size += count
        depth = np.array([-1 if trees.depth(n) is None else trees.depth(n) for n in names], np.int32)
        path_hash = np.array([zlib.crc32(n.encode()) for n in names], np.uint32)
        holds = frozenset(p for p in predicates if all(p(name, shape) for name in names))
        tensors[path] = Tensor(stacked, *((depth, path_hash) if stacked else (depth[0], path_hash[0])), holds)
    if not tensors:
        some = ", ".join(list(specs)[:5])
        raise ValueError(f"no floating-point leaf matches include={policy.include!r}; the model has {some}, ...")
    unseen = unseen if policy.count_excluded else 0
    return Plan(tensors, ModelInfo(num_tasks, size + unseen, unseen, blocks))


def _check_specs(specs: Mapping[str, Any]) -> None:
    """Raises `ValueError` for what cannot be merged: float64 without x64, stacks of different numbers of layers."""
    wide = [path for path, spec in specs.items() if spec.dtype == np.float64]
    if wide and not jax.config.jax_enable_x64:
        raise ValueError(f"{wide[0]} is float64, which jax would cut to float32: cast it, or set jax_enable_x64")
    stacks: dict[str, dict[str, tuple]] = {}
    for path, spec in specs.items():
        if trees.is_stacked(path):
            stacks.setdefault(path.split(f"{trees.STACK}/")[0], {})[path] = tuple(spec.shape)
    for shapes in stacks.values():
        if len({shape[:1] for shape in shapes.values()}) > 1 or () in shapes.values():
            raise ValueError(
                f"leaves under a dict named {trees.STACK!r} are taken for stacked layers, but differ in length: "
                f"{shapes}. Number its children, or give the dict another name"
            )


def make_leaf(tensor: Tensor, info: ModelInfo, theta0: Array, tau: Any, extras: dict, row0: Any = 0) -> Leaf:
    """Puts arrays and description together.

    Args:
      tensor, info: from the plan.
      theta0: pretrained weights.
      tau: the task vectors of the leaf, or a tuple of its T fine-tuned versions.
      extras: as in `Leaf`.
      row0: first row, if this is a part of the tensor.
    """
    return Leaf(
        theta0, tau, extras, tensor.depth, tensor.path_hash, np.full_like(tensor.depth, row0), info, tensor.holds
    )


def _with_vectors(leaf: Leaf) -> Leaf:
    """Makes the task vectors of one per-layer tensor, in float32, from its fine-tuned versions."""
    if not isinstance(leaf.tau, tuple):
        return leaf
    base = leaf.theta0.astype(jnp.float32)
    return dataclasses.replace(leaf, tau=jnp.stack([theta.astype(jnp.float32) - base for theta in leaf.tau]))


def _through(stages: tuple[Transform, ...], stats: tuple, leaf: Leaf) -> Array:
    x = leaf.tau
    for stage, stat in zip(stages, stats, strict=True):
        x = stage.apply(x, leaf, stat)
    return x


def _over_layers(fn: Callable, stacked: bool) -> Callable:
    return jax.vmap(fn) if stacked else fn


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def measured(stages: tuple[Transform, ...], round_: int, stats: tuple, earlier: tuple, leaf: Leaf, stacked: bool):
    """One leaf's part of measure number `round_` of the last of `stages`; layers of a stack are combined."""
    measure = stages[-1].measures[round_]

    def one(leaf: Leaf):
        leaf = _with_vectors(leaf)
        return measure.of_leaf(_through(stages[:-1], stats, leaf), leaf, earlier)

    parts = _over_layers(one, stacked)(leaf)
    if not stacked:
        return parts
    fold = lambda a: functools.reduce(measure.combine, [a[i] for i in range(a.shape[0])])
    return jax.tree.map(fold, parts)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def applied(stages: tuple[Transform, ...], stats: tuple, leaf: Leaf, stacked: bool, add: bool) -> Array:
    """One leaf through the whole chain; with `add` the merged weights, in the dtype of the pretrained ones."""

    def one(leaf: Leaf):
        leaf = _with_vectors(leaf)
        x = _through(stages, stats, leaf)
        if add and x.shape != leaf.theta0.shape:
            raise ValueError(
                f"the chain ends with one vector a task (shape {x.shape}, weights {leaf.theta0.shape}): add a "
                "reduction such as sum_tasks(), mean_tasks() or disjoint_mean(), or get the vectors by "
                "transform_task_vectors"
            )
        return (leaf.theta0.astype(jnp.float32) + x).astype(leaf.theta0.dtype) if add else x

    return _over_layers(one, stacked)(leaf)


def run(
    transform: Transform | Chain,
    plan: Plan,
    leaves: Callable[[], Iterator[tuple[str, Leaf]]],
    add: bool = False,
) -> Iterator[tuple[str, Array]]:
    """Yields ``(path, x)`` for every leaf: all measuring passes first, then one pass that applies.

    Args:
      transform: a transform or chain.
      plan: from `make_plan`.
      leaves: a function that starts one pass over the model, yielding ``(path, Leaf)``. It is called once for every
        round of measuring and once for the result.
      add: whether to yield merged weights ``theta_0 + x`` instead of vectors.
    """
    given = [stage.constants for stage in chain(transform).stages]
    stages = tuple(stage._replace(constants=()) for stage in chain(transform).stages)  # what programs are compiled for
    stats: tuple = ()
    for at, stage in enumerate(stages):
        found = given[at]
        for round_, measure in enumerate(stage.measures):
            total = None
            for path, leaf in leaves():
                part = measured(stages[: at + 1], round_, stats, found, leaf, plan.tensors[path].stacked)
                total = part if total is None else jax.tree.map(measure.combine, total, part)
            found += (measure.finish(total, plan.info, found),)
        stats += (found,)
    for path, leaf in leaves():
        yield path, applied(stages, stats, leaf, plan.tensors[path].stacked, add)


def transform_task_vectors(
    transform: Transform | Chain,
    theta0: Tree,
    tau: Tree,
    *,
    policy: LeafPolicy = LeafPolicy(),
    extras: Mapping[str, Tree] | None = None,
) -> Tree:
    """Runs a chain on task vectors in memory; pure, may be jitted and sharded.

    Args:
      transform: a transform or chain.
      theta0: pretrained parameters.
      tau: `vectors.task_vectors`: leaves ``[T, ...]``, stacked leaves ``[L, T, ...]``.
      policy: which leaves take part; the others are zero in the result.
      extras: further trees of the shape of `theta0`'s structure that the method asks for, by name.

    Returns:
      The transformed vectors: with the task axis if the chain keeps it, without if it reduces it.
    """
    flat0, flat_tau = trees.flatten(theta0), trees.flatten(tau)
    flat_extras = {name: trees.flatten(extra) for name, extra in (extras or {}).items()}
    first = next(path for path in flat0 if trees.is_float(flat0[path]))
    num_tasks = flat_tau[first].shape[1 if trees.is_stacked(first) else 0]
    plan = make_plan(chain(transform), flat0, num_tasks, policy)

    def leaves():
        for path, tensor in plan.tensors.items():
            extra = {name: flat[path] for name, flat in flat_extras.items() if path in flat}
            yield path, make_leaf(tensor, plan.info, flat0[path], flat_tau[path], extra)

    out = dict(run(transform, plan, leaves))
    reduced = all(x.shape == flat0[path].shape for path, x in out.items())
    blank = flat0 if reduced else flat_tau
    return trees.unflatten({path: out.get(path, jnp.zeros_like(blank[path], jnp.float32)) for path in flat0})
