"""A reduction with weights of its own for every tensor."""

import functools

import jax.numpy as jnp
import numpy as np

from taskvec.transforms.base import Array, Leaf, Transform
from taskvec.transforms.plan import path_hash
from taskvec.transforms.reduce import weighted_sum

Table = tuple[tuple[str, tuple[float, ...]], ...]


@functools.lru_cache(maxsize=16)
def sum_by_name(table: Table, rest: float = 0.0) -> Transform:
    """``sum_t w_{l,t} x_{l,t}`` with weights that depend on the tensor l: what layer-wise adaptive merging learns.

    Args:
      table: pairs of a per-layer path (the name of a tensor in a file) and its T weights.
      rest: weight of every task in tensors that the table does not name.

    Raises:
      ValueError: a name stands twice in the table, or the numbers of weights differ.
    """
    numbers = np.array([path_hash(name) for name, _ in table], np.uint32)
    if len({len(weights) for _, weights in table}) > 1:
        raise ValueError(f"the table has rows of {sorted({len(w) for _, w in table})} weights: give one a task in each")
    if len(set(numbers.tolist())) < len(table):
        names = [name for name, _ in table]
        twice = next((name for name in names if names.count(name) > 1), None)
        raise ValueError(f"the table names {twice} twice" if twice else "two names of the table have the same hash")
    order = np.argsort(numbers)
    values_PxT = np.array([weights for _, weights in table], np.float32)[order] if table else None

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        tasks = x.shape[0]
        if values_PxT is None:
            return weighted_sum([rest] * tasks, x)
        if values_PxT.shape[1] != tasks:
            raise ValueError(f"the table has {values_PxT.shape[1]} weights a tensor for {tasks} task vectors")
        sorted_ = jnp.asarray(numbers[order])
        at = jnp.minimum(jnp.searchsorted(sorted_, leaf.path_hash), len(table) - 1)
        weights_T = jnp.where(sorted_[at] == leaf.path_hash, jnp.asarray(values_PxT)[at], rest)
        return weighted_sum(weights_T, x)

    return Transform("sum_by_name", apply)
