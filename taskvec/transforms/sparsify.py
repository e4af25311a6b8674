"""Transforms that keep a part of every task vector's entries: by magnitude (trim, crumbs) or at random (drop)."""

import functools

import jax
import jax.numpy as jnp

from taskvec.transforms.base import Array, Leaf, Transform, check_fraction
from taskvec.transforms.order import kth_magnitude, kth_magnitude_of_model

SCOPES = ("model", "tensor")


@functools.cache
def trim(density: float, scope: str = "model", rule: str = "paper") -> Transform:
    """Keeps the `density` largest magnitudes of every task vector and zeroes the rest.

    Keeps ``|x| >= v``, v being the k-th largest magnitude of the task vector (of the whole model, or of each tensor).
    Entries equal to v are all kept. Source: TIES-Merging, arXiv 2306.01708, section 3 step 1.

    Args:
      density: fraction kept, in (0, 1].
      scope: ``model`` (one threshold a task) or ``tensor`` (one a task and tensor, as MergeKit does).
      rule: ``paper`` keeps k = int(density n); ``released`` takes the order statistic of the released code, number
        n - int(density n) in ascending order, which keeps one entry more.
    """
    check_fraction("density", density)
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}; allowed: {', '.join(SCOPES)}")
    if rule not in ("paper", "released"):
        raise ValueError(f"unknown rule {rule!r}; allowed: paper, released")

    def rank(n: int) -> int:
        kept = int(density * n) + (rule == "released")
        return max(1, n - max(kept, 1) + 1)

    def keep(x_n: Array, threshold: Array) -> Array:
        return jnp.where(jnp.abs(x_n) >= threshold, x_n, 0.0)

    if density == 1.0:
        return Transform("trim", lambda x, leaf, stats: x)
    if scope == "model":
        return Transform("trim", lambda x, leaf, stats: jax.vmap(keep)(x, stats[1]), kth_magnitude_of_model(rank))

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        return jax.vmap(lambda x_n: keep(x_n, kth_magnitude(x_n, rank(x_n.size))))(x)

    return Transform("trim", apply, by_rows=False)


@functools.cache
def drop(density: float, rescale: str = "inverse_density", seed: int = 0) -> Transform:
    """Keeps every entry with probability `density`, independently, and rescales what is left.

    ``x <- m x / density``, m ~ Bernoulli(density); unbiased. Source: DARE, arXiv 2311.03099, equation 3, where the
    drop rate is p = 1 - density.

    Args:
      density: fraction kept, in (0, 1].
      rescale: ``inverse_density`` (the paper), ``none``, or ``l1``, which restores the L1 norm of each task vector's
        tensor (MergeKit).
      seed: of the masks.
    """
    check_fraction("density", density)
    if rescale not in ("inverse_density", "none", "l1"):
        raise ValueError(f"unknown rescale {rescale!r}; allowed: inverse_density, none, l1")

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        kept = jnp.where(leaf.uniform(seed) < density, x, 0.0)
        if rescale == "inverse_density":
            return kept / density
        if rescale == "l1":
            axes = tuple(range(1, x.ndim))
            before, after = (jnp.abs(a).sum(axes, keepdims=True) for a in (x, kept))
            return jnp.where(after > 0, kept * (before / jnp.where(after > 0, after, 1.0)), kept)
        return kept

    return Transform("drop", apply, by_rows=rescale != "l1")


@functools.cache
def crumbs(density: float, gamma: float, axis: str = "tensor") -> Transform:
    """Drops the `gamma` largest magnitudes, then keeps the `density` largest of the rest.

    Source: Model Breadcrumbs, arXiv 2312.06795, section 3: per layer, outliers and small perturbations both go. In its
    notation a fraction beta = 1 - gamma - density is dropped at the bottom. Entries equal to a threshold are kept.

    Args:
      density: fraction kept, in (0, 1 - gamma].
      gamma: fraction of largest magnitudes dropped, in [0, 1).
      axis: ``tensor`` ranks a whole tensor (the paper's layer); ``row`` ranks each row along the last axis, as the
        released code does.
    """
    check_fraction("density", density)
    if not 0 <= gamma < 1 or density + gamma > 1:
        raise ValueError(f"gamma must lie in [0, 1) with density + gamma <= 1, got density {density}, gamma {gamma}")
    if axis not in ("tensor", "row"):
        raise ValueError(f"unknown axis {axis!r}; allowed: tensor, row")

    def bounds(n: int) -> tuple[int, int]:
        top, kept = int(gamma * n), max(int(density * n), 1)
        return max(n - top - kept + 1, 1), n - top  # ascending ranks of the smallest and the largest entry kept

    def of_tensor(x_n: Array) -> tuple[Array, Array]:
        return tuple(jax.vmap(kth_magnitude, (None, 0))(x_n, jnp.array(bounds(x_n.size), jnp.uint32)))

    def of_row(x_n: Array) -> tuple[Array, Array]:
        ordered = jnp.sort(jnp.abs(x_n))
        return tuple(ordered[rank - 1] for rank in bounds(x_n.size))

    def one(x_n: Array) -> Array:
        low, high = of_tensor(x_n) if axis == "tensor" else of_row(x_n)
        return jnp.where((jnp.abs(x_n) >= low) & (jnp.abs(x_n) <= high), x_n, 0.0)

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        if x.ndim == 1:  # scalars are left alone, as in the released code
            return x
        flat = x.reshape(x.shape[0], -1) if axis == "tensor" else x.reshape(-1, x.shape[-1])
        return jax.vmap(one)(flat).reshape(x.shape)

    return Transform("crumbs", apply, by_rows=axis == "row")
