"""The contract of a transform, and `chain`.

A transform rewrites the task vectors of *one tensor at a time* and may first measure the whole model. Like an optax
gradient transform it is data: two kinds of pure functions in a NamedTuple.

* ``apply(x, leaf, stats)`` rewrites one tensor. ``x`` is ``[T, ...]`` (one vector a task, float32) until a transform
  reduces the task axis, ``[...]`` after. ``leaf`` says what the tensor is and holds what it started from.
* each `Measure` reduces what must be known of the whole model: ``of_leaf`` for one tensor, summed up (or otherwise
  combined, associatively) over all tensors, then ``finish``. ``stats`` holds the finished measures, in order; a later
  measure of the same transform sees the earlier ones, so an exact quantile can narrow down in two rounds.

Nothing here knows whether the tensors stand in memory, are sharded over a mesh or stream from files: see `run.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class ModelInfo(NamedTuple):
    """What is known of the whole model before any weight is read.

    Attributes:
      num_tasks: T.
      size: entries of one task vector that count (the ``n`` of a density's rank).
      unseen: those of them in tensors that take no part (counted frozen towers); they are zero.
      num_blocks: L, one more than the largest block index; 0 if the names show no blocks.
    """

    num_tasks: int
    size: int
    unseen: int
    num_blocks: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Leaf:
    """One per-layer tensor as a transform sees it.

    Attributes:
      theta0: pretrained weights ``[...]``.
      tau: the task vectors as they came in, ``[T, ...]`` float32, whatever earlier transforms made of them. (Outside
        the compiled functions of `run.py` it may be the T fine-tuned tensors, from which these are made.)
      extras: what the method asked for besides weights (Gram matrices, Fisher information), by name.
      depth: block index, -1 outside the blocks (int32 scalar).
      path_hash: hash of the per-layer path (uint32 scalar), the root of the tensor's random stream.
      row0: index of the first row, when a large tensor is handled by rows (int32 scalar).
      info: the whole model.
      holds: those of the chain's predicates that are true here; ask with `satisfies`.
    """

    theta0: Array
    tau: Array
    extras: dict[str, Array]
    depth: Array
    path_hash: Array
    row0: Array
    info: ModelInfo = dataclasses.field(metadata={"static": True})
    holds: frozenset = dataclasses.field(metadata={"static": True})

    def satisfies(self, predicate: Callable) -> bool:
        """Whether ``predicate(path, shape)`` holds; a transform must list it in its ``predicates``."""
        return predicate in self.holds

    def uniform(self, seed: int) -> Array:
        """Uniform numbers in [0, 1) of the shape of `tau`.

        The key is ``fold_in((seed, hash(path)), task)`` plus the row, so the numbers depend neither on the order of
        tensors nor on how they are sharded, stacked, streamed or cut into rows.
        """
        shape = self.tau.shape[1:]
        rows, row_shape = (shape[0], shape[1:]) if len(shape) > 1 else (1, shape)
        root = jax.random.wrap_key_data(jnp.stack([jnp.uint32(seed), self.path_hash]), impl="threefry2x32")

        def one_row(task: Array, row: Array) -> Array:
            words = jax.random.key_data(jax.random.fold_in(root, task))
            key = jax.random.wrap_key_data(words.at[1].add(row.astype(jnp.uint32)), impl="threefry2x32")
            return jax.random.uniform(key, row_shape)

        all_rows = jax.vmap(jax.vmap(one_row, (None, 0)), (0, None))
        drawn = all_rows(jnp.arange(self.tau.shape[0]), self.row0 + jnp.arange(rows))
        return drawn.reshape(self.tau.shape)


class Measure(NamedTuple):
    """One reduction over the whole model.

    Attributes:
      of_leaf: ``(x, leaf, earlier measures of this transform) -> tree`` for one tensor.
      finish: ``(combined tree, ModelInfo, earlier measures of this transform) -> statistic``.
      combine: associative and commutative, elementwise: `jnp.add`, `jnp.maximum`, ...
    """

    of_leaf: Callable[[Array, Leaf, tuple], Any]
    finish: Callable[[Any, ModelInfo, tuple], Any] = lambda total, info, stats: total
    combine: Callable = jnp.add


class Transform(NamedTuple):
    """A pure rewrite of task vectors; see the module's docstring.

    Attributes:
      name: for messages.
      apply: ``(x, leaf, stats) -> x``.
      measures: the rounds of measuring before `apply`.
      predicates: functions ``(path, shape) -> bool`` that `apply` asks about through `Leaf.satisfies`.
      by_rows: whether rows of a tensor may be handled apart (true of elementwise rules).
      constants: numbers that stand in front of the measures in ``stats``. They are arguments of the compiled programs,
        so that a search over a scale compiles once; for that the functions above must not depend on them.
    """

    name: str
    apply: Callable[[Array, Leaf, tuple], Array]
    measures: tuple[Measure, ...] = ()
    predicates: tuple[Callable, ...] = ()
    by_rows: bool = True
    constants: tuple[float, ...] = ()


class Chain(NamedTuple):
    """Transforms applied in order; each one measures what the ones before it made."""

    stages: tuple[Transform, ...]


def chain(*transforms: Transform | Chain) -> Chain:
    """Composes transforms, first to last; chains may be nested.

    >>> import taskvec as tv
    >>> ties = tv.chain(tv.trim(density=0.2), tv.elect_signs(), tv.disjoint_mean(), tv.scale(0.3))
    """
    stages: list[Transform] = []
    for transform in transforms:
        if isinstance(transform, Chain):
            stages.extend(transform.stages)
        elif isinstance(transform, Transform):
            stages.append(transform)
        else:
            raise TypeError(f"chain takes transforms, got {transform!r}; did you forget the brackets, as in trim(...)?")
    return Chain(tuple(stages))


def check_fraction(name: str, value: float, low: float = 0.0) -> float:
    """Returns `value` if it lies in ``(low, 1]``; raises `ValueError` otherwise."""
    if not low < value <= 1.0:
        raise ValueError(f"{name} must lie in ({low:g}, 1], got {value!r} (a percentage is written 0.2, not 20)")
    return value
