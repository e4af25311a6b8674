"""Task vectors of low rank: cut, re-centred, stored as factors, quantised."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from taskvec.transforms.base import Array, Leaf, Transform, check_fraction
from taskvec.transforms.matrices import matrix_named
from taskvec.transforms.reduce import mean, weighted_sum
from taskvec.transforms.singular import check_solver, top_singular
from taskvec.transforms.stored import Dense, Factored


def cut(x_TxMxN: Array, rank: int, solver: str = "gram") -> tuple[Array, Array, Array]:
    """The `rank` leading triplets of every task's matrix: ``u [T, M, k], s [T, k], vt [T, k, N]``."""
    tasks, m, n = x_TxMxN.shape
    if rank == 0:
        return jnp.zeros((tasks, m, 0)), jnp.zeros((tasks, 0)), jnp.zeros((tasks, 0, n))
    return jax.lax.map(lambda x: top_singular(x, rank, solver), x_TxMxN)


def recentre(density: float, scale: float, solver: str = "gram", matrices: str = "") -> Transform:
    """The mean of the fine-tuned models plus ``scale`` times what each has of its own, cut to low rank.

    ``x = mean + scale sum_t SVD_k(tau_t - mean)``, k = max(1, int(density min(m, n))); other tensors are averaged.
    Source: CART, arXiv 2412.12153.
    """
    check_fraction("density", density)
    return _recentre(density, check_solver(solver), matrices)._replace(constants=(scale,))


@functools.cache
def _recentre(density: float, solver: str, matrices: str) -> Transform:
    chosen = matrix_named(matrices)

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        average = mean(x)
        if not leaf.satisfies(chosen):
            return average
        with jax.default_matmul_precision("highest"):
            u, s, vt = cut(x - average, fraction_of_rank(density, x.shape[1:]), solver)
            return average + stats[0] * weighted_sum([1.0] * len(x), jnp.einsum("tmk,tkn->tmn", u * s[:, None], vt))

    return Transform("recentre", apply, predicates=(chosen,), by_rows=False, constants=(1.0,))


def fraction_of_rank(density: float, shape: tuple[int, ...]) -> int:
    """``int(density min(m, n))``, at least 1."""
    return max(1, int(density * min(shape)))


@functools.cache
def keep_task_ranks(solver: str = "gram") -> Transform:
    """Ends a chain with every task's ``min(m, n) // T`` leading singular triplets (task-conditioned).

    Other tensors, and matrices with min(m, n) < T, are kept whole. Source: TSV-Compress, arXiv 2412.00081.
    """
    check_solver(solver)
    chosen = matrix_named("")

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Factored | Dense:
        rank = min(x.shape[1:]) // len(x) if leaf.satisfies(chosen) else 0
        return Factored(*cut(x, rank, solver)) if rank else Dense(x)

    return Transform("keep_task_ranks", apply, predicates=(chosen,), by_rows=False)


def keep_shared_and_ranks(density: float, scale: float, solver: str = "gram") -> Transform:
    """Ends a chain with a shared part, ``scale sum_t x_t``, and what each task has besides, cut to low rank.

    ``shared + SVD_k(x_t - shared)``, k = max(1, int(density min(m, n))); tensors that are no matrices keep the
    difference whole. Source: Twin-Merging, arXiv 2406.15479.
    """
    check_fraction("density", density)
    return _keep_shared_and_ranks(density, check_solver(solver))._replace(constants=(scale,))


@functools.cache
def _keep_shared_and_ranks(density: float, solver: str) -> Transform:
    chosen = matrix_named("")

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Factored | Dense:
        shared = stats[0] * weighted_sum([1.0] * len(x), x)
        if not leaf.satisfies(chosen):
            return Dense(x - shared, shared)
        return Factored(*cut(x - shared, fraction_of_rank(density, x.shape[1:]), solver), shared)

    return Transform("keep_shared_and_ranks", apply, predicates=(chosen,), by_rows=False, constants=(1.0,))


Rules = tuple[tuple[str, int], ...]
Bands = tuple[tuple[int | None, int], ...]


def keep_by_rules(ranks: Rules, bands: Bands = (), group: int = 128, solver: str = "gram") -> Transform:
    """Ends a chain with singular triplets whose number depends on the module, quantised if `bands` are given.

    Args:
      ranks: ``((regular expression, rank), ...)``, searched in the per-layer path; the first that matches counts; rank
        0 drops the tensor's changes. What no rule matches, and what is no matrix, is kept whole.
      bands: ``((end, bits), ...)``: triplets up to number `end` (``None``: the rest) have their vectors rounded to the
        nearest of ``2^bits`` levels (2, 4 or 8 bits) between the least and the largest entry of a group; singular
        values are kept in bfloat16.
      group: entries of a vector that share their two levels, stored in float16.
      solver: ``gram`` or ``svd``.
    """
    ranks, bands = tuple((str(p), int(r)) for p, r in ranks), tuple((e, b) for e, b in bands)
    if any(rank < 0 for _, rank in ranks):
        raise ValueError(f"ranks must not be negative, got {ranks}")
    if any(bits not in (2, 4, 8) for _, bits in bands) or (bands and bands[-1][0] is not None):
        raise ValueError(f"bands are (end, bits) with 2, 4 or 8 bits, the last with end None; got {bands}")
    return _keep_by_rules(ranks, bands, group, check_solver(solver))


@functools.cache
def _keep_by_rules(ranks: Rules, bands: Bands, group: int, solver: str) -> Transform:
    predicates = tuple(matrix_named(pattern) for pattern, _ in ranks)

    def apply(x: Array, leaf: Leaf, stats: tuple) -> "Factored | Dense | Quantised":
        rank = next((rank for p, (_, rank) in zip(predicates, ranks, strict=True) if leaf.satisfies(p)), None)
        if rank is None:
            return Dense(x)
        factors = cut(x, min(rank, *x.shape[1:]), solver)
        return Quantised.make(*factors, bands, group) if bands and rank else Factored(*factors)

    return Transform("keep_by_rules", apply, predicates=predicates, by_rows=False)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "levels", "s"], meta_fields=["bands", "shape"]
)
@dataclasses.dataclass(frozen=True)
class Quantised:
    """``u_t diag(s_t) vt_t`` with u and vt rounded, in bands of triplets.

    Attributes:
      codes: for every band packed uint8, of the columns of u and of the rows of vt.
      levels: for every band the least level and the step of every group, float16.
      s: ``[T, k]``, bfloat16.
      bands: ``(first, end, bits)`` of every band.
      shape: ``(M, N)``.
    """

    codes: tuple[tuple[Array, Array], ...]
    levels: tuple[tuple[Array, Array], ...]
    s: Array
    bands: tuple[tuple[int, int, int], ...]
    shape: tuple[int, int]

    @classmethod
    def make(cls, u: Array, s: Array, vt: Array, bands: Bands, group: int) -> "Quantised":
        """Rounds ``u [T, M, k]`` and ``vt [T, k, N]`` to the nearest level."""
        rank, first, cuts = s.shape[-1], 0, []
        for end, bits in bands:
            end = rank if end is None else min(end, rank)
            if end > first:
                cuts.append((first, end, bits))
            first = max(first, end)
        sides = [jnp.swapaxes(u, -1, -2), vt]
        done = [[quantise(side[..., a:b, :], bits, group) for side in sides] for a, b, bits in cuts]
        codes, levels = (tuple(tuple(side[i] for side in band) for band in done) for i in range(2))
        return cls(codes, levels, s.astype(jnp.bfloat16), tuple(cuts), (u.shape[-2], vt.shape[-1]))

    def vector(self, task: int) -> Array:
        """``u_t diag(s_t) vt_t`` from the rounded factors, float32."""
        total = jnp.zeros(self.shape)
        for (first, end, bits), codes, levels in zip(self.bands, self.codes, self.levels, strict=True):
            ut, vt = (
                dequantise(code[task], level[task], bits, length)
                for code, level, length in zip(codes, levels, self.shape, strict=True)
            )
            total += (ut.T * self.s[task, first:end].astype(jnp.float32)) @ vt
        return total

    def bits(self) -> int:
        """Of all codes, levels and singular values."""
        return sum(8 * x.nbytes for x in jax.tree.leaves(self))


def quantise(x: Array, bits: int, group: int) -> tuple[Array, Array]:
    """Rounds ``[..., n]`` to ``2^bits`` levels a group: packed codes uint8, levels float16 ``[..., groups, 2]``."""
    n, per_byte = x.shape[-1], 8 // bits
    group = min(group, -(-n // per_byte) * per_byte)
    pad = -n % group
    grouped = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)], mode="edge").reshape(*x.shape[:-1], -1, group)
    low, high = grouped.min(-1), grouped.max(-1)
    levels = jnp.stack([low, (high - low) / (2**bits - 1)], axis=-1).astype(jnp.float16)
    least, step = (levels[..., i, None].astype(jnp.float32) for i in range(2))
    codes = jnp.clip(jnp.round((grouped - least) / jnp.where(step > 0, step, 1.0)), 0, 2**bits - 1).astype(jnp.uint8)
    parts = codes.reshape(*x.shape[:-1], -1, per_byte) << (jnp.arange(per_byte, dtype=jnp.uint8) * bits)
    return parts.sum(-1, dtype=jnp.uint8), levels


def dequantise(codes: Array, levels: Array, bits: int, n: int) -> Array:
    """Inverse of `quantise`, ``[..., n]``."""
    per_byte = 8 // bits
    parts = codes[..., None] >> (jnp.arange(per_byte, dtype=jnp.uint8) * bits) & jnp.uint8(2**bits - 1)
    grouped = parts.reshape(*levels.shape[:-1], -1).astype(jnp.float32)
    least, step = (levels[..., i, None].astype(jnp.float32) for i in range(2))
    return (least + step * grouped).reshape(*codes.shape[:-1], -1)[..., :n]
