"""Objectives: from outputs to one number a task, the mean over its rows. Sum them for the loss of a step.

Logits are ``[T, B, C]`` (or ``[B, C]`` of one task, for a scalar). Classes that a task lacks have logits of -1e9 or
-inf and count for nothing, in value and in gradient. ``weight_TxB`` marks rows: 0 for padding, 1 else; a mean over no
row at all is 0, with gradient 0. Everything is computed in float32 at least.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

_IMPOSSIBLE = -1e4  # log-probability below which a probability is exactly zero in any float type


def _mean_rows(values_TxB: Array, weight_TxB: Array | None) -> Array:
    if weight_TxB is None:
        return values_TxB.mean(-1)
    return (weight_TxB * values_TxB).sum(-1) / jnp.maximum(weight_TxB.sum(-1), 1)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def log_probabilities(logits_TxBxC: Array, temperature: float = 1.0) -> Array:
    """``log softmax(logits / temperature)``, in float32 at least."""
    return jax.nn.log_softmax(_wide(logits_TxBxC) / temperature)


def _finite(logp: Array) -> Array:
    """Log-probabilities with 0 for impossible classes: 0 * -inf turns up neither in a product nor in its gradient."""
    return jnp.where(logp > _IMPOSSIBLE, logp, 0.0)


def entropy(logits_TxBxC: Array, weight_TxB: Array | None = None, eps: float = 0.0) -> Array:
    """Mean Shannon entropy of the predictions, ``-sum_c p_c log(p_c + eps)`` in nats: ``[T, B, C] -> [T]``.

    AdaMerging's objective (arXiv 2310.02575, eq. 5), without `eps` computed from log-softmax. FusionBench has
    ``eps=1e-8``, which takes the gradient from classes less probable than that.
    """
    logp = log_probabilities(logits_TxBxC)
    p = jnp.exp(logp)
    return _mean_rows(-(p * (jnp.log(p + eps) if eps else _finite(logp))).sum(-1), weight_TxB)


def cross_entropy(
    logits_TxBxC: Array, labels_TxB: Array, weight_TxB: Array | None = None, smoothing: float = 0.0
) -> Array:
    """Mean of ``-log p[label]`` in nats: ``[T, B, C], [T, B] -> [T]``.

    With `smoothing` e it is ``(1 - e) (-log p[label]) + e mean_c(-log p_c)`` (arXiv 1512.00567, section 7).
    """
    logp = log_probabilities(logits_TxBxC)
    losses_TxB = -jnp.take_along_axis(logp, labels_TxB[..., None], axis=-1)[..., 0]
    if smoothing:
        uniform_TxB = -_finite(logp).sum(-1) / (logp > _IMPOSSIBLE).sum(-1)
        losses_TxB = (1 - smoothing) * losses_TxB + smoothing * uniform_TxB
    return _mean_rows(losses_TxB, weight_TxB)


def pseudo_label(logits_TxBxC: Array, teacher_TxBxC: Array, weight_TxB: Array | None = None) -> Array:
    """Cross-entropy to the teacher's most probable class (Model Tinting, arXiv 2412.19098)."""
    return cross_entropy(logits_TxBxC, teacher_TxBxC.argmax(-1), weight_TxB)


def confident_pseudo_label(logits_TxBxC: Array, teacher_TxBxC: Array) -> Array:
    """Cross-entropy to the teacher's class on rows where it can be trusted: the mean over those, 0 if there are none.

    Kept are rows on which both agree, or where the teacher's highest probability is at least the student's (SyMerge,
    arXiv 2412.19098). The released code gives NaN where a batch keeps no row.
    """
    mine, theirs = (jnp.exp(jax.lax.stop_gradient(log_probabilities(x))) for x in (logits_TxBxC, teacher_TxBxC))
    keep = (mine.argmax(-1) == theirs.argmax(-1)) | (theirs.max(-1) >= mine.max(-1))
    return pseudo_label(logits_TxBxC, teacher_TxBxC, keep.astype(mine.dtype))


def certain_target(logits_TxBxC: Array, target_TxBxC: Array, threshold: float = 0.99) -> Array:
    """Cross-entropy to target probabilities on rows whose largest exceeds the threshold; 0 if there are none.

    ``sum_b w_b CE_b / sum_b w_b``, ``w_b = [max_c q_bc > threshold]`` (FixMatch; aTLAS at test time, 2407.02880).
    """
    target = jax.lax.stop_gradient(target_TxBxC)
    losses = -(target * _finite(log_probabilities(logits_TxBxC))).sum(-1)
    return _mean_rows(losses, (target.max(-1) > threshold).astype(losses.dtype))


def kl(logits_TxBxC: Array, teacher_TxBxC: Array, temperature: float = 1.0, weight_TxB: Array | None = None) -> Array:
    """``KL(teacher || student) = sum_c q_c (log q_c - log p_c)`` of softened predictions, without the factor T^2."""
    logp, logq = (log_probabilities(x, temperature) for x in (logits_TxBxC, teacher_TxBxC))
    return _mean_rows((jnp.exp(logq) * (_finite(logq) - _finite(logp))).sum(-1), weight_TxB)


def jensen_shannon(logits_TxBxC: Array, teacher_TxBxC: Array, weight_TxB: Array | None = None) -> Array:
    """``KL(p || m) / 2 + KL(q || m) / 2`` with ``m = (p + q) / 2``, at most log 2 (DivMerge, arXiv 2509.02108).

    The mean is one of probabilities; see `mean_logit_divergence` for SAMerging's released code.
    """
    logp, logq = (log_probabilities(x) for x in (logits_TxBxC, teacher_TxBxC))
    # Bounded: the gradient of log(exp(-inf) + exp(-inf)) is NaN.
    logm = jnp.logaddexp(*(jnp.maximum(x, 2 * _IMPOSSIBLE) for x in (logp, logq))) - jnp.log(2.0)
    p, q = jnp.exp(logp), jnp.exp(logq)
    both = p * (_finite(logp) - _finite(logm)) + q * (_finite(logq) - _finite(logm))
    return _mean_rows(0.5 * both.sum(-1), weight_TxB)


def mean_logit_divergence(logits_TxBxC: Array, teacher_TxBxC: Array, weight_TxB: Array | None = None) -> Array:
    """``KL(p || m) + KL(q || m)`` with m the softmax of averaged logits: SAMerging's released 'jsd' (2512.21288).

    No Jensen-Shannon divergence: m is the normalised geometric mean of p and q, there is no factor of a half, and no
    bound.
    """
    logp, logq = (log_probabilities(x) for x in (logits_TxBxC, teacher_TxBxC))
    logm = log_probabilities((_finite(logp) + _finite(logq)) / 2 + jnp.where(logp > _IMPOSSIBLE, 0.0, 2 * _IMPOSSIBLE))
    both = jnp.exp(logp) * (_finite(logp) - _finite(logm)) + jnp.exp(logq) * (_finite(logq) - _finite(logm))
    return _mean_rows(both.sum(-1), weight_TxB)


def l1(features_TxBxd: Array, target_TxBxd: Array, weight_TxB: Array | None = None) -> Array:
    """Mean absolute difference over rows and dimensions: ``[T, B, d] -> [T]`` (Representation Surgery, 2402.02705)."""
    return _mean_rows(jnp.abs(_wide(features_TxBxd) - _wide(target_TxBxd)).mean(-1), weight_TxB)


def mse(features_TxBxd: Array, target_TxBxd: Array, weight_TxB: Array | None = None) -> Array:
    """Mean squared difference over rows and dimensions: ``[T, B, d] -> [T]``."""
    return _mean_rows(jnp.square(_wide(features_TxBxd) - _wide(target_TxBxd)).mean(-1), weight_TxB)


def info_nce(features_TxBxd: Array, other_TxBxd: Array, temperature: float = 0.05) -> Array:
    """Contrastive loss of pairs, the other rows of a task's batch being the negatives: ``[T, B, d] twice -> [T]``.

    ``-log softmax_j(cos(z_i, y_j) / temperature)[i]``, mean over i (arXiv 1807.03748, one direction).
    """
    unit = lambda z: z * jax.lax.rsqrt(jnp.maximum(jnp.square(z).sum(-1, keepdims=True), 1e-12))
    cosines = jnp.einsum("...id,...jd->...ij", unit(_wide(features_TxBxd)), unit(_wide(other_TxBxd)))
    labels = jnp.broadcast_to(jnp.arange(cosines.shape[-1]), cosines.shape[:-1])
    return cross_entropy(cosines / temperature, labels)
