"""Task vectors in a basis that all tasks share (KnOTS), and the trimming that goes with it."""

import dataclasses
import functools
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskvec.transforms.base import Array, Chain, Leaf, Measure, ModelInfo, Transform, check_choice, check_fraction
from taskvec.transforms.lifted import View, lifted
from taskvec.transforms.matrices import input_first, matrix_named, turned
from taskvec.transforms.order import kth_magnitude_of
from taskvec.transforms.singular import singular


@functools.cache
def in_shared_basis(inner: Transform | Chain, floor: float = 1e-5) -> Transform:
    """Runs a chain on the coordinates of all tasks in one basis of outputs, and turns the result back.

    For every matrix ``[tau_1 .. tau_T] = U S [V_1 .. V_T]`` (``[out, T in]``): task t is represented by ``S V_t``,
    which is ``U^T tau_t``, rows in order of falling singular values; the inner chain merges these, and
    ``x = U merged``. What the chain measures of the model it measures of the coordinates. Rows beyond the rank are
    zero; tensors that are no matrices take part as they are. Source: KnOTS, arXiv 2410.19735, section 4.

    Args:
      inner: a transform or chain, e.g. TIES on the coordinates.
      floor: singular values up to this, in the unit of the weights, count as zero (released code); and always
        those that are rounding noise.
    """
    matrix = matrix_named("")

    def basis(tau: Array) -> Array:
        """``U [M, M]``, zero columns beyond the rank."""
        tasks, m, n = tau.shape
        wide = jnp.concatenate(jax.lax.optimization_barrier(tau), axis=1)
        u, s, v = singular(wide if m > tasks * n else wide.T)
        u = (u if m > tasks * n else v) * (s > floor)
        return jax.lax.optimization_barrier(jnp.pad(u, ((0, 0), (0, m - u.shape[1]))))

    def rotated(u: Array, tau: Array) -> Array:
        with jax.default_matmul_precision("highest"):
            return jax.lax.optimization_barrier(jnp.stack([u.T @ x for x in tau]))

    def parts_of(x: Array, leaf: Leaf) -> list[View]:
        if not leaf.satisfies(matrix):
            return [(x, leaf)]
        if x.ndim != leaf.theta0.ndim + 1:
            raise ValueError("in_shared_basis takes one vector per task: put it before reductions such as sum_tasks()")
        u, theta0 = basis(turned(x, leaf)), turned(leaf.theta0, leaf)
        coordinates = rotated(u, turned(x, leaf))
        return [(coordinates, dataclasses.replace(leaf, theta0=jnp.zeros_like(theta0), tau=coordinates))]

    def join(done: list[Array], x: Array, leaf: Leaf) -> Array:
        if not leaf.satisfies(matrix):
            return done[0]
        with jax.default_matmul_precision("highest"):
            return turned(basis(turned(x, leaf)) @ done[0], leaf)

    return lifted("in_shared_basis", inner, parts_of, join, (matrix, input_first))


@functools.cache
def trim_present(density: float, rule: str = "paper") -> Transform:
    """As `trim` with one threshold per task, but rows that are zero in all tasks do not count in the density.

    Coordinates beyond the rank are such rows: a basis of 128 directions out of 768 has 128 rows, and 20 % of those are
    kept. So are tensors that no task changed.

    Args:
      density: fraction kept, in (0, 1].
      rule: as in `trim`.
    """
    check_fraction("density", density)
    check_choice("rule", rule, ("paper", "released"))
    share = Fraction(str(density)).limit_denominator(10_000)
    upper, lower = kth_magnitude_of(lambda n: 1, "model")

    def count(x: Array, leaf: Leaf, stats: tuple) -> Array:
        row = x.reshape(x.shape[0], x.shape[1] if x.ndim > 1 else 1, -1)
        return (row != 0).any((0, 2)).sum(dtype=jnp.uint32) * jnp.uint32(row.shape[2])

    def first(x: Array, leaf: Leaf, stats: tuple) -> tuple[Array, Array]:
        return count(x, leaf, stats), upper.of_leaf(x, leaf, ())

    def find_upper(total: Any, info: ModelInfo, stats: tuple) -> Any:
        present, counts = total
        p, q = share.numerator, share.denominator
        kept = present // q * p + present % q * p // q + (rule == "released")
        least = (np if isinstance(kept, np.ndarray | np.generic) else jnp).clip(kept, 1, None)
        rank = info.size - info.unseen - least + 1
        at = kth_magnitude_of(lambda n: rank, "model")[0]
        return at.finish(counts, info._replace(unseen=0), ())

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        return jnp.where(jnp.abs(x) >= stats[1].reshape(-1, *[1] * (x.ndim - 1)), x, 0.0)

    if density == 1:
        return Transform("trim_present", lambda x, leaf, stats: x)
    return Transform("trim_present", apply, (Measure(first, find_upper), lower._replace(host=None)))
