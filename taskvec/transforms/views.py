"""Parts of a fused matrix as tensors of their own."""

import dataclasses
import functools

import jax.numpy as jnp

from taskvec.transforms.base import Array, Chain, Leaf, Transform
from taskvec.transforms.lifted import View, lifted
from taskvec.transforms.matrices import matrix_named


@functools.cache
def split_view(inner: Transform | Chain, pattern: str, parts: int, axis: int = 0) -> Transform:
    """Runs a chain on the parts of fused matrices, and on all other tensors as they are.

    A fused query-key-value matrix is one matrix to a method that decomposes matrices or has one threshold per tensor,
    and its three parts are three: results differ. With this a checkpoint of either kind gives the result of the other.
    Vectors that match are split as well (fused biases). The parts draw different random numbers, not those of
    separate tensors.

    >>> import taskvec as tv
    >>> tsv = tv.split_view(tv.merge_singular_vectors(), r"in_proj_weight", 3)

    Args:
      inner: a transform or chain.
      pattern: regular expression, searched in the per-layer path.
      parts: how many parts of equal length.
      axis: along which they are fused: 0 in torch's layout ``[out, in]``; the last (-1) of a flax kernel.
    """
    matrix = matrix_named(pattern)
    vector = _vector_named(pattern)
    if parts < 2:
        raise ValueError(f"split_view needs two parts or more, got {parts}")

    def along(leaf: Leaf) -> int | None:
        if leaf.satisfies(matrix):
            return axis % 2
        return 0 if leaf.satisfies(vector) else None

    def parts_of(x: Array, leaf: Leaf) -> list[View]:
        at = along(leaf)
        if at is None:
            return [(x, leaf)]
        if leaf.theta0.shape[at] % parts:
            raise ValueError(f"split_view: axis {at} of shape {leaf.theta0.shape} does not split into {parts} parts")
        cut = lambda a: jnp.split(a, parts, axis=at + a.ndim - leaf.theta0.ndim)
        hashes = [leaf.path_hash ^ jnp.uint32(i * 0x9E3779B9 & 0xFFFFFFFF) for i in range(parts)]
        pieces = zip(cut(x), cut(leaf.theta0), cut(leaf.tau), hashes, strict=True)
        return [
            (x_i, dataclasses.replace(leaf, theta0=theta0, tau=tau, path_hash=path_hash))
            for x_i, theta0, tau, path_hash in pieces
        ]

    def join(done: list[Array], x: Array, leaf: Leaf) -> Array:
        return done[0] if len(done) == 1 else jnp.concatenate(done, axis=along(leaf) + done[0].ndim - leaf.theta0.ndim)

    return lifted("split_view", inner, parts_of, join, (matrix, vector))


@functools.cache
def _vector_named(pattern: str):
    find = matrix_named(pattern)
    return lambda path, shape: len(shape) == 1 and find(path, (1, 1))
