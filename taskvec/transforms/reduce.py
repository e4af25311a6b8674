"""Reductions of the task axis: ``[T, ...] -> [...]``."""

import functools

import jax
import jax.numpy as jnp

from taskvec.transforms.base import Array, Leaf, Transform
from taskvec.transforms.stored import Dense

UNROLL = 32  # most tasks summed by an unrolled loop; beyond, program size outweighs what the fusion saves


def weighted_sum(weights: Array, x: Array) -> Array:
    """``sum_t weights[t] x[t]``, unrolled up to 32 tasks and scanned beyond.

    On XLA:CPU a broadcast-multiply-reduce over the leading axis is 200 times slower than this.
    """
    if x.shape[0] <= UNROLL:
        return sum(weights[t] * x[t] for t in range(x.shape[0]))
    start = jnp.zeros(x.shape[1:], x.dtype)
    return jax.lax.scan(lambda acc, wx: (acc + wx[0] * wx[1], None), start, (jnp.asarray(weights), x))[0]


def weigh(weights: tuple[float, ...]) -> Transform:
    """``w_t x_t``: one weight per task; negative ones forget."""
    return Transform("weigh", _weighed, constants=tuple(weights))


def _weighed(x: Array, leaf: Leaf, stats: tuple) -> Array:
    check_weights(stats, x)
    return jnp.stack([stats[t] * x[t] for t in range(x.shape[0])])


def sum_tasks(weights: tuple[float, ...] | None = None) -> Transform:
    """``sum_t w_t x_t``, w = 1 if not given (task arithmetic, arXiv 2212.04089)."""
    return (
        Transform("sum_tasks", _summed)
        if weights is None
        else Transform("sum_tasks", _combined, constants=tuple(weights))
    )


def _summed(x: Array, leaf: Leaf, stats: tuple) -> Array:
    return weighted_sum([1.0] * x.shape[0], x)


def _combined(x: Array, leaf: Leaf, stats: tuple) -> Array:
    check_weights(stats, x)
    return weighted_sum(stats if x.shape[0] <= UNROLL else jnp.stack(stats), x)


def check_weights(weights: tuple, x: Array) -> None:
    """Raises `ValueError` unless there is one weight per task."""
    if len(weights) != x.shape[0]:
        raise ValueError(f"{len(weights)} weights for {x.shape[0]} task vectors: give one weight per task")


@functools.cache
def keep_tasks() -> Transform:
    """Ends a chain without a reduction: one model per task (a task-conditioned result, nothing compressed)."""
    return Transform("keep_tasks", lambda x, leaf, stats: Dense(x))


@functools.cache
def mean_tasks() -> Transform:
    """``sum_t x_t / T``: the weight average of the fine-tuned models."""
    return Transform("mean_tasks", lambda x, leaf, stats: mean(x))


def mean(x: Array) -> Array:
    """``sum_t x_t / T``."""
    return weighted_sum([1.0] * x.shape[0], x) / x.shape[0]


@functools.cache
def disjoint_mean() -> Transform:
    """Mean over the non-zero entries, 0 where there is none (TIES-Merging, arXiv 2306.01708, section 3 step 3)."""

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        ones = [1.0] * x.shape[0]
        return weighted_sum(ones, x) / jnp.maximum(weighted_sum(ones, (x != 0).astype(x.dtype)), 1.0)

    return Transform("disjoint_mean", apply)


@functools.cache
def disjoint_max() -> Transform:
    """The entry of largest magnitude, the earliest task's in a tie (``max`` aggregation of the TIES code)."""

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        return jnp.take_along_axis(x, jnp.abs(x).argmax(0)[None], 0)[0]

    return Transform("disjoint_max", apply)
