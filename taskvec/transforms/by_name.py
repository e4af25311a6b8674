"""A reduction with weights of its own for every tensor, or for every part of one."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskvec.transforms.base import Array, Leaf, Transform, mixed
from taskvec.transforms.plan import path_hash
from taskvec.transforms.reduce import weighted_sum

Table = tuple[tuple[str, tuple[float, ...]], ...]
PartTable = tuple[tuple[str, tuple[float, ...], str, tuple[int, ...]], ...]

_AXES = 8  # most axes of a tensor


@functools.lru_cache(maxsize=16)
def sum_by_name(table: Table, rest: float = 0.0) -> Transform:
    """``sum_t w_{l,t} x_{l,t}`` with weights that depend on the tensor l: what layer-wise adaptive merging learns.

    Args:
      table: pairs of a per-layer path (the name of a tensor in a file) and its T weights.
      rest: weight of every task in tensors that the table does not name.

    Raises:
      ValueError: a name stands twice in the table, or the numbers of weights differ.
    """
    weights_of = _lookup(table, rest)

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        if not table:
            return weighted_sum([rest] * x.shape[0], x)
        return weighted_sum(weights_of(x, leaf)[0], x)

    return Transform("sum_by_name", apply)


@functools.lru_cache(maxsize=16)
def sum_by_part(table: PartTable, partitions: int, seed: int, shared: bool, rest: float = 0.0) -> Transform:
    """``sum_t w_{l,t,k(i)} x_{l,t,i}``: entry i of tensor l is in part k(i) of K (aTLAS x K, arXiv 2407.02880).

    Args:
      table: of every tensor its per-layer path or name in a file, ``T K`` weights (of a task after the other), the path
        that its parts were drawn for, and for each of its axes how far apart two neighbours were in the order of the
        draw: a file may hold a transposed copy.
      partitions: K.
      seed, shared: of the draw, see `part_root`.
      rest: weight of every task in tensors that the table does not name.

    Raises:
      ValueError: as `sum_by_name`.
    """
    weights_of = _lookup(table, rest, partitions)
    roots_P = np.array([part_root(0 if shared else path_hash(row[2]), seed) for row in table], np.uint32)
    strides_PxA = np.array([(*row[3], *(0,) * (_AXES - len(row[3]))) for row in table], np.uint32)

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        weights_TxK, at = weights_of(x, leaf)
        position = jnp.zeros(x.shape[1:], jnp.uint32)
        for axis in range(x.ndim - 1):
            index = jax.lax.broadcasted_iota(jnp.uint32, x.shape[1:], axis)
            index += jnp.uint32(leaf.row0) if axis == 0 else jnp.uint32(0)
            position += index * jnp.asarray(strides_PxA)[at, axis]
        return weighted_sum(weights_TxK[:, part_of(position, jnp.asarray(roots_P)[at], partitions)], x)

    return Transform("sum_by_part", apply)


def part_root(number: Any, seed: int) -> Any:
    """Root of a tensor's parts, uint32, from the hash of its path; 0 for that where tensors of a shape share them."""
    return number ^ np.uint32(seed * 0x9E3779B1 % 2**32)


def part_of(position: Array, root: Array, partitions: int) -> Array:
    """Which part the entry at a flat position is in, from a hash of position and root: int32."""
    return (mixed((position + root) * jnp.uint32(0x9E3779B1)) % jnp.uint32(partitions)).astype(jnp.int32)


def _lookup(table: Sequence[tuple], rest: float, partitions: int = 0) -> Any:
    """``(x, leaf) -> (weights of its tasks, row of the table)``: ``[T]``, with partitions ``[T, K]``."""
    numbers = np.array([path_hash(row[0]) for row in table], np.uint32)
    if len({len(row[1]) for row in table}) > 1:
        raise ValueError(
            f"the table has rows of {sorted({len(row[1]) for row in table})} weights: give one a task in each"
        )
    if len(set(numbers.tolist())) < len(table):
        names = [row[0] for row in table]
        twice = next((name for name in names if names.count(name) > 1), None)
        raise ValueError(f"the table names {twice} twice" if twice else "two names of the table have the same hash")
    order = np.argsort(numbers)
    values_PxT = np.array([row[1] for row in table], np.float32)
    values = values_PxT.reshape(len(table), -1, partitions) if partitions else values_PxT

    def weights_of(x: Array, leaf: Leaf) -> tuple[Array, Array]:
        if values.shape[1] != x.shape[0]:
            raise ValueError(f"the table has {values.shape[1]} weights per tensor for {x.shape[0]} task vectors")
        sorted_ = jnp.asarray(numbers[order])
        at = jnp.asarray(order)[jnp.minimum(jnp.searchsorted(sorted_, leaf.path_hash), len(table) - 1)]
        known = jnp.asarray(numbers)[at] == leaf.path_hash
        return jnp.where(known, jnp.asarray(values)[at], rest), at

    return weights_of
