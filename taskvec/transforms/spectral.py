"""Merges of weight matrices through their singular vectors.

Tensors that are no matrices (biases, norms, convolutions) are averaged over the tasks. Where left and right differ,
left is the side of a layer's outputs: the layout ``[out, in]`` of torch. Matrices that are stored as ``[in, out]`` (see
`matrices.input_first`) are turned round first.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from taskvec.transforms.base import Array, Leaf, Transform
from taskvec.transforms.matrices import input_first, matrix_named, turned
from taskvec.transforms.reduce import mean, weighted_sum
from taskvec.transforms.singular import check_solver, polar, singular, tolerance, top_singular


def _per_matrix(
    name: str, matrices: str, merged: Callable[[Array], Array], least: int = 0, sided: bool = False
) -> Transform:
    """A transform that merges ``[T, M, N]`` by `merged` where ``min(M, N) >= least T``, and averages all else."""
    chosen = matrix_named(matrices)

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        if x.ndim != leaf.theta0.ndim + 1:
            raise ValueError(f"{name} merges one vector per task: put it before a reduction such as sum_tasks()")
        if not leaf.satisfies(chosen) or min(x.shape[1:]) < least * x.shape[0]:
            return mean(x)
        with jax.default_matmul_precision("highest"):
            return turned(merged(turned(x, leaf)), leaf) if sided else merged(x)

    return Transform(name, apply, predicates=(chosen, input_first), by_rows=False)


@functools.cache
def merge_singular_vectors(solver: str = "gram", matrices: str = "") -> Transform:
    """Sums the leading singular triplets of all tasks after making them orthogonal to each other.

    For every weight matrix with r = min(m, n) and k = r // T: ``tau_t ~ U_t S_t V_t`` with k triplets each;
    ``U = [U_1 .. U_T]``, ``V = [V_1; ..; V_T]`` are replaced by their polar factors and ``x = U_perp diag(S) V_perp``.
    Other tensors are averaged over the tasks, and so are matrices with r < T, of which the released code keeps
    nothing. Source: Task Singular Vectors (TSV-M), arXiv 2412.00081, algorithm 1.

    Args:
      solver: ``gram`` or ``svd``.
      matrices: regular expression of the paths of the matrices that are decomposed.
    """
    check_solver(solver)

    def merged(x_TxMxN: Array) -> Array:
        rank = min(x_TxMxN.shape[1:]) // x_TxMxN.shape[0]
        # One task after the other, so that the memory of one decomposition is needed, not of T.
        u, s, vt = jax.lax.map(lambda x: top_singular(x, rank, solver), x_TxMxN)
        u_MxR, v_NxR = jnp.concatenate(u, axis=1), jnp.concatenate(vt, axis=0).T
        return (polar(u_MxR, solver) * s.reshape(-1)) @ polar(v_NxR, solver).T

    return _per_matrix("merge_singular_vectors", matrices, merged, least=1)


@functools.cache
def flatten_spectrum(solver: str = "gram", matrices: str = "") -> Transform:
    """Sums the tasks and sets all singular values of every matrix to their mean.

    ``sum_t tau_t = U S V``, ``x = mean(S) U V``: the nuclear norm over r = min(m, n), times the polar factor, for
    which one eigen-decomposition of the smaller Gram matrix is enough. Singular values that are rounding noise
    (`singular.tolerance`), as all but some of a sum of LoRA updates, count in the mean but stay zero; the released code
    raises arbitrary vectors to the mean there. Source: Iso-C, arXiv 2502.04959, algorithm 1.
    """
    check_solver(solver)

    def merged(x_TxMxN: Array) -> Array:
        total = weighted_sum([1.0] * x_TxMxN.shape[0], x_TxMxN)
        tall = total if total.shape[0] >= total.shape[1] else total.T
        u, s, v = singular(tall, solver)
        flat = (u * jnp.mean(s)) @ v.T
        return flat if total.shape[0] >= total.shape[1] else flat.T

    return _per_matrix("flatten_spectrum", matrices, merged)


def subspace_ranks(r: int, tasks: int, common: float) -> tuple[int, int]:
    """``(c, s)``: ranks of the common subspace and of each task's own, ``c + s T = r`` (released rounding)."""
    s = round((r - int(r * common)) / tasks)
    s = s if s * tasks <= r else r // tasks
    return r - s * tasks, s


@functools.cache
def common_and_task_subspaces(common: float = 0.8, solver: str = "gram", matrices: str = "") -> Transform:
    """As `flatten_spectrum`, with a part of the directions given to what single tasks have of their own.

    The common part are the c leading triplets ``U_c S_c V_c`` of the sum; of every residual ``tau_t - U_c U_c^T tau_t``
    the s leading triplets are taken, ``c + s T = r``. Left and right vectors are made orthogonal by their polar
    factors, and all singular values set to their mean. A residual of rank below s (LoRA experts) gives fewer
    triplets: those below the rounding noise of its task vector are left zero, where the released code raises noise to
    the mean. Source: Iso-CTS, arXiv 2502.04959, algorithm 2.

    Args:
      common: c as a fraction of r = min(m, n), before rounding so that s is whole.
      solver: ``gram`` or ``svd``.
      matrices: as in `merge_singular_vectors`.
    """
    check_solver(solver)
    if not 0 <= common <= 1:
        raise ValueError(f"common must lie in [0, 1], got {common!r}")

    def merged(x_TxMxN: Array) -> Array:
        tasks, m, n = x_TxMxN.shape
        c, s = subspace_ranks(min(m, n), tasks, common)
        total = weighted_sum([1.0] * tasks, x_TxMxN)
        if m <= n:  # a basis of all outputs: residuals live in the n - c last of its vectors
            v_NxM, s_M, u_MxM = singular(total.T, solver)
            rest, u_c, v_c = u_MxM[:, c:], u_MxM[:, :c] * (s_M[:c] > 0), v_NxM[:, :c]
            residual = lambda x: rest.T @ x
        else:
            u_MxN, s_M, v_NxN = singular(total, solver)
            u_c, v_c = u_MxN[:, :c], v_NxN[:, :c] * (s_M[:c] > 0)
            residual = lambda x: x - u_c @ (u_c.T @ x)

        def own(x: Array) -> tuple[Array, ...]:
            return top_singular(residual(x), s, solver, floor=tolerance(x.shape) * jnp.linalg.norm(x))

        if not s:
            return jnp.mean(s_M[:c]) * u_c @ v_c.T
        w, s_t, zt = jax.lax.map(own, x_TxMxN)
        # Residuals are orthogonal to the common left vectors, so their polar factor is one of its own.
        u_t = polar(jnp.concatenate(w, axis=1), solver)
        u = jnp.concatenate([u_c, rest @ u_t if m <= n else u_t], axis=1)
        v = polar(jnp.concatenate([v_c, jnp.concatenate(zt, axis=0).T], axis=1), solver)
        flat = (s_M[:c].sum() + s_t.sum()) / (c + s * tasks)
        return (flat * u) @ v.T

    return _per_matrix("common_and_task_subspaces", matrices, merged, sided=True)


@functools.cache
def calibrate_spectrum(alpha: float | str = "1/T", solver: str = "gram", matrices: str = "") -> Transform:
    """Shrinks the directions of a merged vector that several tasks share and that were therefore counted often.

    For every matrix ``x = U S V`` of a merged vector and its task vectors: ``a_r = u_r^T x``, ``a_rt = u_r^T tau_t``,
    ``s_rt = <a_r, a_rt> / ||a_rt||^2``, and ``gamma_r = T / sum_t max(alpha, s_rt)`` multiplies the r-th singular
    value. Other tensors stay. Usable after any merge; put `scale` before it, since alpha is compared with s_rt.
    Source: Singular Value Calibration (SVC), arXiv 2602.05536, equations 4, 8 and algorithm 1.

    Args:
      alpha: positive; ``1/T`` as the paper.
      solver, matrices: as in `merge_singular_vectors`.
    """
    check_solver(solver)
    if alpha != "1/T" and (isinstance(alpha, str) or not alpha > 0):
        raise ValueError(f"alpha must be positive or '1/T', got {alpha!r}")
    chosen = matrix_named(matrices)

    def calibrated(x: Array, tau: Array) -> Array:
        tasks, least = tau.shape[0], 1 / tau.shape[0] if alpha == "1/T" else alpha
        u = singular(x, solver)[0] if x.shape[0] > x.shape[1] else singular(x.T, solver)[2]
        responses = u.T @ x
        total = jnp.zeros(u.shape[1])
        for t in range(tasks):
            own = u.T @ tau[t]
            size = jnp.sum(own * own, axis=1)
            share = jnp.sum(responses * own, axis=1) / jnp.where(size > 0, size, 1.0)
            total += jnp.maximum(least, jnp.where(size > 0, share, 0.0))
        return u @ (responses * (tasks / total)[:, None])

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        if x.shape != leaf.theta0.shape:
            raise ValueError("calibrate_spectrum takes a merged vector: put sum_tasks() or another reduction before it")
        if not leaf.satisfies(chosen):
            return x
        with jax.default_matmul_precision("highest"):
            return turned(calibrated(turned(x, leaf), turned(leaf.tau, leaf)), leaf)

    return Transform("calibrate_spectrum", apply, predicates=(chosen, input_first), by_rows=False)
