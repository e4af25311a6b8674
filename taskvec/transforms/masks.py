"""Masks that compare a task's own vector with the merged one."""

import functools

import jax.numpy as jnp

from taskvec.transforms.base import Array, Leaf, Transform


def tall_masks(x: Array, tau: Array, threshold: float) -> Array:
    """``m_t = |tau_t| > threshold |x - tau_t|``: where task t's own vector dominates the merged x. ``[T, ...]`` bool.

    Source: TALL-masks, arXiv 2405.07813, equation 4.
    """
    return jnp.abs(tau) > threshold * jnp.abs(x[None] - tau)


@functools.cache
def consensus(threshold: float, at_least: int = 2) -> Transform:
    """Keeps the entries of a merged vector that at least `at_least` tasks need, by their TALL-masks.

    With 2, weights that no task uses (catastrophic) and that one task uses (selfish) go back to their pretrained
    values. Source: Consensus merging, arXiv 2405.07813, section 5.

    Args:
      threshold: lambda_t of the masks, the same for all tasks (the paper searches {.2, ..., .6} for each task).
      at_least: k, number of tasks.
    """
    if threshold <= 0 or at_least < 1:
        raise ValueError(f"threshold must be positive and at_least >= 1, got {threshold}, {at_least}")

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        if x.shape != leaf.theta0.shape:
            raise ValueError("consensus masks a merged vector: put sum_tasks() or another reduction before it")
        needed_by = tall_masks(x, leaf.tau, threshold).sum(0)
        return jnp.where(needed_by >= at_least, x, 0.0)

    return Transform("consensus", apply)
