"""Transforms that scale a vector: by a constant, by depth, back to a length that it had."""

import functools

import jax.numpy as jnp

from taskvec.transforms.base import Array, Leaf, Measure, ModelInfo, Transform, check_choice
from taskvec.transforms.reduce import weighted_sum
from taskvec.transforms.sparsify import SCOPES, by_task


def scale(factor: float) -> Transform:
    """``factor * x``."""
    return Transform("scale", _scaled, constants=(factor,))


def _scaled(x: Array, leaf: Leaf, stats: tuple) -> Array:
    return stats[0] * x


def scale_by_depth(beta: float, alpha: float | str = "norm_ratio") -> Transform:
    """Scales block l of L by ``alpha + beta l / (L - 1)`` and everything outside the blocks by ``alpha``.

    Source: LiNeS, arXiv 2410.17146, equation 3: shallow layers, which are shared, move little.

    Args:
      beta: slope; the coefficient that multi-task merging searches.
      alpha: value at the first block. ``norm_ratio`` is the paper's choice for multi-task merging,
        ``(||sum_t tau_t||_1 / ||x||_1) / T``, which is 1/T for task arithmetic; it needs a vector whose task axis is
        already reduced. For editing a single task vector take beta = 1 - alpha.

    Raises:
      ValueError: the parameter names show no block index, so that there is no depth to scale by.
    """
    if isinstance(alpha, str) and alpha != "norm_ratio":
        raise ValueError(f"alpha must be a number or 'norm_ratio', got {alpha!r}")
    if alpha == "norm_ratio":
        return Transform("scale_by_depth", _scaled_by_depth, (_NORM_RATIO,), constants=(beta,))
    return Transform("scale_by_depth", _scaled_by_depth, constants=(beta, alpha))


def _scaled_by_depth(x: Array, leaf: Leaf, stats: tuple) -> Array:
    beta, alpha = stats
    if leaf.info.num_blocks == 0:
        raise ValueError("scale_by_depth found no block index in the parameter names (blocks/0, layer.0, h.0, ...)")
    relative = jnp.maximum(leaf.depth, 0) / max(leaf.info.num_blocks - 1, 1)
    return x * (alpha + beta * jnp.where(leaf.depth < 0, 0.0, relative))


def _l1_norms(x: Array, leaf: Leaf, stats: tuple) -> Array:
    if x.shape != leaf.theta0.shape:
        raise ValueError("alpha='norm_ratio' scales a merged vector: put sum_tasks() or another reduction before it")
    return jnp.stack([jnp.abs(_plain_sum(leaf)).sum(), jnp.abs(x).sum()])


def _ratio(norms: Array, info: ModelInfo, stats: tuple) -> Array:
    return jnp.where(norms[1] > 0, norms[0] / jnp.where(norms[1] > 0, norms[1], 1.0), 1.0) / info.num_tasks


_NORM_RATIO = Measure(_l1_norms, _ratio)


@functools.cache
def restore_norm(norm: str = "l1", scope: str = "tensor") -> Transform:
    """Scales vectors back to the length they had before: what trimming and dropping shorten.

    Task vectors get the norm of the tau_t they were made of; a merged vector gets that of ``sum_t tau_t``.

    Args:
      norm: ``l1`` or ``l2``.
      scope: ``tensor`` restores every tensor, ``model`` the whole vector by one factor.
    """
    check_choice("norm", norm, ("l1", "l2"))
    check_choice("scope", scope, SCOPES)

    def sizes(x: Array, leaf: Leaf, stats: tuple) -> Array:
        before, after = (leaf.tau, x) if x.shape == leaf.tau.shape else (_plain_sum(leaf)[None], x[None])
        size = lambda rows: jnp.stack([(jnp.abs(r) if norm == "l1" else r * r).sum() for r in rows])
        return jnp.stack([size(before), size(after)])

    def factor(total: Array, info: ModelInfo, stats: tuple) -> Array:
        ratio = jnp.where(total[1] > 0, total[0] / jnp.where(total[1] > 0, total[1], 1.0), 1.0)
        return ratio if norm == "l1" else jnp.sqrt(ratio)

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        return x * (by_task(stats[0], x) if x.shape == leaf.tau.shape else stats[0][0])

    return Transform("restore_norm", apply, (Measure(sizes, factor, scope=scope),))


def _plain_sum(leaf: Leaf) -> Array:
    return weighted_sum([1.0] * leaf.tau.shape[0], leaf.tau)
