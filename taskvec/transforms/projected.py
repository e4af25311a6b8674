"""Gradient descent on a correction of the task vectors, outside the subspace that the tasks share."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp

from taskvec.transforms.base import Array, Leaf, Transform, check_choice, check_fraction
from taskvec.transforms.matrices import input_first, is_linear
from taskvec.transforms.order import kth_magnitude_of
from taskvec.transforms.reduce import weighted_sum
from taskvec.transforms.solve import OTHERS, by_output, minimise, rest
from taskvec.transforms.sparsify import by_task
from taskvec.transforms.spectral import top_singular


def shared_subspace(x_TxOxI: Array, subspace: float) -> Array:
    """An orthonormal basis ``[out, k]`` of the directions that the tasks' outputs have most in common.

    With r = min(out, in): the r // T leading left singular vectors of every task, side by side, and of these columns
    the k = int(r * subspace) leading left singular vectors. Empty if there are more tasks than r, or k is 0.
    """
    tasks, outs, ins = x_TxOxI.shape
    rank = min(outs, ins)
    kept = min(int(Fraction(subspace).limit_denominator(1000) * rank), rank // tasks * tasks)
    if kept == 0:
        return jnp.zeros((outs, 0))
    each = [top_singular(x, rank // tasks)[0] for x in x_TxOxI]
    return top_singular(jnp.concatenate(each, axis=1), kept)[0]


def corrected(x_TxOxI: Array, share_T: Array, subspace: float, steps: int, learning_rate: float) -> Array:
    """Delta ``[out, in]`` that brings ``sum_k share_k (tau_k + Delta)`` close to every task vector.

    Adam, from 0, on ``sum_j sum_i <tau_j[i], tau_j[i] - sum_k share_k (tau_k[i] + Delta[i])>^2`` over rows i (one an
    output), with the gradient's part in the shared subspace taken away.
    """
    tasks = x_TxOxI.shape[0]
    merged = weighted_sum(share_T, x_TxOxI)
    basis_OxK = shared_subspace(x_TxOxI, subspace)
    total = share_T.sum()
    gaps = [(x * (x - merged)).sum(1) for x in x_TxOxI]

    def gradient(delta_OxI: Array) -> Array:
        left = [gaps[j] - total * (x_TxOxI[j] * delta_OxI).sum(1) for j in range(tasks)]
        g_OxI = sum((-2 * total * left[j])[:, None] * x_TxOxI[j] for j in range(tasks))
        return g_OxI - basis_OxK @ (basis_OxK.T @ g_OxI)

    return minimise(gradient, jnp.zeros_like(merged), steps, learning_rate)


@functools.cache
def project_descent(
    eta: float = 0.07,
    density: float = 0.3,
    subspace: float = 1 / 6,
    steps: int = 400,
    learning_rate: float = 1e-4,
    others: str = "pretrained",
) -> Transform:
    """``sum_k lambda_k m_k (tau_k + Delta)`` for every matrix of a linear layer; see `merging.doge`.

    Args:
      eta: ``lambda_k = eta / ||tau_k||_F`` of the matrix.
      density: m_k keeps this fraction of largest magnitudes of task vector k, one threshold for the whole model.
      subspace: see `shared_subspace`.
      steps, learning_rate: see `corrected`.
      others: what other tensors become: ``pretrained``, or the ``mean`` of the tasks.
    """
    check_fraction("density", density)
    check_fraction("subspace", subspace)
    check_choice("others", others, OTHERS)

    @jax.custom_batching.sequential_vmap
    def solved(x_TxOxI: Array, thresholds_T: Array) -> Array:
        size = jnp.sqrt(jnp.square(x_TxOxI.reshape(x_TxOxI.shape[0], -1)).sum(1))
        share = jnp.where(size > 0, eta / jnp.where(size > 0, size, 1.0), 0.0)
        delta = corrected(x_TxOxI, share, subspace, steps, learning_rate)
        kept = [jnp.where(jnp.abs(x) >= v, x + delta, 0.0) for x, v in zip(x_TxOxI, thresholds_T, strict=True)]
        return weighted_sum(share, jnp.stack(kept))

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        if not leaf.satisfies(is_linear):
            return rest(x, others)
        thresholds = by_task(stats[1], x).reshape(-1)
        with jax.default_matmul_precision("highest"):
            return by_output(lambda x: solved(x, thresholds), x, leaf)

    rank = lambda n: max(n - int(density * n), 1)
    measures = kth_magnitude_of(rank, "model")
    return Transform("project_descent", apply, measures, predicates=(is_linear, input_first), by_rows=False)
