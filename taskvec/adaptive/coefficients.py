"""Coefficients: one number a task and group of tensors, partition of a tensor, or entry."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from taskvec import tree as trees
from taskvec.adaptive.parametrisation import Parametrisation, tensor_numbers, weighted_sum
from taskvec.transforms.base import check_choice
from taskvec.transforms.by_name import part_of, part_root
from taskvec.tree import Tree

Array = jax.Array


def clip01(x: Array, low: float = 0.0, high: float = 1.0) -> Array:
    """``min(max(x, low), high)`` with gradient 1 on the closed interval, by default [0, 1], and 0 outside.

    `jnp.clip` passes no gradient at the ends themselves, where a coefficient started at 0 would stay for ever.
    """
    inside = (x >= low) & (x <= high)
    return jnp.where(inside, x, jax.lax.stop_gradient(jnp.clip(x, low, high)))


CONSTRAINTS: dict[str, Callable[[Array], Array]] = {
    "clip": clip01,
    "identity": lambda lam: lam,
    "tanh": jnp.tanh,
    "softmax": lambda lam: jax.nn.softmax(lam, axis=1),
    "softplus": jax.nn.softplus,
    "simplex": lambda lam: lam,  # kept there by a projection after every step
    "clip_wide": lambda lam: clip01(lam, -0.5, 2.0),
}


Constraint = Literal[tuple(CONSTRAINTS)]


def effective(lam: Array, constraint: str) -> Array:
    """The coefficients that multiply task vectors: the constraint applied to learnables ``[G, T]``."""
    check_choice("constraint", constraint, CONSTRAINTS)
    return CONSTRAINTS[constraint](lam)


def coefficients(
    groups: trees.Groups,
    num_tasks: int,
    init: float | Array = 0.3,
    constraint: str = "clip",
    partitions: int = 1,
    seed: int = 0,
    shared_parts: bool = False,
) -> Parametrisation:
    """One coefficient per task and group: ``theta_l = theta0_l + sum_t c(lam)[g(l), t] tau_{l,t}``.

    Args:
      groups: from `taskvec.tree.groups`, in the layout of the parameters; under ``global`` all tasks share a
        coefficient.
      num_tasks: T.
      init: start of the learnables (before the constraint), a number or ``[G, T]``; ``[1, 1]`` under ``global``.
      constraint: the function c. ``clip`` clamps to [0, 1] in the forward pass (AdaMerging, arXiv 2310.02575),
        ``clip_wide`` to [-0.5, 2], ``identity`` leaves coefficients free (aTLAS, arXiv 2407.02880), ``tanh``
        (SUPERMERGE, arXiv 2412.10416), ``softmax`` over tasks, ``softplus``, ``simplex`` (non-negative, of sum 1 over
        the tasks: Euclidean projection after every step); the two over tasks are not for ``global``.
      partitions: K. The entries of every tensor are split at random into K parts with a coefficient each (aTLAS x K,
        arXiv 2407.02880); which part an entry is in is computed from its position, not stored.
      seed: of the parts.
      shared_parts: whether tensors of equal shape have equal parts, as in aTLAS's released code.

    Returns:
      A `Parametrisation` whose learnables are ``{"lam": [G, T] float32}``; ``[G, T, K]`` if K > 1; with 1 for T under
      ``global``.
    """
    shape = (len(groups.names), 1 if groups.shared else num_tasks)
    effective(jnp.zeros(shape), constraint)  # so that an unknown name fails here
    if groups.shared and constraint in ("softmax", "simplex"):
        raise ValueError(f"constraint {constraint!r} is over tasks, which share one coefficient: take another mode")
    start = jnp.asarray(init, jnp.float32)
    if start.ndim and start.shape != shape:
        raise ValueError(f"init has shape {start.shape}; a number or {shape} (groups, tasks) is needed")
    start = jnp.broadcast_to(start, shape)
    if partitions > 1:
        start = jnp.repeat(start[..., None], partitions, axis=-1)

    def by_task(learnables: Tree) -> Array:
        coef = effective(learnables["lam"], constraint)
        return jnp.broadcast_to(coef, (shape[0], num_tasks, *coef.shape[2:]))

    def spread(learnables: Tree, key: Any = None) -> Tree:
        coef_GxT = by_task(learnables)
        factors = jax.tree.map(lambda ids: coef_GxT[ids], groups.ids)
        if partitions == 1:
            return factors
        numbers = tensor_numbers(groups.ids)
        # One root for all: a part then follows from the position alone.
        numbers = jax.tree.map(jnp.zeros_like, numbers) if shared_parts else numbers
        roots = jax.tree.map(lambda n: part_root(n, seed), numbers)
        return jax.tree.map(lambda coef, root: {"coef": coef, "root": root}, factors, roots)

    project = _onto_simplex if constraint == "simplex" else lambda learnables: learnables
    combine = weighted_sum if partitions == 1 else _partitioned(partitions)
    table = lambda learnables: (groups.names, by_task(learnables))
    return Parametrisation(lambda: {"lam": start}, spread, combine, project, table)


def elementwise(theta0: Tree, num_tasks: int, init: float = 0.3, constraint: str = "identity") -> Parametrisation:
    """One coefficient per task and entry: ``theta = theta0 + sum_t c(alpha_t) * tau_t`` (ProDistill, arXiv 2502.12706).

    Args:
      theta0: parameters, or their shapes.
      num_tasks: T.
      init: start of all coefficients.
      constraint: one of `CONSTRAINTS` that work entry by entry (not ``softmax``, not ``simplex``).

    Returns:
      A `Parametrisation` whose learnables are ``{"lam": tree}`` of float32 ``[T, ...]`` and ``[L, T, ...]``.
    """
    if constraint in ("softmax", "simplex"):
        raise ValueError(f"constraint {constraint!r} is over tasks; coefficients per entry take identity, clip, tanh")
    effective(jnp.zeros(()), constraint)

    def leaf(path, x):
        axis = int(trees.is_stacked(path))
        shape = (*x.shape[:axis], num_tasks, *(x.shape[axis:] if trees.is_float(x) else ()))
        return jnp.full(shape, init, jnp.float32)

    def spread(learnables: Tree, key: Any = None) -> Tree:
        return jax.tree.map(lambda lam: effective(lam, constraint), learnables["lam"])

    return Parametrisation(lambda: {"lam": trees.map_with_path(leaf, theta0)}, spread, weighted_sum)


def _onto_simplex(learnables: Tree) -> Tree:
    lam = learnables["lam"]
    rows = jnp.moveaxis(lam, 1, -1)
    flat = jax.vmap(optax.projections.projection_simplex)(rows.reshape(-1, rows.shape[-1]))
    return {"lam": jnp.moveaxis(flat.reshape(rows.shape), -1, 1)}


def _partitioned(partitions: int) -> Callable[[Array, Array, Tree], Array]:
    def combine(theta0: Array, tau: Array, factor: Tree) -> Array:
        part = parts(factor["root"], theta0.shape, partitions)
        return weighted_sum(theta0, tau, factor["coef"][:, part])

    return combine


def parts(root: Array, shape: tuple[int, ...], partitions: int) -> Array:
    """Which part an entry belongs to, int32 of `shape`; see `taskvec.transforms.by_name.part_of`."""
    return part_of(jax.lax.iota(jnp.uint32, math.prod(shape)), root, partitions).reshape(shape)
