"""Parameters of different tasks compete for every weight; the winners' shares are worked out over the whole model."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskvec.transforms.base import Array, Leaf, Measure, ModelInfo, Transform, check_choice, check_fraction
from taskvec.transforms.order import Difference, kth_magnitudes_of
from taskvec.transforms.reduce import weighted_sum
from taskvec.transforms.sparsify import by_task
from taskvec.transforms.unroll import unrolled

# The released programs, and the fraction of entries that each clips at either end.
_CLIPPED = {"released": 1e-4, "released_vision": 0.01, "released_search": 0.01}
_CHUNK = 1 << 15  # entries of every task taken at once: few enough for the caches
_WRITTEN_OUT = 10  # tasks; programs for all pairs of more take a minute and longer to compile
# exp on [0, 1] to 1e-7, as a polynomial of z - 1/2, the highest power first.
_SERIES = np.polynomial.Chebyshev.interpolate(lambda z: np.exp(z + 0.5), 6, [-0.5, 0.5])
_POLYNOMIAL = tuple(_SERIES.convert(kind=np.polynomial.Polynomial).coef[::-1].tolist())


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

    def shared(x: Array, stats: tuple) -> Array:
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

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        of_chunk = lambda parts: list(unrolled(lambda x: shared(x, stats), parts))
        return jnp.stack(_entrywise(of_chunk, [x[t] for t in range(x.shape[0])]))

    return Transform("compete", apply, (*before, *_measured_on(claims, order)))


def _measured_on(claims: Callable, measures: Sequence[Measure]) -> list[Measure]:
    """The same measures, of the claims instead of the vectors."""

    @jax.jit
    def compiled(theta: list[Array], theta0: Array, stats: tuple) -> list[Array]:
        def of_chunk(parts: list[Array]) -> list[Array]:
            *mine, base = parts
            return list(unrolled(lambda x: claims(x, stats), [each.astype(jnp.float32) - base for each in mine]))

        return _entrywise(of_chunk, [*theta, theta0])

    def of_claims(measure: Measure) -> Measure:
        def host(x: Sequence[np.ndarray | Difference], stats: tuple) -> Any:
            is_difference = isinstance(x[0], Difference)
            theta0 = x[0].theta0.astype(np.float32, copy=False) if is_difference else np.zeros_like(x[0])
            flat = [(each.theta if is_difference else each).reshape(-1) for each in x]  # one program for all of a size
            return measure.host(list(map(np.asarray, compiled(flat, theta0.reshape(-1), stats[:2]))), stats)

        of_leaf = lambda x, leaf, stats: measure.of_leaf(claims(x, stats), leaf, stats)
        return measure._replace(of_leaf=of_leaf, host=measure.host and host)

    return [of_claims(measure) for measure in measures]


def _fraction(x: Array, low: Array, high: Array) -> Array:
    """Where x lies between low and high; 0 if there is nothing between."""
    return (x - low) * _slope(low, high)


def _slope(low: Array, high: Array) -> Array:
    return jnp.where(high > low, 1 / jnp.where(high > low, high - low, 1.0), 0.0)


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


def _pairs(tasks: int) -> list[tuple[int, int]]:
    """Every two tasks once, and every task with itself."""
    return [(t, k) for t in range(tasks) for k in range(t, tasks)]


def _of_pairs(values: Sequence[Array], tasks: int) -> Array:
    """``[T, T]`` of numbers in the order of `_pairs`."""
    found = dict(zip(_pairs(tasks), values, strict=True))
    return jnp.stack([jnp.stack([found[min(t, k), max(t, k)] for k in range(tasks)]) for t in range(tasks)])


def _product_bounds(x: Array, leaf: Leaf, stats: tuple) -> Array:
    """The largest x_t x_k and -x_t x_k: ``[2, T, T]``."""
    axes = tuple(range(1, x.ndim))
    if x.shape[0] > _WRITTEN_OUT:
        most = lambda sign: jax.lax.map(lambda other: (sign * x * other).max(axes, initial=-jnp.inf), x)
        return jnp.stack([most(1), most(-1)])
    products = jnp.stack([x[t] * x[k] for t, k in _pairs(x.shape[0])])
    return jnp.stack([_of_pairs((sign * products).max(axes, initial=-jnp.inf), x.shape[0]) for sign in (1, -1)])


def _bounds(found: Array, info: ModelInfo, stats: tuple) -> Array:
    found = jnp.maximum(found, 0.0) if info.unseen else found
    return jnp.stack([-found[1], found[0]])


def _own(bounds_2xTxT: Array) -> Array:
    """The bounds of the x_t x_t: ``[2, T]``."""
    return jnp.diagonal(bounds_2xTxT, axis1=1, axis2=2)


def _intra(x: Array, low: Array, high: Array, tasks: int) -> Array:
    """``exp(T (norm(x_t x_t) - 1))``."""
    return jnp.exp(tasks * (_fraction(x * x, low, high) - 1))


def _inter(x: Array, other: Array, low: Array, high: Array) -> Array:
    """``exp(norm(x_t x_k))``, to 3e-7 of it.

    By a polynomial, which takes XLA on CPU a sixth of the time of `jnp.exp` or less.
    """
    slope = _slope(low, high)
    z = x * other * slope - (low * slope + 0.5)
    value = _POLYNOMIAL[0]
    for factor in _POLYNOMIAL[1:]:
        value = value * z + factor
    return value


def _exp_sums(x: Array, leaf: Leaf, stats: tuple) -> tuple[Array, Array]:
    bounds, tasks = jnp.asarray(stats[0]), x.shape[0]
    own = _own(bounds)
    if tasks > _WRITTEN_OUT:
        axes, own = tuple(range(1, x.ndim)), [by_task(each_T, x) for each_T in own]
        one = lambda of: _inter(x, of[0], by_task(of[1], x), by_task(of[2], x)).sum(axes)
        return _intra(x, *own, tasks).sum(axes), jax.lax.map(one, (x, *bounds))
    intra = lambda x: [_intra(x[t], *own[:, t], tasks) for t in range(tasks)]
    inter = lambda x: [_inter(x[t], x[k], *bounds[:, t, k]) for t, k in _pairs(tasks)]
    sums = _sums(lambda x: intra(x) + inter(x), [x[t] for t in range(tasks)])
    return jnp.stack(sums[:tasks]), _of_pairs(sums[tasks:], tasks)


def _sums(fn: Callable, x: Sequence[Array]) -> list[Array]:
    """The sums of the arrays that an elementwise ``fn(x)`` gives.

    XLA on CPU adds the entries of an array one after the other. Chunks that are added entry by entry, and only at last
    within themselves, take a fifth of the time.
    """
    chunk, count, rest = _chunks(x)
    add = lambda i, total: [a + b for a, b in zip(total, fn(chunk(i)), strict=True)]
    sums = [each.sum() for each in fn(rest)] if rest[0].size or not count else None
    if not count:
        return sums
    zeros = [jnp.zeros(_CHUNK)] * len(jax.eval_shape(fn, rest))
    total = [each.sum() for each in jax.lax.fori_loop(0, count, add, zeros)]
    return [a + b for a, b in zip(total, sums, strict=True)] if sums else total


def _entrywise(fn: Callable, x: Sequence[Array]) -> list[Array]:
    """``fn(x)`` of an elementwise function, by chunks: what its results have in common then stays in the caches."""
    chunk, count, rest = _chunks(x)

    def put(i: Array, out: list[Array]) -> list[Array]:
        return [jax.lax.dynamic_update_slice(a, b, (i * _CHUNK,)) for a, b in zip(out, fn(chunk(i)), strict=True)]

    out = fn(rest) if rest[0].size or not count else []
    if count:
        blank = [jnp.zeros(count * _CHUNK)] * len(jax.eval_shape(fn, rest))
        whole = jax.lax.fori_loop(0, count, put, blank)
        out = [jnp.concatenate(pair) for pair in zip(whole, out, strict=True)] if out else whole
    return [each.reshape(x[0].shape) for each in out]


def _chunks(x: Sequence[Array]) -> tuple[Callable, int, list[Array]]:
    """``(i -> chunk i of every array, number of chunks, the rest of every array)``; no chunks but on CPU."""
    flat = [each.reshape(-1) for each in x]
    count = flat[0].size // _CHUNK if jax.default_backend() == "cpu" else 0
    chunk = lambda i: [jax.lax.dynamic_slice(each, (i * _CHUNK,), (_CHUNK,)) for each in flat]
    return chunk, count, [each[count * _CHUNK :] for each in flat]


def _exp_means(sums: tuple[Array, Array], info: ModelInfo, stats: tuple) -> tuple[Array, Array]:
    bounds = jnp.asarray(stats[0])
    at_zero = _intra(0.0, *_own(bounds), len(sums[0])), _inter(0.0, 0.0, *bounds)
    return tuple((total + info.unseen * each) / info.size for total, each in zip(sums, at_zero, strict=True))


def _paper_claims(x: Array, stats: tuple) -> Array:
    bounds, (intra_mean_T, inter_mean_TxT) = jnp.asarray(stats[0]), stats[1]
    tasks, own, factor_TxT = x.shape[0], _own(bounds), 1 / jnp.asarray(inter_mean_TxT)
    if tasks > _WRITTEN_OUT:

        def add(total: Array, of: tuple) -> tuple[Array, None]:
            other, low, high, factor = of[0], *(by_task(each_T, x) for each_T in of[1:])
            return total + factor * _inter(x, other, low, high), None

        inter = jax.lax.scan(add, jnp.zeros_like(x), (x, *bounds, factor_TxT))[0]
        return _intra(x, *(by_task(each_T, x) for each_T in own), tasks) / by_task(intra_mean_T, x) * inter
    inter = [0.0] * tasks
    for t, k in _pairs(tasks):
        of_pair = factor_TxT[t, k] * _inter(x[t], x[k], *bounds[:, t, k])
        for each in {t, k}:
            inter[each] += of_pair
    return jnp.stack([_intra(x[t], *own[:, t], tasks) / intra_mean_T[t] * inter[t] for t in range(tasks)])
