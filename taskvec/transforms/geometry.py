"""Reductions that combine the tasks by the angles between them: on the sphere, or towards the pretrained weights.

All of them give ``sum_t c_t v_t`` with coefficients that follow from the Gram matrix ``v v^T [T, T]`` of a tensor alone
(or of a row, or a column). It adds up over blocks of rows, so that large tensors stream by.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from taskvec.transforms.base import Array, Leaf, Measure, Transform, check_choice
from taskvec.transforms.reduce import weighted_sum

SPACES = ("vectors", "weights")
AXES = ("tensor", -1, 0)
NEARLY_ONE = 1 - 1e-7  # cosines above differ from 1 by rounding only


def slerp(
    t: float = 0.5, space: str = "weights", axis: str | int = "tensor", linear_above: float = 0.9995
) -> Transform:
    """``(sin((1 - t) w) a + sin(t w) b) / sin(w)`` of two tensors a, b at the angle w (Shoemake, SIGGRAPH 1985).

    The lengths of a and b are not made equal. A tensor of zeros counts as orthogonal to the other.

    Args:
      t: 0 gives a, 1 gives b.
      space: ``weights`` of the two models, or their task ``vectors``.
      axis: ``tensor`` takes the angle between whole tensors, -1 one per row (along the last axis), 0 one per column.
      linear_above: straight interpolation where the cosine's magnitude is larger.
    """
    made = _slerp(space, axis, linear_above)
    return made._replace(constants=(t,))


@functools.cache
def _slerp(space: str, axis: str | int, linear_above: float) -> Transform:
    def coefficients(gram: Array, stats: tuple) -> Array:
        if gram.shape[0] != 2:
            raise ValueError(f"slerp interpolates between two models, got {gram.shape[0]}; mean_on_sphere takes more")
        t, cosine = stats[0], _cosines(gram)[0, 1]
        linear = jnp.abs(cosine) > linear_above
        angle = jnp.arccos(jnp.where(linear, 0.0, cosine))
        a = jnp.where(linear, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle))
        b = jnp.where(linear, t, jnp.sin(t * angle) / jnp.sin(angle))
        return jnp.stack([a, b])

    return _by_gram("slerp", coefficients, space, axis)


def mean_on_sphere(
    weights: tuple[float, ...] | None = None,
    iterations: int = 10,
    tolerance: float = 0.0,
    space: str = "weights",
    normalize: bool = True,
) -> Transform:
    """Weighted Karcher mean of the directions of a tensor, times the weighted mean of the lengths.

    The direction m starts at the normalised weighted mean of the unit vectors u_t and moves by
    ``exp_m(sum_t w_t log_m(u_t))``, w adding up to 1. It stays in the span of the tasks: only T coefficients iterate.
    Tensors of zeros have no direction, but count in the length. Where directions cancel, the iteration starts at the
    first task; without iterations the result is then the straight weighted mean.

    Args:
      weights: one per task; equal if not given.
      iterations: at most; 0 stops at the normalised mean, 1 is one step of barycentric interpolation.
      tolerance: ends the iteration when the step is shorter (an angle in radians).
      space: ``weights`` of the models, or their task ``vectors``.
      normalize: whether the weights are made to add up to 1.
    """
    made = _mean_on_sphere(weights is not None, iterations, tolerance, space, normalize)
    return made._replace(constants=tuple(weights or ()))


@functools.cache
def _mean_on_sphere(weighted: bool, iterations: int, tolerance: float, space: str, normalize: bool) -> Transform:
    if iterations < 0 or tolerance < 0:
        raise ValueError(f"iterations and tolerance must not be negative, got {iterations}, {tolerance}")

    def coefficients(gram: Array, stats: tuple) -> Array:
        tasks = gram.shape[0]
        if weighted and len(stats) != tasks:
            raise ValueError(f"{len(stats)} weights for {tasks} models: give one weight per model")
        weights = jnp.stack([jnp.asarray(w, jnp.float32) for w in stats]) if weighted else jnp.ones(tasks)
        weights = weights / weights.sum() if normalize or not weighted else weights
        return _karcher(gram, weights, iterations, tolerance)

    return _by_gram("mean_on_sphere", coefficients, space, "tensor")


def _karcher(gram: Array, weights: Array, iterations: int, tolerance: float) -> Array:
    """Coefficients ``[T]`` of the Karcher mean, from the Gram matrix."""
    lengths = jnp.sqrt(jnp.diagonal(gram))
    cosines = _cosines(gram)
    share = jnp.where(lengths > 0, weights, 0.0)
    share = share / jnp.where(share.sum() != 0, share.sum(), 1.0)

    def length(c: Array) -> Array:
        return jnp.sqrt(jnp.maximum(_dot(c, _times(cosines, c)), 0.0))

    cancelled = length(share) < 1e-6
    first = jnp.eye(lengths.shape[0])[jnp.argmax(lengths > 0)]
    start = jnp.where(cancelled, first, share / jnp.where(cancelled, 1.0, length(share)))

    def step(_: int, c: Array) -> Array:
        dots = jnp.clip(_times(cosines, c), -1.0, 1.0)
        near = jnp.abs(dots) > NEARLY_ONE  # logarithms at the point itself and opposite to it
        angle = jnp.arccos(jnp.where(near, 0.0, dots))
        pull = share * jnp.where(near, jnp.where(dots > 0, 1.0, 0.0), angle / jnp.sin(angle))
        tangent = pull - _dot(pull, dots) * c
        size = length(tangent)
        moved = jnp.cos(size) * c + jnp.sinc(size / jnp.pi) * tangent
        moved = moved / jnp.where(length(moved) > 0, length(moved), 1.0)
        return jnp.where(size < tolerance, c, moved)

    direction = jax.lax.fori_loop(0, iterations, step, start) if iterations else start
    on_sphere = _dot(weights, lengths) * direction / jnp.where(lengths > 0, lengths, 1.0)
    return jnp.where(cancelled, weights, on_sphere) if not iterations else on_sphere


@functools.cache
def model_stock(axis: str | int = "tensor", clip: bool = False, guards: str = "none") -> Transform:
    """``t mean_k(x_k)`` with ``t = T cos / (1 + (T - 1) cos)``, cos the mean cosine over pairs of task vectors.

    The nearest point to the centre of the thin shell on which fine-tunings of *one* task lie. Vectors of different
    tasks are nearly orthogonal, and t nearly 0. Where the formula has its pole, t = 0. Source: Model Stock, arXiv
    2403.19522, section 4.

    Args:
      axis: ``tensor`` (the paper), or -1 for an own cosine and t in every row (``filter_wise``).
      clip: whether t is kept in [0, 1]; negative cosines extrapolate otherwise.
      guards: ``none``, or ``mergekit``, which divides by at least 1e-6 in the cosine; this takes small tensors to the
        pretrained weights.
    """
    check_choice("guards", guards, ("none", "mergekit"))

    def coefficients(gram: Array, stats: tuple) -> Array:
        tasks = gram.shape[0]
        cosines = _cosines(gram, floor=1e-6 if guards == "mergekit" else 0.0)
        pairs = [cosines[i, j] for i in range(tasks) for j in range(i)]
        cosine = sum(pairs) / len(pairs) if pairs else jnp.ones(gram.shape[2:])
        below = 1 + (tasks - 1) * cosine
        pole = jnp.abs(below) < 1e-6
        t = jnp.where(pole, 0.0, tasks * cosine / jnp.where(pole, 1.0, below))
        t = jnp.clip(t, 0.0, 1.0) if clip else t
        return jnp.stack([t / tasks] * tasks)

    return _by_gram("model_stock", coefficients, "vectors", axis)


def _by_gram(name: str, coefficients: Callable, space: str, axis: str | int) -> Transform:
    """``sum_t c_t v_t``, v weights or vectors, ``c = coefficients(gram, stats)``, a number or a row each."""
    check_choice("space", space, SPACES)
    check_choice("axis", axis, AXES)

    # By itself: compiled once for all tensors, whatever their sizes.
    compiled = jax.jit(coefficients)

    def of_leaf(x: Array, leaf: Leaf, stats: tuple) -> Array:
        v = x + leaf.theta0.astype(jnp.float32) if space == "weights" else x
        return _gram(v, axis if x.ndim > 1 else "tensor")

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        c = compiled(of_leaf(x, leaf, stats), stats) if axis == -1 else stats[-1]
        merged = weighted_sum(c, x)
        return merged + (c.sum(0) - 1) * leaf.theta0.astype(jnp.float32) if space == "weights" else merged

    finish = lambda gram, info, stats: compiled(gram, stats)
    return Transform(name, apply, () if axis == -1 else (Measure(of_leaf, finish, scope="tensor", apart=True),))


def _gram(v: Array, axis: str | int) -> Array:
    """Inner products: ``[T, T]``, ``[T, T, ..., 1]`` of every row (-1), ``[T, T, 1, ...]`` of every column (0)."""
    if axis == "tensor":
        flat = v.reshape(v.shape[0], -1)
        # Not `flat @ flat.T`: on a CPU the transposed copy takes longer than the products.
        return jax.lax.dot_general(flat, flat, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
    if axis == -1:
        return jnp.einsum("t...i,s...i->ts...", v, v, precision="highest")[..., None]
    return jnp.einsum("ti...,si...->ts...", v, v, precision="highest")[:, :, None]


def _cosines(gram: Array, floor: float = 0.0) -> Array:
    """Cosines ``[T, T, ...]``, 0 for zero vectors; `floor` is the smallest product of lengths to divide by."""
    lengths = jnp.sqrt(jnp.stack([gram[t, t] for t in range(gram.shape[0])]))
    product = jnp.maximum(lengths[:, None] * lengths[None], floor)
    return jnp.clip(gram / jnp.where(product > 0, product, 1.0), -1.0, 1.0)


def _times(matrix: Array, vector: Array) -> Array:
    return jnp.matmul(matrix, vector, precision="highest")


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, precision="highest")
