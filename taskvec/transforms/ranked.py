"""Random sparsity whose odds grow with the rank of an entry's magnitude."""

import functools

import jax.numpy as jnp
import numpy as np

from taskvec.host import aligned
from taskvec.transforms.base import Array, Leaf, Measure, Transform, check_choice, check_fraction
from taskvec.transforms.order import magnitude_ranks, sorted_magnitudes
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
        vector's tensor (MergeKit); ``none``. With the first, the earlier of equal magnitudes has the lower rank;
        otherwise, where no p_i is needed, equal ones are kept with the probability in the middle of theirs.
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
    # With axis -2 rows of a matrix are cut across; axis 0 likewise.
    by_rows = isinstance(axis, int) and axis in (-1, 1)

    def drop(x: Array, leaf: Leaf, stats: tuple) -> Array:
        ranks = _from_rows(magnitude_ranks(_rows(x, axis)), x, axis)
        n = _rows(x, axis).shape[-1]
        p = density + window * (ranks / (n - 1) - 0.5) if n > 1 else density
        return jnp.where(leaf.uniform(seed) < p, x, 0.0) / p

    if rescale == "inverse_probability":
        return Transform("drop_by_rank", drop, by_rows=by_rows)

    def kept(x: Array, leaf: Leaf, stats: tuple) -> Array:
        u, n = leaf.uniform(seed), stats[0].shape[-1]
        if window == 0 or n == 1:
            return jnp.where(u < density, x, 0.0)
        # u < p_i where t < rank_i - 1, counted from 0. With the order statistic nearest to t that is a comparison of
        # magnitudes; t itself decides for those equal to it.
        t = (u - (density - window / 2)) * ((n - 1) / window)
        parts = [_above(*each, axis) for each in zip(x, t, stats[0], strict=True)]
        return jnp.where(jnp.stack(parts), x, 0.0)

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        return kept(x, leaf, stats) * by_task(stats[1] if rescale == "l1" else 1.0, x)

    order = Measure(
        lambda x, leaf, stats: sorted_magnitudes(_rows(x, axis)),
        scope="block",
        host=lambda x, stats: _sorted_on_host(x, axis),
    )
    return Transform("drop_by_rank", apply, (order, l1_ratio(kept)) if rescale == "l1" else (order,), by_rows=by_rows)


def _above(x: Array, t: Array, ordered: Array, axis: int | str) -> Array:
    """Which entries of one task stand above t in the order of their row."""
    rows, t = _rows(x[None], axis)[0], _rows(t[None], axis)[0]
    nearest = jnp.clip(jnp.round(t), 0, rows.shape[-1] - 1)
    at = jnp.take_along_axis(ordered, nearest.astype(jnp.int32), -1, mode="clip")
    above = (jnp.abs(rows) > at) | ((jnp.abs(rows) == at) & (t < nearest))
    return _from_rows(above[None], x[None], axis)[0]


def _sorted_on_host(x: list, axis: int | str) -> np.ndarray:
    """`sorted_magnitudes` in NumPy, whose sort has vector instructions; T arrays to one with the task axis."""
    out = None
    for t, x_t in enumerate(x):
        rows = _rows(np.abs(np.asarray(x_t))[None], axis)[0]
        out = aligned(len(x) * rows.size, np.float32).reshape(len(x), *rows.shape) if out is None else out
        out[t] = rows
        out[t].sort(axis=-1)
    return out


def _row_axis(ndim: int, axis: int | str) -> int | None:
    """The axis of a tensor along which to rank, ``None`` for the whole of it."""
    if axis == "tensor" or not -ndim <= axis < ndim:
        return None
    return axis % ndim


def _rows(x: Array, axis: int | str) -> Array:
    """``[T, ...]`` with the rows to rank along the last axis."""
    at = _row_axis(x.ndim - 1, axis)
    xp = np if isinstance(x, np.ndarray) else jnp
    return x.reshape(x.shape[0], -1) if at is None else xp.moveaxis(x, at + 1, -1)


def _from_rows(rows: Array, like: Array, axis: int | str) -> Array:
    at = _row_axis(like.ndim - 1, axis)
    return (rows if at is None else jnp.moveaxis(rows, -1, at + 1)).reshape(like.shape)
