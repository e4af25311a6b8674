"""Transforms that keep a part of every task vector's entries: by magnitude (trim, crumbs) or at random (drop)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from taskvec.transforms.base import Array, Leaf, Measure, Transform, check_choice, check_fraction
from taskvec.transforms.order import kth_magnitude_of, kth_magnitudes_of, sorted_magnitudes

SCOPES = ("model", "tensor")
PerTask = float | tuple[float, ...]


@functools.cache
def trim(density: PerTask, scope: str = "model", rule: str = "paper", rescale: str = "none") -> Transform:
    """Keeps the `density` largest magnitudes of every task vector and zeroes the rest.

    Keeps ``|x| >= v``, v being the k-th largest magnitude of the task vector (of the whole model, or of each tensor).
    Entries equal to v are all kept. Source: TIES-Merging, arXiv 2306.01708, section 3 step 1.

    Args:
      density: fraction kept, in (0, 1]; a tuple gives each task its own.
      scope: ``model`` (one threshold per task) or ``tensor`` (one per task and tensor, as MergeKit does).
      rule: ``paper`` keeps k = int(density n); ``released`` takes the order statistic of the released code, number
        n - int(density n) in ascending order, which keeps one entry more.
      rescale: ``none``, or ``l1``, which restores the L1 norm of each task vector's tensor (MergeKit).
    """
    densities = _checked(density)
    check_choice("scope", scope, SCOPES)
    check_choice("rule", rule, ("paper", "released"))
    check_choice("rescale", rescale, ("none", "l1"))

    def rank(n: int, density: float) -> int:
        return max(1, n - max(int(density * n) + (rule == "released"), 1) + 1)

    def kept(x: Array, leaf: Leaf, stats: tuple) -> Array:
        return jnp.where(jnp.abs(x) >= by_task(stats[1], x), x, 0.0)

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        return kept(x, leaf, stats) * by_task(stats[2] if rescale == "l1" else 1.0, x)

    if set(densities) == {1.0}:
        return Transform("trim", lambda x, leaf, stats: x)
    ranks = tuple(functools.partial(rank, density=each) for each in densities)
    measures = kth_magnitude_of(ranks if len(ranks) > 1 else ranks[0], scope)
    return Transform("trim", apply, measures + ((l1_ratio(kept),) if rescale == "l1" else ()))


@functools.cache
def drop(density: PerTask, rescale: str = "inverse_density", seed: int = 0) -> Transform:
    """Keeps every entry with probability `density`, independently, and rescales what is left.

    ``x <- m x / density``, m ~ Bernoulli(density); unbiased. Source: DARE, arXiv 2311.03099, equation 3, where the
    drop rate is p = 1 - density.

    Args:
      density: fraction kept, in (0, 1]; a tuple gives each task its own.
      rescale: ``inverse_density`` (the paper), ``none``, or ``l1``, which restores the L1 norm of each task vector's
        tensor (MergeKit).
      seed: of the masks.
    """
    _checked(density)
    check_choice("rescale", rescale, ("inverse_density", "none", "l1"))

    def kept(x: Array, leaf: Leaf, stats: tuple) -> Array:
        return jnp.where(leaf.uniform(seed) < by_task(density, x), x, 0.0)

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        left = kept(x, leaf, stats)
        if rescale == "inverse_density":
            return left / by_task(density, x)
        return left * by_task(stats[0], x) if rescale == "l1" else left

    return Transform("drop", apply, (l1_ratio(kept),) if rescale == "l1" else ())


@functools.cache
def crumbs(density: PerTask, gamma: PerTask, axis: str = "tensor") -> Transform:
    """Drops the `gamma` largest magnitudes, then keeps the `density` largest of the rest.

    Source: Model Breadcrumbs, arXiv 2312.06795, section 3: per layer, outliers and small perturbations both go. In its
    notation a fraction beta = 1 - gamma - density is dropped at the bottom. Entries equal to a threshold are kept.

    Args:
      density: fraction kept, in (0, 1 - gamma]; a tuple gives each task its own.
      gamma: fraction of largest magnitudes dropped, in [0, 1); likewise.
      axis: ``tensor`` ranks a whole tensor (the paper's layer); ``row`` ranks each row along the last axis, as the
        released code does.
    """
    tasks = max(len(each) if isinstance(each, tuple) else 1 for each in (density, gamma))
    pairs = list(zip(*(each if isinstance(each, tuple) else (each,) * tasks for each in (density, gamma)), strict=True))
    for kept, top in pairs:
        check_fraction("density", kept)
        if not 0 <= top < 1 or kept + top > 1 + 1e-9:
            raise ValueError(f"gamma must lie in [0, 1) with density + gamma <= 1, got density {kept}, gamma {top}")
    check_choice("axis", axis, ("tensor", "row"))

    def bounds(n: int, density: float, gamma: float) -> tuple[int, int]:
        top, kept = int(gamma * n), max(int(density * n), 1)
        return max(n - top - kept + 1, 1), max(n - top, 1)  # ascending ranks of the smallest and the largest kept

    def rank(which: int) -> tuple[Callable[[int], int], ...]:
        ranks = tuple(lambda n, pair=pair: bounds(n, *pair)[which] for pair in pairs)
        return ranks if tasks > 1 else ranks[0]

    def of_row(x_n: Array, pair: tuple) -> Array:
        ordered = sorted_magnitudes(x_n)
        low, high = (ordered[..., at - 1, None] for at in bounds(x_n.shape[-1], *pair))
        return jnp.where((jnp.abs(x_n) >= low) & (jnp.abs(x_n) <= high), x_n, 0.0)

    def by_row(x: Array, leaf: Leaf, stats: tuple) -> Array:
        if x.ndim == 1:  # scalars are left alone, as in the released code
            return x
        return jnp.stack([of_row(x_n, pairs[t % len(pairs)]) for t, x_n in enumerate(x)])

    def by_tensor(x: Array, leaf: Leaf, stats: tuple) -> Array:
        if x.ndim == 1:
            return x
        low, high = by_task(stats[1][:, 0], x), by_task(stats[1][:, 1], x)
        return jnp.where((jnp.abs(x) >= low) & (jnp.abs(x) <= high), x, 0.0)

    if axis == "row":
        return Transform("crumbs", by_row)
    return Transform("crumbs", by_tensor, kth_magnitudes_of([rank(0), rank(1)], "tensor"))


def by_task(values: PerTask | Array, x: Array) -> Array:
    """Numbers, one per task or one for all, in a shape that multiplies ``x [T, ...]``."""
    values = jnp.asarray(values, jnp.float32).reshape(-1)
    if values.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"{values.shape[0]} values for {x.shape[0]} task vectors: give one, or one per task")
    return values.reshape(-1, *[1] * (x.ndim - 1))


def l1_norms(x: Array) -> Array:
    """``[T, ...] -> [T]``."""
    return jnp.abs(x).sum(tuple(range(1, x.ndim)))


def l1_ratio(kept: Callable[[Array, Leaf, tuple], Array]) -> Measure:
    """Measures ``||x_t||_1 / ||kept(x)_t||_1`` of each tensor, ``[T]``; 1 where nothing is kept."""

    def norms(x: Array, leaf: Leaf, stats: tuple) -> Array:
        return jnp.stack([l1_norms(x), l1_norms(kept(x, leaf, stats))])

    @jax.jit
    def ratio(total: Array) -> Array:
        return jnp.where(total[1] > 0, total[0] / jnp.where(total[1] > 0, total[1], 1.0), 1.0)

    return Measure(norms, lambda total, info, stats: ratio(total), scope="tensor")


def _checked(density: PerTask) -> tuple[float, ...]:
    densities = density if isinstance(density, tuple) else (density,)
    for each in densities:
        check_fraction("density", each)
    return densities
