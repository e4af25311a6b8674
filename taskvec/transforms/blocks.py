"""Sparsity in blocks: n of every m consecutive entries, shared out among the tasks without overlap."""

import functools

import jax
import jax.numpy as jnp

from taskvec.transforms.base import Array, Leaf, Transform, check_choice


@functools.cache
def block_prune(n: int, m: int, leftover: str = "short", blocks: str = "row", overlap: str = "none") -> Transform:
    """Every task keeps its `n` largest magnitudes of each block of `m` entries, among those still free.

    The first task chooses first; an entry that it keeps is closed to the later ones, so that no two tasks touch the
    same weight. The order of tasks therefore matters. Of equal magnitudes the earlier entry is taken; entries that are
    zero are never taken and stay free. Source: CABS, arXiv 2503.01874 (balanced sparsification, one task after the
    other).

    Args:
      n: entries a task keeps in a block.
      m: entries in a block.
      leftover: what to do with the last entries that do not fill a block: ``short`` (they are a block like the others)
        or ``drop`` (no task keeps any of them: the released code).
      blocks: ``row`` cuts each row (axis 0 of two or more) into blocks; ``tensor`` cuts the flattened tensor, as the
        released code does. The same wherever m divides the length of a row.
      overlap: what happens when two tasks want more than there is (n >= m / 2): ``none`` (later tasks get what is
        left) or ``half`` (a later task gets all that is left and its m // 2 largest of what is taken: the released code
        for 7B models, written for two tasks).
    """
    if not (isinstance(n, int) and isinstance(m, int) and 1 <= n <= m):
        raise ValueError(f"n:m needs whole numbers with 1 <= n <= m, got {n!r}:{m!r}")
    check_choice("leftover", leftover, ("short", "drop"))
    check_choice("blocks", blocks, ("row", "tensor"))
    check_choice("overlap", overlap, ("none", "half"))

    def choose(free: Array, x: Array) -> tuple[Array, Array]:
        """One task's turn on ``[..., m]`` blocks: what stays free, and what it keeps."""
        kept = _largest(jnp.where(free, jnp.abs(x), 0.0), n)
        if overlap == "half" and 2 * n >= m:
            later = free | _largest(jnp.where(free, 0.0, jnp.abs(x)), m // 2)
            kept = jnp.where(free.all(-1, keepdims=True), kept, later)
        return free & ~kept, jnp.where(kept, x, 0.0)

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        tasks = x.shape[0]
        rows = x.shape[1] if blocks == "row" and x.ndim > 2 else 1
        flat = x.reshape(tasks, rows, -1)
        length = flat.shape[-1]
        if leftover == "drop":
            flat = flat[..., : length - length % m]
        padded = jnp.pad(flat, ((0, 0), (0, 0), (0, -flat.shape[-1] % m))).reshape(tasks, rows, -1, m)
        kept = jax.lax.scan(choose, jnp.ones(padded.shape[1:], bool), padded)[1]
        kept = kept.reshape(tasks, rows, -1)[..., :length]
        return jnp.pad(kept, ((0, 0), (0, 0), (0, length - kept.shape[-1]))).reshape(x.shape)

    return Transform("block_prune", apply, by_rows=blocks == "row")


def _largest(magnitudes: Array, count: int) -> Array:
    """Where the `count` largest magnitudes of the last axis are; zeros are not counted in."""
    at = jnp.argsort(-magnitudes, axis=-1, stable=True)
    rank = jnp.argsort(at, axis=-1, stable=True)
    return (rank < count) & (magnitudes > 0)
