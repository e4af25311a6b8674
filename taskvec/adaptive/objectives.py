"""Objectives: from outputs to one number a task, the mean over its rows. Sum them for the loss of a step.

Logits are ``[T, B, C]`` (or ``[B, C]`` of one task, for a scalar). Classes that a task lacks have logits of -1e9 or
-inf and count for nothing, in value and in gradient. ``weight_TxB`` marks rows: 0 for padding, 1 else.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

_IMPOSSIBLE = -1e4  # log-probability below which a probability is exactly zero in any float type


def _mean_rows(values_TxB: Array, weight_TxB: Array | None) -> Array:
    if weight_TxB is None:
        return values_TxB.mean(-1)
    return (weight_TxB * values_TxB).sum(-1) / jnp.maximum(weight_TxB.sum(-1), 1)


def entropy(logits_TxBxC: Array, weight_TxB: Array | None = None) -> Array:
    """Mean Shannon entropy of the predictions, ``-sum_c p_c log p_c`` in nats: ``[T, B, C] -> [T]``.

    AdaMerging's objective (arXiv 2310.02575, eq. 5). Computed from log-softmax; FusionBench adds 1e-8 inside the
    logarithm instead.
    """
    logp = jax.nn.log_softmax(logits_TxBxC.astype(jnp.promote_types(logits_TxBxC.dtype, jnp.float32)))
    # exp(0) * 0: replaced before the product, so that 0 * -inf turns up neither in it nor in its gradient.
    logp = jnp.where(logp > _IMPOSSIBLE, logp, 0.0)
    return _mean_rows(-(jnp.exp(logp) * logp).sum(-1), weight_TxB)


def cross_entropy(logits_TxBxC: Array, labels_TxB: Array, weight_TxB: Array | None = None) -> Array:
    """Mean of ``-log p[label]`` in nats: ``[T, B, C], [T, B] -> [T]``."""
    logp = jax.nn.log_softmax(logits_TxBxC.astype(jnp.promote_types(logits_TxBxC.dtype, jnp.float32)))
    return _mean_rows(-jnp.take_along_axis(logp, labels_TxB[..., None], axis=-1)[..., 0], weight_TxB)


def l1(features_TxBxd: Array, target_TxBxd: Array, weight_TxB: Array | None = None) -> Array:
    """Mean absolute difference over rows and dimensions: ``[T, B, d] -> [T]`` (Representation Surgery, 2402.02705)."""
    return _mean_rows(jnp.abs(features_TxBxd - target_TxBxd).mean(-1), weight_TxB)
