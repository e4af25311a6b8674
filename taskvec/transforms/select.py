"""Transforms that keep, or bound, a part of the entries: by size, rank or importance; and one rule for each task."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from taskvec.transforms.base import Array, Chain, Leaf, Measure, ModelInfo, Transform, chain, check_choice
from taskvec.transforms.order import kth_magnitudes_of
from taskvec.transforms.sparsify import PerTask, by_task, l1_ratio


def clip_entries(limit: float, floor: float = 0.0) -> Transform:
    """``x min(1, limit / max(|x|, floor))``: no entry changes by more than `limit`.

    Args:
      limit: largest change.
      floor: where entries are smaller than `floor` and `limit` is too, they shrink by ``limit / floor`` (MergeKit's
        nearswap divides by 1e-6 at least).
    """
    if limit < 0 or floor < 0:
        raise ValueError(f"limit and floor must not be negative, got {limit}, {floor}")
    return Transform("clip_entries", _clipped, constants=(limit, floor))


def _clipped(x: Array, leaf: Leaf, stats: tuple) -> Array:
    limit, floor = stats
    size = jnp.maximum(jnp.abs(x), floor)
    return x * jnp.where(size > limit, limit / jnp.where(size > 0, size, 1.0), 1.0)


@functools.cache
def keep_important(spread: float = 1.5) -> Chain:
    """Keeps the entries whose importance is an outlier of their tensor.

    The importance of an entry is ``|x| KL(softmax(theta_0 + x) || softmax(theta_0))``, the divergence taken along the
    last axis; what reaches ``median + spread (upper quartile - lower quartile)`` is kept. Quartiles are entries of the
    tensor, number ``floor(q (n - 1))`` from below, exact whatever its size.
    """
    first, second = kth_magnitudes_of([lambda n, q=q: int(q * (n - 1)) + 1 for q in (0.25, 0.5, 0.75)], "tensor")

    def of_importance(measure: Measure) -> Measure:
        return measure._replace(
            of_leaf=lambda x, leaf, stats: measure.of_leaf(_halves(x)[1], leaf, stats),
            host=lambda x, stats: measure.host(_halves(x)[1], stats),
        )

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        vectors, importance = _halves(x)
        lower, median, upper = (stats[1][:, k] for k in range(3))
        return jnp.where(importance >= by_task(median + spread * (upper - lower), importance), vectors, 0.0)

    # Importance stands beside the vectors on the task axis, so that its order is counted as any other's.
    beside = Transform("with_importance", lambda x, leaf, stats: jnp.concatenate([x, _importance(x, leaf)]))
    return chain(beside, Transform("keep_important", apply, (of_importance(first), of_importance(second))))


def _halves(x: Array) -> tuple[Array, Array]:
    return x[: len(x) // 2], x[len(x) // 2 :]


def _importance(x: Array, leaf: Leaf) -> Array:
    """``|x_t| KL(softmax(theta_0 + x_t) || softmax(theta_0))``.

    With d = x - E[x] under the new distribution the divergence is ``log E[exp(-d)]``, and ``log1p(E[exp(-d) - 1 + d])``
    as E[d] = 0: terms that are not negative and do not cancel, however small x is.
    """
    if x.ndim == 1:  # a single entry has one distribution only
        return jnp.zeros_like(x)
    share = jax.nn.softmax(leaf.theta0.astype(jnp.float32) + x, axis=-1)
    d = x - (share * x).sum(-1, keepdims=True)
    excess = jnp.where(jnp.abs(d) < 0.02, d * d * (0.5 - d * (1 / 6 - d / 24)), jnp.expm1(-d) + d)
    return jnp.abs(x) * jnp.log1p((share * excess).sum(-1, keepdims=True))


@functools.cache
def keep_band(density: PerTask, gamma: PerTask, rescale: str = "none") -> Transform:
    """Keeps ``int(density n)`` entries of each tensor, after the ``int(gamma n)`` largest magnitudes are left out.

    Where both do not fit in n, fewer of the largest go: `density` holds. As MergeKit's breadcrumbs; `crumbs` has the
    paper's bounds. Entries equal to a bound are kept.

    Args:
      density, gamma: fractions in [0, 1]; a tuple gives each task its own.
      rescale: ``none``, or ``l1``, which restores the L1 norm of each task vector's tensor.
    """
    check_choice("rescale", rescale, ("none", "l1"))
    tasks = max(len(each) if isinstance(each, tuple) else 1 for each in (density, gamma))
    pairs = list(zip(*(each if isinstance(each, tuple) else (each,) * tasks for each in (density, gamma)), strict=True))
    for pair in pairs:
        if not all(0 <= fraction <= 1 for fraction in pair):
            raise ValueError(f"density and gamma must lie in [0, 1], got {pair}")

    def bounds(n: int, density: float, gamma: float) -> tuple[int, int]:
        """Ascending ranks of the smallest and the largest kept, from 1; the second is smaller if nothing is kept."""
        kept = int(density * n)
        below = max(0, n - kept - int(gamma * n))
        return below + 1, below + kept

    def rank(which: int) -> tuple[Callable[[int], int], ...]:
        return tuple(lambda n, pair=pair: min(max(bounds(n, *pair)[which], 1), n) for pair in pairs)

    ranks = [rank(which) if tasks > 1 else rank(which)[0] for which in (0, 1)]
    first, second = kth_magnitudes_of(ranks, "tensor")

    def found(total: Array, info: ModelInfo, stats: tuple) -> Array:
        low, high = (jnp.asarray(second.finish(total, info, stats))[:, k] for k in (0, 1))
        empty = jnp.asarray([bounds(info.size, *pair)[1] < bounds(info.size, *pair)[0] for pair in pairs])
        return jnp.stack([low, jnp.where(empty, -1.0, high)], 1)

    def kept(x: Array, leaf: Leaf, stats: tuple) -> Array:
        low, high = by_task(stats[1][:, 0], x), by_task(stats[1][:, 1], x)
        return jnp.where((jnp.abs(x) >= low) & (jnp.abs(x) <= high), x, 0.0)

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        return kept(x, leaf, stats) * by_task(stats[2] if rescale == "l1" else 1.0, x)

    measures = (first, second._replace(finish=found))
    return Transform("keep_band", apply, measures + ((l1_ratio(kept),) if rescale == "l1" else ()))


def each_task(*transforms: Transform) -> Transform:
    """Task t's vector goes through ``transforms[t]``; all of them must keep the task axis.

    For settings that a transform takes once for all tasks. Every different transform sees all vectors, so that random
    streams and reductions over tasks are what they are without this.
    """
    if any(each.constants for each in transforms):
        raise ValueError("each_task takes transforms without constants: their numbers must be the same for all tasks")
    return _each_task(transforms)


@functools.cache
def _each_task(transforms: tuple[Transform, ...]) -> Transform:
    different = tuple(dict.fromkeys(transforms))
    if len(different) == 1:
        return different[0]
    starts = [sum(len(each.measures) for each in different[:i]) for i in range(len(different))]
    part = lambda stats, i: stats[starts[i] : starts[i] + len(different[i].measures)]

    def shifted(measure: Measure, i: int) -> Measure:
        return measure._replace(
            of_leaf=lambda x, leaf, stats: measure.of_leaf(x, leaf, stats[starts[i] :]),
            finish=lambda total, info, stats: measure.finish(total, info, stats[starts[i] :]),
            host=measure.host and (lambda x, stats: measure.host(x, stats[starts[i] :])),
        )

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        if len(transforms) != x.shape[0]:
            raise ValueError(f"{len(transforms)} transforms for {x.shape[0]} task vectors: give one per task")
        done = {each: each.apply(x, leaf, part(stats, i)) for i, each in enumerate(different)}
        return jnp.stack([done[each][t] for t, each in enumerate(transforms)])

    measures = tuple(shifted(m, i) for i, each in enumerate(different) for m in each.measures)
    predicates = tuple(p for each in different for p in each.predicates)
    return Transform("each_task", apply, measures, predicates, all(each.by_rows for each in different))
