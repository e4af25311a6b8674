"""CMA-ES: maximises a function of a few numbers in a box, from its values alone.

Small and of our own, in place of the NGOpt optimiser of the nevergrad package that the code of PCB-Merging and LoraHub
uses (which picks some evolution strategy by dimension and budget): results differ from it, the box and the budget are
the same. The strategy is that of Hansen's tutorial (arXiv 1604.00772) with its default constants: weighted
recombination, cumulative step-size adaptation, rank-one and rank-mu updates of the covariance.

`begin`, `ask` and `tell` are pure functions of arrays, for programs that hold the whole search; `cma_es` is a search on
the host, one point at a time.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Strategy(NamedTuple):
    """Where a search in the unit box stands, in n dimensions.

    Attributes:
      mean: ``[n]``.
      covariance: ``[n, n]``.
      step: scalar.
      path_s, path_c: ``[n]``, the evolution paths of step and covariance.
      generation: int, generations told.
    """

    mean: Array
    covariance: Array
    step: Array
    path_s: Array
    path_c: Array
    generation: Array


def population(n: int) -> int:
    """Points of a generation in n dimensions."""
    return 4 + int(3 * np.log(n))


def begin(start: Array, sigma: float) -> Strategy:
    """A search from `start` ``[n]`` in the unit box, with initial step `sigma`."""
    start = jnp.asarray(start, jnp.float32)
    none = jnp.zeros_like(start)
    return Strategy(start, jnp.eye(len(start)), jnp.float32(sigma), none, none, jnp.int32(0))


def _axes(covariance: Array) -> tuple[Array, Array]:
    variances, axes = jnp.linalg.eigh(covariance)
    return jnp.sqrt(jnp.maximum(variances, 1e-12)), axes


def ask(state: Strategy, key: Array) -> Array:
    """The points of a generation, ``[population(n), n]``; samples outside the box are put on its border."""
    n = len(state.mean)
    lengths, axes = _axes(state.covariance)
    moves = (jax.random.normal(key, (population(n), n)) * lengths[None]) @ axes.T
    return jnp.clip(state.mean[None] + state.step * moves, 0.0, 1.0)


def tell(state: Strategy, points: Array, values: Array) -> Strategy:
    """The search after a generation: larger values are better, NaN is worst."""
    n = len(state.mean)
    weights, rates = _constants(n)
    spread, chi = 1 / (weights**2).sum(), np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))
    lengths, axes = _axes(state.covariance)
    order = jnp.argsort(-values)[: len(weights)]
    moves = (points[order] - state.mean[None]) / state.step
    move = jnp.asarray(weights, moves.dtype) @ moves
    generation = state.generation + 1
    kept_s, kept_c = 1 - rates["s"], 1 - rates["c"]
    path_s = kept_s * state.path_s + np.sqrt(rates["s"] * (2 - rates["s"]) * spread) * (
        axes @ ((axes.T @ move) / lengths)
    )
    norm = jnp.linalg.norm(path_s)
    going = norm / jnp.sqrt(1 - kept_s ** (2.0 * generation)) < (1.4 + 2 / (n + 1)) * chi
    path_c = kept_c * state.path_c + going * np.sqrt(rates["c"] * (2 - rates["c"]) * spread) * move
    left = 1 - rates["1"] - rates["mu"] + rates["1"] * (1 - going) * rates["c"] * (2 - rates["c"])
    covariance = (
        left * state.covariance
        + rates["1"] * jnp.outer(path_c, path_c)
        + rates["mu"] * (moves.T * jnp.asarray(weights, moves.dtype)[None]) @ moves
    )
    grown = state.step * jnp.exp(jnp.minimum(1.0, rates["s"] / rates["damp"] * (norm / chi - 1)))
    mean = state.mean + state.step * move
    return Strategy(mean, covariance, jnp.minimum(grown, 1.0), path_s, path_c, generation)


@functools.lru_cache(1)
def _compiled():
    return jax.jit(ask), jax.jit(tell)


def cma_es(start: np.ndarray, low: np.ndarray, high: np.ndarray, sigma: float, seed: int = 0) -> Iterator:
    """A generator that yields points ``[n]`` in the box and is sent their values; larger is better.

    The first point is `start`, of which nothing is learned. Coordinates are those of the unit box.

    Args:
      start, low, high: ``[n]``.
      sigma: initial step, as a fraction of the box.
      seed: of the samples.
    """
    width, key = high - low, jax.random.key(seed)
    next_points, learn = _compiled()
    state = begin((start - low) / width, sigma)
    yield start
    while True:
        points = next_points(state, jax.random.fold_in(key, state.generation))
        values = []
        for point in np.asarray(points, np.float64):
            values.append((yield np.clip(low + width * point, low, high)))
        state = learn(state, points, jnp.asarray(values, jnp.float32))


def _constants(n: int) -> tuple[np.ndarray, dict[str, float]]:
    """Recombination weights and learning rates for n dimensions."""
    mu = population(n) // 2
    weights = np.log(mu + 0.5) - np.log(np.arange(1, mu + 1))
    weights = weights / weights.sum()
    spread = 1 / (weights**2).sum()
    rates = {
        "s": (spread + 2) / (n + spread + 5),
        "c": (4 + spread / n) / (n + 4 + 2 * spread / n),
        "1": 2 / ((n + 1.3) ** 2 + spread),
    }
    rates["mu"] = min(1 - rates["1"], 2 * (spread - 2 + 1 / spread) / ((n + 2) ** 2 + spread))
    rates["damp"] = 1 + 2 * max(0.0, np.sqrt((spread - 1) / (n + 1)) - 1) + rates["s"]
    return weights, rates
