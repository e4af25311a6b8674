"""Parameters of different tasks compete for every weight; the winners' shares are worked out over the whole model."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from taskvec.transforms.base import Array, Leaf, Measure, ModelInfo, Transform, check_choice, check_fraction
from taskvec.transforms.order import kth_magnitudes_of
from taskvec.transforms.reduce import weighted_sum
from taskvec.transforms.sparsify import by_task

# The released programs, and the fraction of entries that each clips at either end.
_CLIPPED = {"released": 1e-4, "released_vision": 0.01, "released_search": 0.01}


@functools.cache
def compete(density: float, variant: str = "paper") -> Transform:
    """Gives every task a share of every weight: ``x_t <- s_t x_t / sum_k s_k``; sum the tasks next.

    Source: PCB-Merging, arXiv 2410.02396. A task's claim is ``b = intra * inter``: how large its entry is
    among its own, and how well it agrees with the other tasks'. With norm(.) scaling a vector to [0, 1]:

    ``paper``: ``intra_t = softmax(T norm(x_t x_t))``, ``inter_t = sum_k softmax(norm(x_t x_k))``, softmax over all
    entries of the model; s_t is b_t where b_t is among the `density` largest of the task, else 0.

    The released programs clip the vectors at two quantiles of their magnitude, take ``intra_t = exp(T n_t^2)`` with
    n_t = sign(x_t) norm(|x_t|), and s_t rises from 0 at the threshold to 1 at the largest b_t:
    ``released`` (pcb-merging.py): ``inter_t = tanh(x_t sum_k x_k)``, clips 1e-4 at either end;
    ``released_vision`` (pcb.py): ``inter_t = tanh(x_t sum_k n_k)``, clips 0.01;
    ``released_search`` (pcb_ES.py): ``inter_t = sum_k tanh(n_t n_k)``, clips 0.01.
    Their claims can be negative; such entries get nothing, also where `density` is larger than the positive part.

    Args:
      density: fraction of entries of a task that take part, in (0, 1]. Entries that the leaf policy counts but that are
        not merged (frozen tensors) rank last.
      variant: one of the four above.
    """
    check_fraction("density", density)
    check_choice("variant", variant, ("paper", *_CLIPPED))
    threshold = lambda size: min(int(size * (1 - density)) + 1, size)
    if variant == "paper":
        before, claims = (Measure(_product_bounds, _bounds, jnp.maximum), Measure(_exp_sums, _exp_means)), _paper_claims
    else:
        clipped = _CLIPPED[variant]
        lowest = lambda size: int(size * clipped) + 1
        highest = lambda size: max(int(size * (1 - clipped) - 1) + 1, 1)
        before = kth_magnitudes_of([lowest, highest], "model")
        claims = functools.partial(_released_claims, variant=variant)
    order = kth_magnitudes_of([threshold, lambda size: size], "model")

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        claim = claims(x, stats)
        lowest, largest = by_task(stats[3][:, 0], x), by_task(stats[3][:, 1], x)
        if variant == "paper":
            # The margin keeps the threshold's own entry, whose value may be rounded differently here.
            share = jnp.where(claim >= lowest * (1 - 1e-6), claim, 0.0)
        else:
            x = _clip(x, stats[1])[0]
            share = _fraction(jnp.maximum(claim, lowest), lowest, largest)
        total = weighted_sum([1.0] * x.shape[0], share)
        return x * (share / jnp.where(total > 0, total, 1.0))

    return Transform("compete", apply, (*before, *(_measured_on(claims, measure) for measure in order)))


def _measured_on(claims: Callable, measure: Measure) -> Measure:
    """The same measure, of the claims instead of the vectors."""
    compiled = jax.jit(lambda x, stats: claims(jnp.stack(x), stats))
    on_host = lambda x, stats: np.asarray(compiled(tuple(map(np.asarray, x)), stats[:2]))
    return measure._replace(
        of_leaf=lambda x, leaf, stats: measure.of_leaf(claims(x, stats), leaf, stats),
        host=measure.host and (lambda x, stats: measure.host(on_host(x, stats), stats)),
    )


def _fraction(x: Array, low: Array, high: Array) -> Array:
    """Where x lies between low and high; 0 if there is nothing between."""
    return (x - low) * jnp.where(high > low, 1 / jnp.where(high > low, high - low, 1.0), 0.0)


def _clip(x: Array, bounds_Tx2: Array) -> tuple[Array, Array]:
    """The clipped vectors, and how far their magnitudes lie between the bounds (with their sign)."""
    low, high = by_task(bounds_Tx2[:, 0], x), by_task(bounds_Tx2[:, 1], x)
    magnitude = jnp.clip(jnp.abs(x), low, high)
    return jnp.sign(x) * magnitude, jnp.sign(x) * _fraction(magnitude, low, high)


def _released_claims(x: Array, stats: tuple, variant: str) -> Array:
    normed, ones = _clip(x, stats[1])[1], [1.0] * x.shape[0]
    if variant == "released_search":
        add = lambda total, other: (total + jnp.tanh(normed * other), None)
        inter = jax.lax.scan(add, jnp.zeros_like(x), normed)[0]
    else:
        inter = jnp.tanh(x * weighted_sum(ones, x if variant == "released" else normed))
    # exp(T (n^2 - 1)) instead of exp(T n^2) stays finite for any T; the factor falls out of the shares.
    return jnp.maximum(jnp.exp(x.shape[0] * (normed**2 - 1)) * inter, 0.0)


def _of_pairs(fn: Callable, x: Array, *of_pair_TxT: Array) -> Array:
    """A symmetric function of two tasks, ``fn(x_t, x_k, of_pair[t, k]) -> number``, of each pair once: ``[T, T]``."""
    tasks = range(x.shape[0])
    one = lambda t, k: fn(x[t], x[k], *(each[t, k] for each in of_pair_TxT))
    found = {(t, k): one(t, k) for t in tasks for k in tasks[t:]}
    return jnp.stack([jnp.stack([found[min(t, k), max(t, k)] for k in tasks]) for t in tasks])


def _product_bounds(x: Array, leaf: Leaf, stats: tuple) -> Array:
    """The largest x_t x_k and -x_t x_k: ``[2, T, T]``."""
    axes = tuple(range(1, x.ndim))
    most = lambda sign: jnp.stack([(sign * x * x[k]).max(axes, initial=-jnp.inf) for k in range(x.shape[0])])
    return jnp.stack([most(1), most(-1)])


def _bounds(found: Array, info: ModelInfo, stats: tuple) -> Array:
    found = jnp.maximum(found, 0.0) if info.unseen else found
    return jnp.stack([-found[1], found[0]])


def _intra(x: Array, bounds_2xTxT: Array) -> Array:
    """``exp(T (norm(x_t x_t) - 1))``."""
    low_T, high_T = jnp.diagonal(bounds_2xTxT, axis1=1, axis2=2)
    return jnp.exp(x.shape[0] * (_fraction(x * x, by_task(low_T, x), by_task(high_T, x)) - 1))


def _inter(x: Array, other: Array, low: Array, high: Array) -> Array:
    """``exp(norm(x_t x_k))``."""
    return jnp.exp(_fraction(x * other, low, high))


def _exp_sums(x: Array, leaf: Leaf, stats: tuple) -> tuple[Array, Array]:
    # One sum at a time: XLA on CPU runs sums of several arrays in one loop without vector instructions.
    bounds = jnp.asarray(stats[0])
    intra = _intra(x, bounds)
    inter = _of_pairs(lambda *pair: _inter(*pair).sum(), x, *bounds)
    return jnp.stack([intra[t].sum() for t in range(x.shape[0])]), inter


def _exp_means(sums: tuple[Array, Array], info: ModelInfo, stats: tuple) -> tuple[Array, Array]:
    zeros, bounds = jnp.zeros(sums[0].shape[0]), jnp.asarray(stats[0])
    at_zero = _intra(zeros, bounds), _of_pairs(_inter, zeros, *bounds)
    return tuple((total + info.unseen * each) / info.size for total, each in zip(sums, at_zero, strict=True))


def _paper_claims(x: Array, stats: tuple) -> Array:
    bounds, (intra_mean_T, inter_mean_TxT) = jnp.asarray(stats[0]), stats[1]
    # Written out: each task's claim is one loop over its entries, whereas a scan over k would pass all of them k times
    # through memory.
    total = 0.0
    for k in range(x.shape[0]):
        low, high, factor = (by_task(each_T, x) for each_T in (*bounds[:, k], 1 / jnp.asarray(inter_mean_TxT)[k]))
        total += factor * _inter(x, x[k], low, high)
    return _intra(x, bounds) / by_task(intra_mean_T, x) * total
