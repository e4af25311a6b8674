"""The contract of a transform, and `chain`.

A transform rewrites the task vectors of *one tensor at a time* and may first measure the whole model. Like an optax
gradient transform it is data: two kinds of pure functions in a NamedTuple.

* ``apply(x, leaf, stats)`` rewrites one tensor. ``x`` is ``[T, ...]`` (one vector per task, float32) until a transform
  reduces the task axis, ``[...]`` after. ``leaf`` says what the tensor is and holds what it started from.
* each `Measure` reduces what must be known beyond one entry: ``of_leaf`` for one tensor, summed up (or otherwise
  combined, associatively) over all tensors or over the rows of one, then ``finish``. ``stats`` holds the finished
  measures, in order; a later measure of the same transform sees the earlier ones, so an exact quantile can narrow down
  in two rounds.

The last transform of a chain may return a `stored.Stored` instead of an array: one vector per task, compressed.
Nothing here knows whether the tensors stand in memory, are sharded over a mesh or stream from files: see `run.py`.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Collection
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
        """Uniform numbers in [0, 1) of the shape of `tau`, multiples of 2^-24.

        The root of a task's stream is the key ``fold_in((seed, hash(path)), task)``; the number of an entry is a hash
        of root, row and position in the row. So the numbers depend neither on the order of tensors nor on how they are
        sharded, stacked, streamed or cut into rows, and cost a tenth of what `jax.random.uniform` does on a CPU.
        """
        shape = self.tau.shape[1:]
        rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
        root = jax.random.wrap_key_data(jnp.stack([jnp.uint32(seed), self.path_hash]), impl="threefry2x32")
        row = (self.row0 + jnp.arange(rows)).astype(jnp.uint32)
        column = jnp.arange(columns, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
        # Of all tasks and rows at once, so that XLA neither compiles it for every task nor repeats it for every entry.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(root, jnp.arange(self.tau.shape[0]))
        word0_Tx1, word1_Tx1 = jnp.split(jax.random.key_data(keys), 2, axis=1)
        first_TxR = mixed(row ^ word0_Tx1)
        second_TxR = mixed(first_TxR + word1_Tx1)

        def of_task(task: int) -> Array:
            bits = mixed(mixed(column + first_TxR[task, :, None]) ^ second_TxR[task, :, None])
            return ((bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)).reshape(shape)

        return jnp.stack([of_task(task) for task in range(self.tau.shape[0])])


def mixed(x: Array) -> Array:
    """A bijection of uint32 in which every bit of the input moves every bit of the output (MurmurHash3's finaliser)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


class Measure(NamedTuple):
    """One reduction over the whole model, or over each tensor.

    Attributes:
      of_leaf: ``(x, leaf, earlier measures of this transform) -> tree`` for one tensor, or for some rows of it.
      finish: ``(combined tree, ModelInfo, earlier measures of this transform) -> statistic``. With ``scope="tensor"``
        the info's ``size`` is that of the tensor and ``unseen`` is 0.
      combine: associative and commutative, elementwise: `operator.add`, `jnp.maximum`, ...
      scope: ``model`` combines all tensors; ``tensor`` gives every tensor its own statistic, and makes it possible to
        take a tensor that is too large by rows. ``block`` is for what rows need of themselves, such as their order: it
        is taken of every block anew and never combined; measures of a wider scope find ``None`` in its place when they
        are finished or counted by `host`.
      host: the same as `of_leaf` in NumPy on ``(T arrays, earlier)``, used where x lies in the memory of a CPU and XLA
        is slow at it (histograms, sorting).
      apart: of a tensor's measure, whether it is taken before `apply` also where one program could do both. For a
        `finish` that takes long to compile and little to run.
    """

    of_leaf: Callable[[Array, Leaf, tuple], Any]
    finish: Callable[[Any, ModelInfo, tuple], Any] = lambda total, info, stats: total
    combine: Callable = operator.add
    scope: str = "model"
    host: Callable[[Any, tuple], Any] | None = None
    apart: bool = False


class Transform(NamedTuple):
    """A pure rewrite of task vectors; see the module's docstring.

    Attributes:
      name: for messages.
      apply: ``(x, leaf, stats) -> x``.
      measures: the rounds of measuring before `apply`.
      predicates: functions ``(path, shape) -> bool`` that `apply` asks about through `Leaf.satisfies`.
      by_rows: whether, given the measures, rows of a tensor (axis 0 of two or more) may be handled apart: true of
        elementwise and row-wise rules, false where a whole matrix is needed.
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


def check_fraction(name: str, value: float) -> float:
    """Returns `value` if it lies in ``(0, 1]``; raises `ValueError` otherwise."""
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must lie in (0, 1], got {value!r} (a percentage is written 0.2, not 20)")
    return value


def check_choice(name: str, value: Any, allowed: Collection) -> Any:
    """Returns `value` if it is one of `allowed`; raises `ValueError` otherwise."""
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}; allowed: {', '.join(map(str, allowed))}")
    return value
