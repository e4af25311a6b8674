"""What is learned, and how it makes weights: the interface that all adaptive methods share.

A parametrisation's learnables are first *spread* into one factor per tensor (for coefficients ``[T]``; ``[L, T]`` for a
stacked leaf); then every tensor is merged on its own. That is what lets `merged.merged_apply` merge one layer at a time
inside a model's scan.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from taskvec import tree as trees
from taskvec.transforms.plan import path_hash
from taskvec.transforms.reduce import UNROLL
from taskvec.tree import Tree
from taskvec.vectors import LowRank

Array = jax.Array


class LayerOf(NamedTuple):
    """Task vectors ``[T, ...]`` of one layer that stay in their stack, to be read from there one after the other.

    A scan over layers would copy its slices, twice as many bytes as all tasks' vectors of the layer have.

    Attributes:
      stack: ``[L, T, ...]``.
      layer: number of the layer.
    """

    stack: Array
    layer: Array

    def some(self, start: Any, count: int) -> Array:
        """`count` tasks from `start` on: ``[count, ...]``."""
        of_entries = self.stack.shape[2:]
        at = [jnp.asarray(index, jnp.int32) for index in (self.layer, start, *(0 for _ in of_entries))]
        return jax.lax.dynamic_slice(self.stack, at, (1, count, *of_entries))[0]

    def whole(self) -> Array:
        """A copy of all of them."""
        return self.some(0, self.stack.shape[1])


class Parametrisation(NamedTuple):
    """What is learned, and how it makes merged weights.

    Attributes:
      init: ``() -> learnables``, the starting point.
      spread: ``(learnables, key) -> factors``, a tree like `theta0` that holds an array or a tree of arrays where
        `theta0` holds a leaf; those of a stacked leaf have the layer axis first. The key is for methods that draw.
      combine: ``(theta0 [...], tau, factor) -> [...]`` for one per-layer tensor; tau is ``[T, ...]`` or `LowRank`.
      project: ``learnables -> learnables``, applied after every optimiser step (the identity unless the method has
        a feasible set).
      table: ``learnables -> (names of G groups, [G, T])``, the coefficients that multiply task vectors, ``[G, T, K]``
        with partitions; ``None`` where that is not what is learned.
    """

    init: Callable[[], Tree]
    spread: Callable[[Tree, Any], Tree]
    combine: Callable[[Array, Any, Any], Array]
    project: Callable[[Tree], Tree] = lambda learnables: learnables
    table: Callable[[Tree], tuple[tuple[str, ...], Array]] | None = None

    def merge_tensor(self, theta0: Array, tau: Any, factor: Any) -> Array:
        """Merges one per-layer tensor in `theta0`'s dtype; integer and boolean tensors are copied from `theta0`."""
        if isinstance(tau, LayerOf) and self.combine is not weighted_sum:
            tau = tau.whole()
        return self.combine(theta0, tau, factor).astype(theta0.dtype) if trees.is_float(theta0) else theta0

    def merge(self, theta0: Tree, tau: Tree, learnables: Tree, key: Any = None) -> Tree:
        """The whole merged tree.

        Args:
          theta0: pretrained parameters, plain leaves ``[...]`` and stacked ones ``[L, ...]``.
          tau: task vectors, ``[T, ...]`` and ``[L, T, ...]``, or `LowRank`.
          learnables: as from `init`.
          key: for parametrisations that draw.

        Raises:
          ValueError: a leaf of `tau` has not `theta0`'s shape with a task axis (second under ``blocks``).
        """
        check_task_axes(theta0, tau)

        def leaf(path, *args):
            return (jax.vmap(self.merge_tensor) if trees.is_stacked(path) else self.merge_tensor)(*args)

        return trees.map_with_path(leaf, theta0, tau, self.spread(learnables, key))


def fixed(parametrisation: Parametrisation, learnables: Tree | None = None) -> Parametrisation:
    """The same merge with nothing to learn: its learnables stay as given, or as they start.

    They become constants of the compiled program: for coefficients, not for learnables as large as a model.
    """
    kept = parametrisation.init() if learnables is None else learnables
    return parametrisation._replace(
        init=lambda: {},
        spread=lambda _, key: parametrisation.spread(kept, key),
        project=lambda nothing: nothing,
        table=None if parametrisation.table is None else lambda _: parametrisation.table(kept),
    )


def check_task_axes(theta0: Tree, tau: Tree) -> None:
    """Raises `ValueError` at the first leaf of `tau` that is not `theta0`'s with one common task axis."""
    num_tasks = None

    def check(path, leaf, vectors):
        nonlocal num_tasks
        axis = int(trees.is_stacked(path))
        layout = "[L, T, ...]" if axis else "[T, ...]"
        without = vectors.shape[:axis] + vectors.shape[axis + 1 :]
        if vectors.ndim != leaf.ndim + 1 or without != leaf.shape:
            raise ValueError(f"task vectors of {path} have shape {vectors.shape}; {layout} of {leaf.shape} is needed")
        if num_tasks not in (None, vectors.shape[axis]):
            raise ValueError(f"task vectors of {path} hold {vectors.shape[axis]} tasks, other leaves {num_tasks}")
        num_tasks = vectors.shape[axis]

    trees.map_with_path(check, theta0, tau)


def weighted_sum(theta0: Array, tau: Any, coef: Array) -> Array:
    """``theta0 + sum_t coef[t] tau[t]``, accumulated in (at least) float32.

    Dense task vectors are summed in a loop over tasks, unrolled for up to 32: XLA fuses it into one pass over memory,
    whereas a broadcast product summed over its leading axis is 200 times slower on CPU. Low-rank ones are one product
    of matrices, ``[m, T r] @ [T r, n]``.

    Args:
      theta0: ``[...]``.
      tau: ``[T, ...]``, `LowRank` or `LayerOf`.
      coef: ``[T]``; ``[T, ...]`` for one coefficient per entry (products of `LowRank` are then made, one at a time);
        ``[T, r]`` for one a rank of `LowRank`.
    """
    dtype = jnp.promote_types(theta0.dtype, jnp.float32)
    total, coef = theta0.astype(dtype), coef.astype(dtype)
    if isinstance(tau, LayerOf):
        if len(coef) != tau.stack.shape[1]:  # a slice beyond the last task would be that of the last
            raise ValueError(f"coefficients of {len(coef)} tasks for task vectors of {tau.stack.shape[1]}")
        if coef.ndim == 1 and theta0.ndim > 1:
            return _of_layer(total, *tau, coef)
        tau = tau.whole()
    if isinstance(tau, LowRank) and coef.ndim == 3:
        one = lambda acc, x: (acc + x[0] * (x[1].astype(dtype) @ x[2].astype(dtype)), None)
        return jax.lax.scan(one, total, (coef, tau.up, tau.down))[0]
    if isinstance(tau, LowRank):
        coef_Tx1xr = coef[:, None, None] if coef.ndim == 1 else coef[:, None, :]
        up_mxTr = jnp.concatenate(list(tau.up.astype(dtype) * coef_Tx1xr), axis=1)
        return total + up_mxTr @ tau.down.astype(dtype).reshape(-1, tau.down.shape[-1])
    return _one_a_task(total, tau, coef) if coef.ndim == 1 else _summed(total, tau, coef)


def _summed(total: Array, tau: Array, coef: Array) -> Array:
    dtype = total.dtype
    if tau.ndim == 2 and coef.ndim == 1:
        # A product stands on its own. The loop below would be fused into whatever uses the vector and be run again for
        # every row that a bias is added to: a third of a step of MiniLM on CPU.
        return total + jnp.dot(coef, tau.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    if tau.shape[0] <= UNROLL:
        for t in range(tau.shape[0]):
            total = total + coef[t] * tau[t].astype(dtype)
        return total
    return jax.lax.scan(lambda acc, one: (acc + one[0] * one[1].astype(dtype), None), total, (coef, tau))[0]


# The gradient by T coefficients is ``<g, tau_t>``: as one product of a matrix by a vector it takes a tenth of the time
# on CPU of the T sums over all entries that are derived from `_summed`.
_one_a_task = jax.custom_jvp(_summed)


def _derivative(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    total, tau, coef = primals
    by_total, by_tau, by_coef = (None if isinstance(x, SymbolicZero) else x for x in tangents)
    out = jnp.zeros_like(total) if by_total is None else by_total
    if by_coef is not None:
        out = out + _product(by_coef, tau)
    if by_tau is not None:
        out = out + _summed(jnp.zeros_like(total), by_tau, coef)
    return _summed(total, tau, coef), out


_one_a_task.defjvp(_derivative, symbolic_zeros=True)


def _product(by_T: Array, tau: Array) -> Array:
    """``sum_t by[t] tau[t]``, and on the way back ``<g, tau[t]>``, as one product.

    Over all axes as they are, since a reshape gathers those that are divided over a mesh; but flat on CPU, where XLA
    would make a transposed copy for two axes.
    """
    tau, precision = tau.astype(by_T.dtype), jax.lax.Precision.HIGHEST
    if jax.default_backend() == "cpu":
        return jnp.dot(by_T, tau.reshape(len(tau), -1), precision=precision).reshape(tau.shape[1:])
    return jnp.tensordot(by_T, tau, 1, precision=precision)


@jax.custom_jvp
def _of_layer(total: Array, stack: Array, layer: Array, coef: Array) -> Array:
    """`_summed` for a `LayerOf`: one pass over the layer's part of the stack, without a copy of it."""
    one = lambda t: LayerOf(stack, layer).some(t, 1)[0].astype(total.dtype)
    if len(coef) <= UNROLL:
        for t in range(len(coef)):
            total = total + coef[t] * one(t)
        return total
    step = lambda acc, x: (acc + x[0] * one(x[1]), None)
    return jax.lax.scan(step, total, (coef, jnp.arange(len(coef))))[0]


def _derivative_of_layer(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    total, stack, layer, coef = primals
    by_total, by_stack, _, by_coef = (None if isinstance(x, SymbolicZero) else x for x in tangents)
    out = jnp.zeros_like(total) if by_total is None else by_total
    if by_coef is not None:
        # Products of a few rows by a vector, as in `_derivative`; what is copied out of the stack for them are these
        # rows, on CPU. Accelerators, which have the memory, take all of them in one product.
        count = min(len(coef), 2) if jax.default_backend() == "cpu" else len(coef)
        start_P = np.minimum(np.arange(0, len(coef), count), len(coef) - count)
        task_PxC = start_P[:, None] + np.arange(count)
        first_PxC = np.unique(task_PxC, return_index=True)[1]  # the last rows may overlap with those before
        counted = np.isin(np.arange(task_PxC.size), first_PxC).reshape(task_PxC.shape)

        @jax.checkpoint  # of which only the stack itself is kept for the backward pass
        def part(by_C: Array, start: Array) -> Array:
            return _product(by_C, LayerOf(stack, layer).some(start, count))

        by_PxC = jnp.where(counted, by_coef[task_PxC], 0.0)
        out = jax.lax.scan(lambda acc, x: (acc + part(*x), None), out, (by_PxC, start_P))[0]
    if by_stack is not None:
        out = out + _of_layer(jnp.zeros_like(total), by_stack, layer, coef)
    return _of_layer(total, stack, layer, coef), out


_of_layer.defjvp(_derivative_of_layer, symbolic_zeros=True)


def tensor_numbers(theta0: Tree) -> Tree:
    """A number for every per-layer tensor, from its path alone: uint32 scalars, ``[L]`` for stacked leaves."""

    def leaf(path, x):
        if not trees.is_stacked(path):
            return jnp.uint32(path_hash(path))
        return jnp.array([path_hash(trees.layer_path(path, i)) for i in range(x.shape[0])], jnp.uint32)

    return trees.map_with_path(leaf, theta0)
