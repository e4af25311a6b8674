"""Sign election: entries that pull against the elected direction are removed."""

import functools

import jax.numpy as jnp

from taskvec.transforms.base import Array, Leaf, Measure, Transform


@functools.cache
def elect_signs(zero: str = "zero") -> Transform:
    """Zeroes the entries whose sign differs from the elected one, ``sign(sum_t x_t)``.

    The task axis stays: reduce with `disjoint_mean` (TIES) or `sum_tasks`, or keep the vectors apart (AdaMerging++).
    Source: TIES-Merging, arXiv 2306.01708, section 3 step 2.

    Args:
      zero: what is elected where the sum is exactly zero. ``zero`` (the paper's formula: nothing agrees, all entries
        go); ``majority`` (released code: the sign of the sum of all elected signs; costs one more pass over the
        model); ``positive`` (MergeKit: +1).
    """
    if zero not in ("zero", "majority", "positive"):
        raise ValueError(f"unknown rule {zero!r} for zero sums; allowed: zero, majority, positive")

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        elected = jnp.sign(x.sum(0))
        if zero == "positive":
            elected = jnp.where(elected == 0, 1.0, elected)
        if zero == "majority":
            # A majority of 0 keeps the negative entries, as the released code's else-branch does.
            majority = jnp.where(stats[0] > 0, 1.0, -1.0)
            elected = jnp.where(elected == 0, majority, elected)
        return jnp.where(jnp.sign(x) == elected, x, 0.0)

    def of_leaf(x: Array, leaf: Leaf, stats: tuple) -> Array:
        return jnp.sign(x.sum(0)).astype(jnp.int32).sum()

    return Transform("elect_signs", apply, (Measure(of_leaf),) if zero == "majority" else ())
