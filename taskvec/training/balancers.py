"""Gradient balancers: how much of every task's gradient a joint step takes.

A step of joint training goes along ``sum_t w_t g_t``, with g_t the gradient of task t's loss. A balancer gives w, from
inner products of the gradients (the Gram matrix ``M_st = <g_s, g_t>``), from the losses, or from its memory of them; it
never sees the gradients themselves. All are pure and fixed in shape: they run inside a compiled step.

Weights of one are the sum of the losses. Adam and its kin hardly see a common factor of w; plain SGD does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from taskvec.training import coba as coba_formulas

Array = jax.Array
State = Any

_TINY = 1e-30
_PRECISE = jax.lax.Precision.HIGHEST


class Balancer(NamedTuple):
    """Weights of T tasks.

    Attributes:
      init: ``T -> state``, arrays.
      weights: ``(gram [T, T], state, losses [T], key) -> (w [T], state)``.
      needs_gram: whether `weights` looks at the Gram matrix. If not it may be None, and one backward pass through the
        weighted loss is enough.
      needs_validation: whether `losses` are those of validation rows.
    """

    init: Callable[[int], State]
    weights: Callable[[Array | None, State, Array, Array], tuple[Array, State]]
    needs_gram: bool = True
    needs_validation: bool = False


def _of_gram(weights: Callable[[Array, Array], Array]) -> Balancer:
    """A balancer without memory: ``(gram, key) -> w``."""
    return Balancer(lambda num_tasks: (), lambda gram, state, losses, key: (weights(gram, key), state))


def equal() -> Balancer:
    """``w = 1``: the sum of the losses, joint multi-task training."""
    return Balancer(
        lambda num_tasks: (), lambda gram, state, losses, key: (jnp.ones_like(losses), state), needs_gram=False
    )


def pcgrad() -> Balancer:
    """Gradient surgery, PCGrad (arXiv 2001.06782, algorithm 1).

    Each g_i loses, in random order of the other tasks j, its component along g_j if ``<g_i, g_j> < 0``; the results are
    added. Here rows ``C_i`` with ``g_i = sum_j C_ij g_j`` take the place of gradients. LibMTL's order has i itself in
    it, which can act once g_i has changed; the paper leaves it out.
    """

    def weights(gram, key):
        num_tasks = gram.shape[0]

        def row(i, key):
            order = jax.random.permutation(key, num_tasks)

            def project(at, c_T):
                j = order[at]
                inner = jnp.dot(c_T, gram[:, j], precision=_PRECISE)
                conflict = (inner < 0) & (j != i) & (gram[j, j] > 0)
                return c_T.at[j].add(jnp.where(conflict, -inner / jnp.maximum(gram[j, j], _TINY), 0))

            return jax.lax.fori_loop(0, num_tasks, project, jax.nn.one_hot(i, num_tasks, dtype=gram.dtype))

        return jax.vmap(row)(jnp.arange(num_tasks), jax.random.split(key, num_tasks)).sum(0)

    return _of_gram(weights)


SCALES = ("min", "median", "rmse")


def aligned_mtl(scale: str = "min", preference: Array | None = None) -> Balancer:
    """Aligned-MTL (Independent Component Alignment, arXiv 2305.19000, algorithm 1): ``w = s V L^(-1/2) V' p``.

    ``M = V L V'``, without eigenvalues up to ``l_max T eps``; gradients so combined have condition number 1. Without
    any gradient ``w = p``.

    Args:
      scale: s, square root of the smallest eigenvalue kept (``min``, the paper's), of their lower ``median``, or of
        their mean (``rmse``).
      preference: p ``[T]``; ones by default.
    """
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; allowed: {', '.join(SCALES)}")

    def weights(gram, key):
        num_tasks = gram.shape[0]
        p_T = jnp.ones(num_tasks, gram.dtype) if preference is None else jnp.asarray(preference, gram.dtype)
        values, vectors = jnp.linalg.eigh(gram)  # ascending
        kept = values > jnp.maximum(values[-1] * num_tasks * jnp.finfo(gram.dtype).eps, _TINY)
        rank = kept.sum()
        at = num_tasks - rank + {"min": 0, "median": (rank - 1) // 2, "rmse": 0}[scale]
        square = jnp.where(kept, values, 0).sum() / jnp.maximum(rank, 1) if scale == "rmse" else values[at]
        factors = jnp.where(kept, jnp.sqrt(square / jnp.where(kept, values, 1)), 0)
        turned = jnp.dot(vectors.T, p_T, precision=_PRECISE)
        return jnp.where(rank > 0, jnp.dot(vectors, factors * turned, precision=_PRECISE), p_T)

    return _of_gram(weights)


def _descend(gram: Array, start: Array, project: Callable, smallest: float, iterations: int) -> Array:
    """Accelerated projected gradient for ``min v' M v``; the steps of a quadratic with eigenvalues from `smallest`."""
    largest = jnp.maximum(jnp.linalg.eigvalsh(gram)[-1], smallest)
    ratio = jnp.sqrt(smallest / largest)
    momentum = (1 - ratio) / (1 + ratio)

    def step(_, carry):
        v, before = carry
        ahead = v + momentum * (v - before)
        return project(ahead - jnp.dot(ahead, gram, precision=_PRECISE) / largest), v

    return jax.lax.fori_loop(0, iterations, step, (start, start))[0]


def _normalised(gram: Array, regularisation: float) -> Array:
    num_tasks = gram.shape[0]
    return gram / jnp.maximum(jnp.trace(gram), _TINY) + regularisation * jnp.eye(num_tasks, dtype=gram.dtype)


def upgrad(preference: Array | None = None, regularisation: float = 1e-4, iterations: int = 2000) -> Balancer:
    """UPGrad (Jacobian descent, arXiv 2406.16232): no task's loss grows to first order.

    Every g_i is projected onto the vectors that conflict with no gradient, and the results are added: ``w = sum_i v_i``
    with ``v_i = argmin v' M v`` over ``v >= p_i e_i``, M divided by its trace and regularised. TorchJD solves it by
    quadprog on the host, and takes gradients below 1e-4 (squared norm of all) for zero, which we do not.

    Args:
      preference: p ``[T]``; ones by default (TorchJD: 1/T).
      regularisation: added to the diagonal of the normalised M; bounds the condition number.
      iterations: of accelerated projected gradient; the error falls by ``1 - sqrt(regularisation)`` in each or faster.
    """

    def weights(gram, key):
        num_tasks = gram.shape[0]
        p_T = jnp.ones(num_tasks, gram.dtype) if preference is None else jnp.asarray(preference, gram.dtype)
        low_TxT = jnp.diag(p_T)
        project = lambda v_TxT: jnp.maximum(v_TxT, low_TxT)
        return _descend(_normalised(gram, regularisation), low_TxT, project, regularisation, iterations).sum(0)

    return _of_gram(weights)


def mgda(regularisation: float = 1e-4, iterations: int = 2000) -> Balancer:
    """MGDA (arXiv 1810.04650): the shortest convex combination, ``min |sum_t w_t g_t|`` with w on the simplex.

    Args:
      regularisation, iterations: as in `upgrad`; of combinations of equal length the most even one is taken.
    """

    def weights(gram, key):
        num_tasks = gram.shape[0]
        start = jnp.full(num_tasks, 1 / num_tasks, gram.dtype)
        project = lambda v_T: optax.projections.projection_simplex(v_T)
        return _descend(_normalised(gram, regularisation), start, project, regularisation, iterations)

    return _of_gram(weights)


def gradnorm(
    alpha: float = 1.5, optimiser: optax.GradientTransformation | None = None, form: str = "weights"
) -> Balancer:
    """GradNorm (arXiv 1711.02257): tasks that learn slowly get larger gradients.

    The weights take a step on ``sum_i | w_i |g_i| - G r_i^alpha |`` a step, with ``G = mean_i w_i |g_i|`` and r_i the
    loss as a fraction of its first value, divided by the mean of these fractions; G and r are constants of it. Here
    norms are those of the whole gradient, in the paper those of the last shared layer's.

    Args:
      alpha: 0 makes all norms equal.
      optimiser: of the weights; by default Adam with rate 0.025.
      form: ``weights`` are learned themselves, kept above zero and rescaled to the sum T (paper), or
        ``softmax``: ``w = T softmax(s)`` (LibMTL).
    """
    if form not in ("weights", "softmax"):
        raise ValueError(f"unknown form {form!r}; allowed: weights, softmax")
    optimiser = optax.adam(0.025) if optimiser is None else optimiser
    effective = (lambda s: len(s) * jax.nn.softmax(s)) if form == "softmax" else (lambda s: s)

    def init(num_tasks):
        s_T = jnp.zeros(num_tasks) if form == "softmax" else jnp.ones(num_tasks)
        return {"s": s_T, "first": jnp.zeros(num_tasks), "seen": jnp.zeros((), bool), "opt": optimiser.init(s_T)}

    def weights(gram, state, losses, key):
        norms_T = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))
        first_T = jnp.where(state["seen"], state["first"], losses)
        ratio_T = losses / jnp.maximum(first_T, _TINY)
        rate_T = ratio_T / jnp.maximum(ratio_T.mean(), _TINY)
        w_T = effective(state["s"])
        target_T = (w_T * norms_T).mean() * rate_T**alpha
        grad_T = jax.grad(lambda s: jnp.abs(effective(s) * norms_T - target_T).sum())(state["s"])
        updates, opt = optimiser.update(grad_T, state["opt"], state["s"])
        s_T = state["s"] + updates
        if form == "weights":
            s_T = jnp.maximum(s_T, 1e-3)
            s_T = s_T * (len(losses) / s_T.sum())
        return w_T, {"s": s_T, "first": first_T, "seen": jnp.ones((), bool), "opt": opt}

    return Balancer(init, weights)


def uncertainty(
    optimiser: optax.GradientTransformation | None = None, form: str = "classification", init: float = 0.0
) -> Balancer:
    """Uncertainty weighting (arXiv 1705.07115): ``min sum_i exp(-s_i) L_i + s_i / 2``, s_i the log variance of task i.

    Args:
      optimiser: of s; by default Adam with rate 1e-3. Published code puts s into the model's optimiser.
      form: ``classification``, or ``regression`` with half the weights, ``exp(-s_i) / 2`` (LibMTL, for all losses).
      init: start of s (LibMTL: -0.5).
    """
    if form not in ("classification", "regression"):
        raise ValueError(f"unknown form {form!r}; allowed: classification, regression")
    optimiser = optax.adam(1e-3) if optimiser is None else optimiser
    factor = 1.0 if form == "classification" else 0.5

    def start(num_tasks):
        s_T = jnp.full(num_tasks, init, jnp.float32)
        return {"s": s_T, "opt": optimiser.init(s_T)}

    def weights(gram, state, losses, key):
        w_T = factor * jnp.exp(-state["s"])
        updates, opt = optimiser.update(0.5 - w_T * losses, state["opt"], state["s"])
        return w_T, {"s": state["s"] + updates, "opt": opt}

    return Balancer(start, weights, needs_gram=False)


def coba(
    history: int = 200, warmup: int = 100, tau: float = 5.0, floor: float = 0.1, horizon: int = 10_000
) -> Balancer:
    """CoBa (arXiv 2410.06741): from the slopes of validation losses, no gradients; see `taskvec.training.coba`.

    Args:
      history: N, steps of the window; the paper wants twice the number of validation batches.
      warmup: the first step with weights of its own, from 1; the paper wants the number of validation batches.
      tau: temperature of the divergence factor.
      floor: smallest weight, as a fraction of the mean one.
      horizon: most steps that the divergence factor looks back (published: all).
    """
    pair = coba_formulas.make(history, warmup, tau, floor, horizon)
    return Balancer(*pair, needs_gram=False, needs_validation=True)


BALANCERS: dict[str, Callable[..., Balancer]] = {
    "equal": equal,
    "pcgrad": pcgrad,
    "aligned_mtl": aligned_mtl,
    "upgrad": upgrad,
    "mgda": mgda,
    "gradnorm": gradnorm,
    "uncertainty": uncertainty,
    "coba": coba,
}


def get(name: str, **settings: Any) -> Balancer:
    """A balancer by name; raises `ValueError` with all names for an unknown one."""
    if name not in BALANCERS:
        raise ValueError(f"unknown balancer {name!r}; there are: {', '.join(BALANCERS)}")
    return BALANCERS[name](**settings)
