"""Exact order statistics of magnitudes without sorting.

The bit pattern of a non-negative float32, read as an integer, grows with its value. Two histograms of 16 bits each
therefore give the exact r-th smallest magnitude: the upper half of the bits in the first round, the lower half of
those in the right bin in the second. The state is 256 KB a task, and counts add up over tensors, devices and files.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from taskvec.transforms.base import Array, Leaf, Measure, ModelInfo

_HIGH, _LOW = 1 << 15, 1 << 16


def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.uint32)


def _histogram(bins: Array, length: int) -> Array:
    """Counts ``bins`` (int32, flat); values of `length` and more are dropped."""
    return jnp.zeros(length, jnp.uint32).at[bins].add(1, mode="drop")


def upper_counts(x: Array) -> Array:
    """Counts of the upper 16 bits of ``|x|``: ``[32768]`` uint32."""
    return _histogram((_bits(x) >> 16).astype(jnp.int32).reshape(-1), _HIGH)


def lower_counts(x: Array, upper: Array) -> Array:
    """Counts of the lower 16 bits of those ``|x|`` whose upper bits are `upper`: ``[65536]`` uint32."""
    bits = _bits(x).reshape(-1)
    return _histogram(jnp.where(bits >> 16 == upper, bits & 0xFFFF, _LOW).astype(jnp.int32), _LOW)


def _locate(counts: Array, rank: Array) -> tuple[Array, Array]:
    """The bin that holds the rank-th entry (1-based, ascending) and the rank inside that bin."""
    below = jnp.cumsum(counts)
    at = jnp.searchsorted(below, rank).astype(jnp.uint32)
    return at, rank - jnp.where(at > 0, below[at - 1], 0).astype(jnp.uint32)


def _value(upper: Array, lower: Array) -> Array:
    return jax.lax.bitcast_convert_type(upper << 16 | lower, jnp.float32)


def kth_magnitude(x: Array, rank: int | Array) -> Array:
    """The `rank`-th smallest magnitude of one array (1-based), a float32 scalar."""
    upper, rest = _locate(upper_counts(x), jnp.asarray(rank, jnp.uint32))
    lower, _ = _locate(lower_counts(x, upper), rest)
    return _value(upper, lower)


def kth_magnitude_of_model(rank: Callable[[int], int]) -> tuple[Measure, Measure]:
    """Two rounds that find, for every task, the exact r-th smallest magnitude over the whole model.

    Args:
      rank: ``n -> r`` on Python integers (1 <= r <= n), n being `ModelInfo.size`. Entries that the policy counts but
        that never stream by (frozen tensors) are zeros and stand first in the order.

    Returns:
      Measures whose last statistic is the magnitude, ``[T]`` float32.
    """

    def upper_of_leaf(x: Array, leaf: Leaf, stats: tuple) -> Array:
        return jax.vmap(upper_counts)(x)

    def find_upper(counts: Array, info: ModelInfo, stats: tuple) -> tuple[Array, Array]:
        if info.size >= 1 << 32:
            raise ValueError(f"exact global thresholds count up to 2^32 entries a task, this model has {info.size}")
        counts = counts.at[:, 0].add(jnp.uint32(info.unseen))
        return jax.vmap(_locate, (0, None))(counts, jnp.uint32(rank(info.size)))

    def lower_of_leaf(x: Array, leaf: Leaf, stats: tuple) -> Array:
        return jax.vmap(lower_counts)(x, stats[0][0])

    def find_lower(counts: Array, info: ModelInfo, stats: tuple) -> Array:
        upper, rest = stats[0]
        counts = counts.at[:, 0].add(jnp.where(upper == 0, jnp.uint32(info.unseen), jnp.uint32(0)))
        lower, _ = jax.vmap(_locate)(counts, rest)
        return jax.vmap(_value)(upper, lower)

    return Measure(upper_of_leaf, find_upper), Measure(lower_of_leaf, find_lower)
