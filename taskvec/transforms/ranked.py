"""Random sparsity whose odds grow with the rank of an entry's magnitude."""

import functools

import jax.numpy as jnp

from taskvec.transforms.base import Array, Leaf, Transform, check_choice, check_fraction
from taskvec.transforms.order import magnitude_ranks
from taskvec.transforms.sparsify import by_task, l1_ratio


@functools.cache
def drop_by_rank(
    density: float, window: float, rescale: str = "inverse_probability", axis: int | str = -1, seed: int = 0
) -> Transform:
    """Keeps entry i with probability ``p_i = density - window / 2 + window (rank_i - 1) / (n - 1)``.

    Ranks run from 1 (smallest magnitude) to n within a row, so that on average a fraction `density` is kept, and large
    entries more often than small ones. Source: DELLA, arXiv 2406.11617 (MagPrune).

    Args:
      density: mean probability of being kept, in (0, 1]; with 1 nothing is dropped.
      window: difference between the largest and the smallest probability, which must lie in (0, 1].
      rescale: ``inverse_probability`` divides by p_i (the paper; unbiased); ``l1`` restores the L1 norm of each task
        vector's tensor (MergeKit); ``none``.
      axis: a row's axis. -1 takes the last one as stored (the inputs of a neuron where matrices are [out, in]); -2
        the inputs where they are [in, out]; 1 the second one (MergeKit, for convolutions); ``tensor`` ranks whole
        tensors. Where a tensor does not have the axis, it is one row.
      seed: of the masks.
    """
    check_fraction("density", density)
    if density < 1 and not (window >= 0 and density - window / 2 > 0 and density + window / 2 <= 1):
        raise ValueError(f"density +- window / 2 must lie in (0, 1], got density {density}, window {window}")
    check_choice("rescale", rescale, ("inverse_probability", "l1", "none"))
    if not (isinstance(axis, int) or axis == "tensor"):
        raise ValueError(f"axis must be a number or 'tensor', got {axis!r}")
    if density == 1:
        return Transform("drop_by_rank", lambda x, leaf, stats: x)

    def keep_probability(x: Array) -> Array:
        at = _row_axis(x.ndim - 1, axis)
        rows = x.reshape(x.shape[0], -1) if at is None else jnp.moveaxis(x, at + 1, -1)
        n = rows.shape[-1]
        place = magnitude_ranks(rows) / (n - 1) if n > 1 else jnp.full(rows.shape, 0.5)
        if at is not None:
            place = jnp.moveaxis(place, -1, at + 1)
        return (density + window * (place - 0.5)).reshape(x.shape)

    def drop(x: Array, leaf: Leaf, stats: tuple) -> Array:
        p = keep_probability(x)
        kept = jnp.where(leaf.uniform(seed) < p, x, 0.0)
        return kept / p if rescale == "inverse_probability" else kept

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        return drop(x, leaf, stats) * by_task(stats[0] if rescale == "l1" else 1.0, x)

    # With axis -2 rows of a matrix are cut across; axis 0 likewise.
    by_rows = isinstance(axis, int) and axis in (-1, 1)
    return Transform("drop_by_rank", apply, (l1_ratio(drop),) if rescale == "l1" else (), by_rows=by_rows)


def _row_axis(ndim: int, axis: int | str) -> int | None:
    """The axis of a tensor along which to rank, ``None`` for the whole of it."""
    if axis == "tensor" or not -ndim <= axis < ndim:
        return None
    return axis % ndim
