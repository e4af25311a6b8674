"""Reductions that ask how many tasks changed a weight, and whose change is the largest."""

import functools

import jax
import jax.numpy as jnp

from taskvec.transforms.base import Array, Leaf, Measure, ModelInfo, Transform, check_choice
from taskvec.transforms.reduce import UNROLL, check_weights, weighted_sum


@functools.cache
def merge_overlap(threshold: float, r: float = 0.0, alpha: float = 0.0, scope: str = "model") -> Transform:
    """Averages what several tasks changed, and keeps (or enlarges) what one task alone changed.

    A task changed an entry if ``|x_t| > threshold``. Entries that several tasks changed get the mean over those tasks;
    an entry that task t alone changed gets ``(1 + r min(rho_t, alpha)) x_t`` with rho_t = shared_t / unique_t, the
    numbers of entries that t changed together with others and alone. Source: RAM and RAM+, arXiv 2601.13572.

    Args:
      threshold: smaller changes count as none.
      r: strength of the enlargement; 0 is RAM.
      alpha: bound of the ratio.
      scope: ``model`` counts over the model (authors), ``tensor`` over each tensor (MergeKit's ``ramplus_tl``).
    """
    if threshold < 0 or r < 0 or alpha < 0:
        raise ValueError(f"threshold, r and alpha must not be negative, got {threshold}, {r}, {alpha}")
    check_choice("scope", scope, ("model", "tensor"))

    def counted(x: Array) -> tuple[Array, Array]:
        """Who changed each entry ``[T, ...]``, and how many did ``[...]``."""
        changed = jnp.abs(x) > threshold
        return changed, weighted_sum([1] * x.shape[0], changed.astype(jnp.int32))

    def of_leaf(x: Array, leaf: Leaf, stats: tuple) -> Array:
        changed, count = counted(x)
        axes = tuple(range(1, x.ndim))
        number = lambda mask: mask.sum(axes, dtype=jnp.int32).astype(jnp.float32)
        return jnp.stack([number(changed & (count > 1)), number(changed & (count == 1))])

    def factors(numbers: Array, info: ModelInfo, stats: tuple) -> Array:
        shared, unique = numbers
        return 1 + r * jnp.minimum(shared / jnp.maximum(unique, 1.0), alpha)

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        changed, count = counted(x)
        kept, ones = jnp.where(changed, x, 0.0), [1.0] * x.shape[0]
        mean = weighted_sum(ones, kept) / jnp.maximum(count, 1)
        return jnp.where(count == 1, weighted_sum(stats[0], kept), mean) if r else mean

    return Transform("merge_overlap", apply, (Measure(of_leaf, factors, scope=scope),) if r else ())


@functools.cache
def largest_change() -> Transform:
    """The entry of largest magnitude, the latest task's in a tie (MagMax, arXiv 2407.06322)."""

    def larger(best: Array, x: Array) -> Array:
        return jnp.where(jnp.abs(x) >= jnp.abs(best), x, best)

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        if x.shape[0] <= UNROLL:
            return functools.reduce(larger, [x[t] for t in range(x.shape[0])])
        return jax.lax.scan(lambda best, x_t: (larger(best, x_t), None), jnp.zeros_like(x[0]), x)[0]

    return Transform("largest_change", apply)


def weighted_disjoint_mean(weights: tuple[float, ...]) -> Transform:
    """``sum_t x_t / sum_t w_t [x_t != 0]`` of vectors that are multiplied by w_t already, 0 where there is none.

    The reduction of DELLA and of MergeKit (``normalize: true``). With equal weights it is `disjoint_mean` times 1 / w.
    Weights of both signs can cancel in the divisor; where they do so exactly the sum is left as it is.
    """

    return Transform("weighted_disjoint_mean", _divided, constants=tuple(weights))


def _divided(x: Array, leaf: Leaf, stats: tuple) -> Array:
    check_weights(stats, x)
    divisor = weighted_sum(stats if x.shape[0] <= UNROLL else jnp.stack(stats), (x != 0).astype(x.dtype))
    return weighted_sum([1.0] * x.shape[0], x) / jnp.where(divisor == 0, 1.0, divisor)
