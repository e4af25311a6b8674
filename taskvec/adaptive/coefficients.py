"""Parametrisations of a merge, and the one all methods share: one coefficient a task and group of tensors.

A parametrisation says what is learned and how that makes weights. Its learnables are first *spread* into one factor a
tensor (for coefficients ``[T]``; ``[L, T]`` for a stacked leaf); then every tensor is merged on its own. That is what
lets `merged.merged_apply` merge one layer at a time inside a model's scan.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from taskvec import tree as trees
from taskvec.tree import Tree

Array = jax.Array

UNROLL = 32  # most tasks summed by an unrolled loop; beyond, program size outweighs what the fusion saves


class Parametrisation(NamedTuple):
    """What is learned, and how it makes merged weights.

    Attributes:
      init: ``() -> learnables``, the starting point.
      spread: ``learnables -> factors``, a tree like `theta0` that holds an array or a tree of arrays where `theta0`
        holds a leaf; those of a stacked leaf have the layer axis first.
      combine: ``(theta0 [...], tau [T, ...], factor) -> [...]`` for one per-layer tensor.
      project: ``learnables -> learnables``, applied after every optimiser step (the identity unless the method has
        a feasible set).
    """

    init: Callable[[], Tree]
    spread: Callable[[Tree], Tree]
    combine: Callable[[Array, Array, Any], Array]
    project: Callable[[Tree], Tree] = lambda learnables: learnables

    def merge_tensor(self, theta0: Array, tau: Array, factor: Any) -> Array:
        """Merges one per-layer tensor in `theta0`'s dtype; integer and boolean tensors are copied from `theta0`."""
        return self.combine(theta0, tau, factor).astype(theta0.dtype) if trees.is_float(theta0) else theta0

    def merge(self, theta0: Tree, tau: Tree, learnables: Tree) -> Tree:
        """The whole merged trees.

        Args:
          theta0: pretrained parameters, plain leaves ``[...]`` and stacked ones ``[L, ...]``.
          tau: task vectors, ``[T, ...]`` and ``[L, T, ...]``.
          learnables: as from `init`.

        Raises:
          ValueError: a leaf of `tau` has not `theta0`'s shape with a task axis (second under ``blocks``).
        """
        check_task_axes(theta0, tau)

        def leaf(path, *args):
            return (jax.vmap(self.merge_tensor) if trees.is_stacked(path) else self.merge_tensor)(*args)

        return trees.map_with_path(leaf, theta0, tau, self.spread(learnables))


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


def weighted_sum(theta0: Array, tau_Tx: Array, coef_T: Array) -> Array:
    """``theta0 + sum_t coef[t] tau[t]``, accumulated in (at least) float32: ``[...], [T, ...], [T] -> [...]``.

    The sum is a loop over tasks, unrolled for up to 32: XLA fuses it into one pass over memory, whereas a broadcast
    product summed over its leading axis is 200 times slower on CPU.
    """
    dtype = jnp.promote_types(theta0.dtype, jnp.float32)
    total, coef_T = theta0.astype(dtype), coef_T.astype(dtype)
    if tau_Tx.shape[0] <= UNROLL:
        for t in range(tau_Tx.shape[0]):
            total = total + coef_T[t] * tau_Tx[t].astype(dtype)
        return total
    return jax.lax.scan(lambda acc, one: (acc + one[0] * one[1].astype(dtype), None), total, (coef_T, tau_Tx))[0]


def clip01(x: Array) -> Array:
    """``min(max(x, 0), 1)`` with gradient 1 on the closed interval [0, 1] and 0 outside.

    `jnp.clip` passes no gradient at the ends themselves, where a coefficient started at 0 would stay for ever.
    """
    inside = (x >= 0) & (x <= 1)
    return jnp.where(inside, x, jax.lax.stop_gradient(jnp.clip(x, 0, 1)))


CONSTRAINTS: dict[str, Callable[[Array], Array]] = {
    "clip": clip01,
    "identity": lambda lam: lam,
    "tanh": jnp.tanh,
    "softmax": lambda lam: jax.nn.softmax(lam, axis=-1),
}


def effective(lam: Array, constraint: str) -> Array:
    """The coefficients that multiply task vectors: the constraint applied to learnables ``[G, T]``."""
    if constraint not in CONSTRAINTS:
        raise ValueError(f"unknown constraint {constraint!r}; allowed: {', '.join(CONSTRAINTS)}")
    return CONSTRAINTS[constraint](lam)


def coefficients(
    groups: trees.Groups, num_tasks: int, init: float | Array = 0.3, constraint: str = "clip"
) -> Parametrisation:
    """One coefficient a task and group: ``theta_l = theta0_l + sum_t c(lam)[g(l), t] tau_{l,t}``.

    Args:
      groups: from `taskvec.tree.groups`, in the layout of the parameters.
      num_tasks: T.
      init: start of the learnables (before the constraint), a number or ``[G, T]``.
      constraint: the function c. ``clip`` clamps to [0, 1] in the forward pass (AdaMerging, arXiv 2310.02575),
        ``identity`` leaves coefficients free (aTLAS, arXiv 2407.02880), ``tanh`` (SUPERMERGE, arXiv 2412.10416),
        ``softmax`` over tasks.

    Returns:
      A `Parametrisation` whose learnables are ``{"lam": [G, T] float32}``.
    """
    shape = (len(groups.names), num_tasks)
    effective(jnp.zeros(shape), constraint)  # so that an unknown name fails here
    start = jnp.asarray(init, jnp.float32)
    if start.ndim and start.shape != shape:
        raise ValueError(f"init has shape {start.shape}; a number or {shape} (groups, tasks) is needed")

    def spread(learnables: Tree) -> Tree:
        coef_GxT = effective(learnables["lam"], constraint)
        return jax.tree.map(lambda ids: coef_GxT[ids], groups.ids)

    return Parametrisation(lambda: {"lam": jnp.broadcast_to(start, shape)}, spread, weighted_sum)
