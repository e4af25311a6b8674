"""CMA-ES: maximises a function of a few numbers in a box, from its values alone.

Small and of our own, in place of the NGOpt optimiser of the nevergrad package that PCB-Merging's code uses (which picks
some evolution strategy by dimension and budget): results differ from it, the box and the budget are the same.
"""

from collections.abc import Iterator

import numpy as np


def cma_es(start: np.ndarray, low: np.ndarray, high: np.ndarray, sigma: float, seed: int = 0) -> Iterator:
    """A generator that yields points ``[n]`` in the box and is sent their values; larger is better.

    The first point is `start`. Coordinates are those of the unit box; samples outside are put on its border, and
    learned from there. The strategy is that of Hansen's tutorial (arXiv 1604.00772) with its default constants:
    weighted recombination, cumulative step-size adaptation, rank-one and rank-mu updates of the covariance.

    Args:
      start, low, high: ``[n]``.
      sigma: initial step, as a fraction of the box.
      seed: of the samples.
    """
    n, width = len(start), high - low
    rng = np.random.default_rng(seed)
    weights, rates = _constants(n)
    mu, spread = len(weights), 1 / (weights**2).sum()
    size = 4 + int(3 * np.log(n))
    chi = np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))
    mean, covariance = (start - low) / width, np.eye(n)
    path_s, path_c, step = np.zeros(n), np.zeros(n), sigma
    yield start
    generation = 0
    while True:
        generation += 1
        lengths, axes = np.linalg.eigh(covariance)
        lengths = np.sqrt(np.maximum(lengths, 1e-12))
        points, values = [], []
        for _ in range(size):
            point = np.clip(mean + step * (axes @ (lengths * rng.standard_normal(n))), 0.0, 1.0)
            points.append(point)
            values.append((yield low + width * point))
        order = sorted(range(size), key=lambda i: -values[i])[:mu]
        moves = np.stack([(points[i] - mean) / step for i in order])
        move = weights @ moves
        mean = mean + step * move
        path_s = (1 - rates["s"]) * path_s + np.sqrt(rates["s"] * (2 - rates["s"]) * spread) * (
            axes @ ((axes.T @ move) / lengths)
        )
        norm = np.linalg.norm(path_s)
        going = norm / np.sqrt(1 - (1 - rates["s"]) ** (2 * generation)) < (1.4 + 2 / (n + 1)) * chi
        path_c = (1 - rates["c"]) * path_c + going * np.sqrt(rates["c"] * (2 - rates["c"]) * spread) * move
        left = 1 - rates["1"] - rates["mu"] + rates["1"] * (1 - going) * rates["c"] * (2 - rates["c"])
        covariance = (
            left * covariance + rates["1"] * np.outer(path_c, path_c) + rates["mu"] * (moves.T * weights) @ moves
        )
        step = min(step * np.exp(min(1.0, rates["s"] / rates["damp"] * (norm / chi - 1))), 1.0)


def _constants(n: int) -> tuple[np.ndarray, dict[str, float]]:
    """Recombination weights and learning rates for n dimensions."""
    mu = (4 + int(3 * np.log(n))) // 2
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
