"""Exact order statistics of magnitudes without sorting.

The bit pattern of a non-negative float32, read as an integer, grows with its value. Two histograms of 16 bits each
therefore give the exact r-th smallest magnitude: the upper half of the bits in the first round, the lower half of
those in the right bin in the second. The state is 256 KB a task, and counts add up over tensors, rows, devices and
files. On a CPU the counting is done by NumPy, twice as fast as XLA's scatter and in 64 bits.
"""

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from taskvec.transforms.base import Array, Leaf, Measure, ModelInfo

_HIGH, _LOW = 1 << 15, 1 << 16
_BLOCK = 1 << 18  # entries that NumPy handles at once, so that they stay in the cache


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


class Difference:
    """``theta - theta0`` of two arrays in the memory of a CPU, made block by block as NumPy goes through it."""

    def __init__(self, theta: np.ndarray, theta0: np.ndarray):
        self.theta, self.theta0 = theta, theta0

    def __getitem__(self, layer: int) -> "Difference":
        return Difference(self.theta[layer], self.theta0[layer])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(np.subtract(self.theta, self.theta0, dtype=np.float32))


def _blocks(x: np.ndarray | Difference) -> Iterator[np.ndarray]:
    """The bits of the entries of x, a cache full at a time."""
    parts = (x.theta, x.theta0) if isinstance(x, Difference) else (x,)
    flats = [np.ascontiguousarray(part).reshape(-1) for part in parts]
    for at in range(0, flats[0].size, _BLOCK):
        block = [flat[at : at + _BLOCK].astype(np.float32, copy=False) for flat in flats]
        yield (block[0] - block[1] if len(block) == 2 else block[0]).view(np.uint32)


def _upper_counts_of_array(x: np.ndarray) -> np.ndarray:
    counts = np.zeros(_HIGH, np.int64)
    for bits in _blocks(x):
        counts += np.bincount(bits >> 16 & 0x7FFF, minlength=_HIGH)
    return counts


def _lower_counts_of_array(x: np.ndarray, uppers: np.ndarray) -> np.ndarray:
    counts = np.zeros((len(uppers), _LOW), np.int64)
    for bits in _blocks(x):
        magnitude = bits & 0x7FFFFFFF
        for row, upper in zip(counts, uppers, strict=True):
            low = magnitude - np.uint32(int(upper) << 16)  # wraps around where it is smaller
            np.add.at(row, low[low < _LOW], 1)
    return counts


def _locate(counts: Array, rank: Array) -> tuple[Array, Array]:
    """The bin that holds the rank-th entry (1-based, ascending) and the rank inside that bin."""
    xp = np if isinstance(counts, np.ndarray) else jnp
    below = xp.cumsum(counts)
    at = xp.searchsorted(below, rank)
    return at, rank - xp.where(at > 0, below[at - 1], 0).astype(rank.dtype)


def _value(upper: Array, lower: Array) -> Array:
    if isinstance(lower, np.integer):
        return np.uint32(int(upper) << 16 | int(lower)).view(np.float32)
    return jax.lax.bitcast_convert_type(jnp.uint32(upper) << 16 | jnp.uint32(lower), jnp.float32)


def kth_magnitude(x: Array, rank: int | Array) -> Array:
    """The `rank`-th smallest magnitude of one array (1-based), a float32 scalar."""
    upper, rest = _locate(upper_counts(x), jnp.asarray(rank, jnp.uint32))
    lower, _ = _locate(lower_counts(x, upper), rest)
    return _value(upper, lower)


def sorted_magnitudes(x: Array) -> Array:
    """``|x|`` in ascending order along the last axis, float32."""
    # As integers: XLA on CPUs sorts them six times faster than floats.
    return jax.lax.bitcast_convert_type(jnp.sort(_bits(x), axis=-1), jnp.float32)


def magnitude_ranks(x: Array) -> Array:
    """Where every ``|x|`` stands in ascending order along the last axis: int32 from 0, the earlier of equals first."""
    n = x.shape[-1]
    # Magnitude and place in one integer: a sort of one operand, ten times faster on CPUs than two argsorts.
    with jax.enable_x64(True):
        place = jax.lax.broadcasted_iota(jnp.uint64, x.shape, x.ndim - 1)
        ordered = jax.lax.sort(_bits(x).astype(jnp.uint64) << jnp.uint64(32) | place, dimension=-1)
        order = (ordered & jnp.uint64(0xFFFFFFFF)).astype(jnp.int32).reshape(-1, n)
    rows = jnp.arange(order.shape[0])[:, None]
    ranks = jnp.zeros_like(order).at[rows, order].set(jnp.arange(n, dtype=jnp.int32)[None], unique_indices=True)
    return ranks.reshape(x.shape)


Rank = Callable[[int], int] | Sequence[Callable[[int], int]]


def kth_magnitude_of(rank: Rank, scope: str) -> tuple[Measure, Measure]:
    """Two rounds that find, for every task, the exact r-th smallest magnitude over the model or over each tensor.

    Args:
      rank: ``n -> r`` on Python integers (1 <= r <= n), n being `ModelInfo.size`; or one such function a task. Entries
        that the policy counts but that never stream by (frozen tensors) are zeros and stand first in the order.
      scope: ``model`` or ``tensor``.

    Returns:
      Measures whose last statistic is the magnitude, ``[T]`` float32.
    """
    first, second = kth_magnitudes_of([rank], scope)
    only = lambda total, info, stats: second.finish(total, info, stats)[:, 0]
    return first, second._replace(finish=only)


def kth_magnitudes_of(ranks: Sequence[Rank], scope: str) -> tuple[Measure, Measure]:
    """As `kth_magnitude_of` for K ranks at once; the last statistic is ``[T, K]``."""

    def upper_of_leaf(x: Array, leaf: Leaf, stats: tuple) -> Array:
        return jax.vmap(upper_counts)(x)

    def upper_on_host(x: np.ndarray, stats: tuple) -> np.ndarray:
        return np.stack([_upper_counts_of_array(x_n) for x_n in x])

    def wanted(info: ModelInfo, task: int) -> list[int]:
        return [(rank if callable(rank) else rank[task])(info.size) for rank in ranks]

    def find_upper(counts: Array, info: ModelInfo, stats: tuple) -> tuple[Array, Array]:
        """Bins and ranks inside them, each ``[T, K]``."""
        xp = np if isinstance(counts, np.ndarray) else jnp
        if xp is jnp and info.size >= 1 << 32:
            raise ValueError(f"off the CPU, exact thresholds count up to 2^32 entries per task; this has {info.size}")
        found = []
        for task in range(counts.shape[0]):
            unseen = xp.zeros(_HIGH, counts.dtype) if not info.unseen else xp.eye(1, _HIGH, dtype=counts.dtype)[0]
            total = counts[task] + unseen * xp.asarray(info.unseen, counts.dtype)
            found.append([_locate(total, xp.asarray(rank, counts.dtype)) for rank in wanted(info, task)])
        uppers, rests = (xp.stack([xp.stack([pair[i] for pair in row]) for row in found]) for i in range(2))
        # Of NumPy as of XLA, so that the same programs take them.
        return uppers.astype(xp.int32), rests.astype(xp.uint32) if info.size < 1 << 32 else rests

    def lower_of_leaf(x: Array, leaf: Leaf, stats: tuple) -> Array:
        return jax.vmap(lambda x_n, uppers: jnp.stack([lower_counts(x_n, u) for u in uppers]))(
            x, jnp.asarray(_rounds(stats)[0], jnp.uint32)
        )

    def lower_on_host(x: np.ndarray, stats: tuple) -> np.ndarray:
        uppers = _rounds(stats)[0]
        return np.stack([_lower_counts_of_array(x_n, u_n) for x_n, u_n in zip(x, uppers, strict=True)])

    def find_lower(counts: Array, info: ModelInfo, stats: tuple) -> Array:
        xp = np if isinstance(counts, np.ndarray) else jnp
        uppers, rests = (xp.asarray(each) for each in _rounds(stats))
        values = []
        for task in range(counts.shape[0]):
            row = []
            for k in range(len(ranks)):
                unseen = xp.where(uppers[task, k] == 0, xp.asarray(info.unseen, counts.dtype), 0).astype(counts.dtype)
                total = counts[task, k] + unseen * (xp.arange(_LOW) == 0).astype(counts.dtype)
                row.append(_value(uppers[task, k], _locate(total, rests[task, k])[0]))
            values.append(xp.stack(row))
        return xp.stack(values)

    return (
        Measure(upper_of_leaf, find_upper, scope=scope, host=upper_on_host),
        Measure(lower_of_leaf, find_lower, scope=scope, host=lower_on_host),
    )


def _rounds(stats: tuple) -> tuple[Array, Array]:
    """The pair that the first round found: the latest of the transform's statistics so far."""
    return stats[-1]
