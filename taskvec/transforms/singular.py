"""Singular vectors and polar factors of float32 matrices, by Gram matrices.

The eigenvectors of the smaller Gram matrix cost a tenth of an SVD, but the Gram matrix of a float32 matrix knows
nothing of singular values below some 3e-4 of the largest. What is needed of those is taken from the matrix itself:
lengths of projected columns instead of roots of eigenvalues, and a QR decomposition that mends the vectors. Where
more than a quarter of the singular values lie that low, there is an SVD after all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from taskvec.transforms.base import Array, check_choice

SOLVERS = ("gram", "svd")
# Parts of the largest singular value above which vectors are as good as an SVD's; good to 3e-4; and can be mended.
_WELL, _GOOD, _STEEP = 0.05, 0.015, 2e-3


def check_solver(solver: str) -> str:
    """Returns `solver` if it is one of `SOLVERS`."""
    return check_choice("solver", solver, SOLVERS)


def tolerance(shape: tuple[int, ...]) -> float:
    """Singular values below this part of the largest are rounding noise, as in `numpy.linalg.matrix_rank`."""
    return max(32, *shape) * 1.2e-7


def top_singular(x_MxN: Array, rank: int, solver: str = "gram", floor: Array | float = 0.0) -> tuple[Array, ...]:
    """The `rank` leading singular triplets: ``u [M, r], s [r], vt [r, N]``.

    ``gram`` takes the eigenvectors of the smaller Gram matrix, 6-23 times faster than an SVD on CPU. Singular values
    come from the lengths of the projected columns, not from the squared spectrum. Triplets that a matrix of lower rank
    does not have (singular values below 1e-3 of the largest, 1e-5 with ``svd``, or below `floor`) are zero, vectors
    included.
    """
    if solver == "svd":
        u, s, vt = jnp.linalg.svd(x_MxN, full_matrices=False)
        real = (s[:rank] > 1e-5 * s[0]) & (s[:rank] > floor)
        return u[:, :rank] * real, s[:rank] * real, vt[:rank] * real[:, None]
    if x_MxN.shape[0] < x_MxN.shape[1]:
        v, s, ut = top_singular(x_MxN.T, rank, solver, floor)
        return ut.T, s, v.T
    unit, size = _unit(x_MxN)
    with jax.default_matmul_precision("highest"):
        _, v_NxN = jnp.linalg.eigh(unit.T @ unit)
        v = v_NxN[:, ::-1][:, :rank]
        u = unit @ v
    s = jnp.linalg.norm(u, axis=0)
    real = (s > 1e-3 * s[0]) & (s * size > floor)  # below, the eigenvectors of a float32 Gram matrix are noise
    u = u * (real / jnp.where(real, s, 1.0))
    return u, s * real * size, (v * real).T


def singular(x_MxN: Array, solver: str = "gram") -> tuple[Array, Array, Array]:
    """All singular triplets of a matrix with M >= N: ``u [M, N], s [N], v [N, N]``, descending.

    `v` is orthogonal whatever the rank. Columns of `u` whose singular values are noise (`tolerance`) are zero, and so
    are those values; the others are orthonormal down to that level, and ``u v^T`` is the polar factor.
    """
    if solver == "svd":
        return _by_svd(x_MxN)
    unit, size = _unit(x_MxN)
    with jax.default_matmul_precision("highest"):
        _, v = jnp.linalg.eigh(unit.T @ unit)
        v = v[:, ::-1]
        b = unit @ v
        s = jnp.linalg.norm(b, axis=0)
        real = s > tolerance(x_MxN.shape) * s[0]
        known = (b * (real / jnp.where(real, s, 1.0)), s * real, v)
        below = lambda part, upto: (real & (s < part * s[0]))[:upto].any()
        half, quarter = _halves(len(s))
        steep = below(_GOOD, -half) | below(_STEEP, -quarter)
        known = _once(below(_WELL, None) & ~steep, lambda: (*_mended(known[0], b, s, real), v), known)
        u, s, v = _once(steep, lambda: _by_svd(unit), known)
    return u, s * size, v


def _once(needed: Array, make: Callable[[], tuple], known: tuple) -> tuple:
    """``make()`` if needed, else `known`: a loop, since under vmap, unlike a cond, it is skipped if none needs it."""
    turn = lambda state: (make(), jnp.zeros_like(state[1]))
    return jax.lax.while_loop(lambda state: state[1], turn, (known, needed))[0]


def _by_svd(x: Array) -> tuple[Array, Array, Array]:
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    real = s > tolerance(x.shape) * s[0]
    return u * real, s * real, vt.T


def _halves(n: int) -> tuple[int, int]:
    """How many of n singular triplets may need mending, and how many of those an SVD of their own."""
    return max(1, n // 2), max(1, n // 4)


def _mended(u: Array, b: Array, s: Array, real: Array) -> tuple[Array, Array]:
    """The polar factor of ``b = x v``, whose columns are all but orthogonal, and the singular values.

    Where singular values are small the columns, in descending order, are not orthogonal. The first half is left. The
    rest is made orthogonal to it; then ``b = q r``, stable in this order, and the polar factor of r is that of a
    diagonal matrix with small entries above it: ``1 + k``, ``k_ij = r_ij / (r_ii + r_jj)``, skew, to first order. The
    last quarter, where that is not enough, has an SVD of its own.
    """
    half, quarter = _halves(len(s))
    head, rest = u[:, :-half], b[:, -half:] * real[-half:]
    q, r = jnp.linalg.qr(rest - head @ (head.T @ rest))
    sign = jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0)
    q, r = q * sign, r * sign[:, None]
    d = jnp.diagonal(r)
    pairs = d[:, None] + d[None, :]
    upper = jnp.triu(r, 1) / jnp.where(pairs > 0, pairs, 1.0)
    w, tail, zt = jnp.linalg.svd(r[-quarter:, -quarter:], full_matrices=False)
    rotation = jnp.eye(half) + upper - upper.T
    rotation = rotation.at[-quarter:, -quarter:].set((w * (tail > 0)) @ zt)
    u = jnp.concatenate([head, (q @ rotation) * real[-half:]], axis=1)
    return u, jnp.concatenate([s[:-half], d.at[-quarter:].set(tail)]) * real


def polar(x_MxN: Array, solver: str = "gram") -> Array:
    """The nearest matrix with orthonormal columns (rows if M < N), ``x (x^T x)^(-1/2)``; zero columns stay zero."""
    if x_MxN.shape[0] < x_MxN.shape[1]:
        return polar(x_MxN.T, solver).T
    u, _, v = singular(x_MxN, solver)
    with jax.default_matmul_precision("highest"):
        return u @ v.T


def _unit(x: Array) -> tuple[Array, Array]:
    """The matrix scaled to unit size, so that squares of small task vectors stay clear of float32's underflow."""
    size = jnp.max(jnp.abs(x))
    return x / jnp.where(size > 0, size, 1.0), size
