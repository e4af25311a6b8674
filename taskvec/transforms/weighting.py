"""Weights that are worked out, not given: from the norms of the task vectors, from depth, for chosen experts."""

import functools
from collections.abc import Callable

import jax.numpy as jnp

from taskvec.transforms.base import Array, Leaf, Measure, ModelInfo, Transform, check_choice
from taskvec.transforms.reduce import weighted_sum
from taskvec.transforms.sparsify import SCOPES

OUTSIDE = ("language", "task", "mean")


@functools.cache
def norm_weighting(power: float, total: float = 1.0, of: str = "vectors", scope: str = "model") -> Transform:
    """Weighs every task by a power of its norm: ``x_t <- total n_t^power / sum_k n_k^power x_t``; sum the tasks next.

    A power of 2 is MetaGPT (arXiv 2406.11385), -1 the inverse norms of NAN (arXiv 2505.16148), 0 the mean. A task
    vector of zeros gets nothing and takes nothing from the others (unless the power is 0).

    Args:
      power: exponent; larger vectors get more if it is positive.
      total: what the weights add up to.
      of: ``vectors`` takes the norms of the vectors as earlier transforms left them, ``weights`` those of the
        fine-tuned weights.
      scope: ``model``, or ``tensor`` for weights of every tensor of its own.
    """
    check_choice("of", of, ("vectors", "weights"))
    check_choice("scope", scope, SCOPES)

    def squares(x: Array, leaf: Leaf, stats: tuple) -> Array:
        if x.shape != leaf.tau.shape:
            raise ValueError("norm_weighting weighs task vectors: put it before sum_tasks() or another reduction")
        rows = [leaf.theta0.astype(jnp.float32) + tau for tau in leaf.tau] if of == "weights" else x
        return jnp.stack([(row * row).sum() for row in rows])

    def weights(found: Array, info: ModelInfo, stats: tuple) -> Array:
        if power == 0:
            return jnp.full(found.shape, total / found.shape[0])
        there = found > 0
        largest = jnp.max(found)
        relative = jnp.where(there, found, largest) / jnp.where(largest > 0, largest, 1.0)
        powers = jnp.where(there, relative ** (power / 2), 0.0)
        return total * powers / jnp.maximum(powers.sum(), jnp.finfo(jnp.float32).tiny)

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        return jnp.stack([stats[0][t] * x[t] for t in range(x.shape[0])])

    return Transform("norm_weighting", apply, (Measure(squares, weights, scope=scope),))


@functools.cache
def mean_of(tasks: tuple[int, ...] = ()) -> Transform:
    """Mean over some of the tasks, by their indices (0 to T - 1); over all of them if `tasks` is empty."""
    if len(set(tasks)) < len(tasks) or any(t < 0 for t in tasks):
        raise ValueError(f"tasks must be different indices from 0 on, got {tasks}")

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        chosen = tasks or range(x.shape[0])
        if max(chosen) >= x.shape[0]:
            raise ValueError(f"there are tasks 0 to {x.shape[0] - 1}, got {max(chosen)}")
        return sum(x[t] for t in chosen) / len(chosen)

    return Transform("mean_of", apply)


def swap_layers(
    bottom: int | float, top: int | float, transition: int | float, weight: float = 0.5, outside: str = "language"
) -> Transform:
    """Puts two experts together by blocks: ``x = w_l x_1 + (1 - w_l) x_0``.

    x_0 is the expert of a task and x_1 that of a language. w is 1 in the first `bottom` and the last `top` blocks,
    `weight` in the `transition` blocks next to either, 0 between. Source: Layer Swapping, arXiv 2410.01335.

    Args:
      bottom, top, transition: numbers of blocks if integers; fractions of the depth if floats below 1 (at least one
        block each, 0.0 for none). Transitions end where they meet.
      weight: of the language expert in the transitions.
      outside: what embeddings, final norm and head are: ``language``, ``task`` or ``mean``.
    """
    for name, number in (("bottom", bottom), ("top", top), ("transition", transition)):
        if number < 0 or (isinstance(number, float) and number >= 1):
            raise ValueError(f"{name} must be a number of blocks or a fraction in [0, 1), got {number!r}")
    check_choice("outside", outside, OUTSIDE)
    apply = _swapped(bottom, top, transition, OUTSIDE.index(outside), type(bottom), type(top), type(transition))
    return Transform("swap_layers", apply, constants=(weight,))


@functools.cache
def _swapped(bottom, top, transition, outside: int, *kinds: type) -> Callable:
    """One function for the same zones, so that a search over the weight compiles once (1 and 1.0 are told apart)."""

    def blocks(number: int | float, of: int) -> int:
        return number if isinstance(number, int) else max(1, round(number * of)) if number > 0 else 0

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        last = leaf.info.num_blocks
        if last == 0:
            raise ValueError("swap_layers found no block index in the parameter names (blocks/0, layer.0, h.0, ...)")
        if x.ndim != leaf.tau.ndim or x.shape[0] != 2:
            raise ValueError("swap_layers takes two task vectors: the expert of a task, then that of a language")
        low, high = blocks(bottom, last), last - blocks(top, last)
        if low >= high:
            raise ValueError(f"{low} bottom and {last - high} top blocks of {last} leave nothing of the task's expert")
        zone, depth = blocks(transition, last), leaf.depth
        between = (depth < low + zone) | (depth >= high - zone)
        w = jnp.where((depth < low) | (depth >= high), 1.0, jnp.where(between, stats[0], 0.0))
        w = jnp.where(depth < 0, (1.0, 0.0, 0.5)[outside], w)
        return weighted_sum(jnp.stack([1 - w, w]), x)

    return apply
