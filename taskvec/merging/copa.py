"""CoPA-Merging (RobustMerge): merge the factors of LoRA adapters, with scalings that make up for what is pruned."""

import functools

import jax.numpy as jnp

from taskvec.merging.registry import Card, method
from taskvec.transforms.base import Array, Leaf, Transform, check_fraction
from taskvec.transforms.matrices import input_first
from taskvec.transforms.order import kth_magnitude
from taskvec.transforms.reduce import mean
from taskvec.transforms.solve import by_output


def merge_factors(a_TxRxI: Array, b_TxOxR: Array, density: float, quantile: float, fuse: float) -> tuple[Array, Array]:
    """One adapter ``a [r, in], b [out, r]`` of T; see `copa`."""

    def pruned(x: Array) -> Array:
        at = max(int(x.size * (1 - density)), 1)
        return jnp.where(jnp.abs(x) >= kth_magnitude(x, at), x, 0.0)

    kept_a, kept_b = [pruned(a) for a in a_TxRxI], [pruned(b) for b in b_TxOxR]
    scalings = []
    for a, kept in zip(a_TxRxI, kept_a, strict=True):
        left = jnp.abs(kept).sum(1)
        scaling_R = jnp.where(left > 0, jnp.abs(a).sum(1) / jnp.where(left > 0, left, 1.0), 1.0)
        scalings.append(jnp.maximum(scaling_R, jnp.sort(scaling_R)[int(len(scaling_R) * quantile)]))
    b = sum(scaling * kept for scaling, kept in zip(scalings, kept_b, strict=True)) / sum(scalings)
    return fuse * sum(kept_a), fuse * b


@functools.cache
def merge_adapters(density: float = 0.2, quantile: float = 0.8, fuse: float = 2.0) -> Transform:
    """``b a`` of the merged factors where ``leaf.extras`` has ``lora_a`` and ``lora_b``; means elsewhere."""
    check_fraction("density", density)
    if not 0 <= quantile < 1:
        raise ValueError(f"quantile must lie in [0, 1), got {quantile}")

    def product(x: Array, leaf: Leaf) -> Array:
        a, b = (leaf.extras[name].astype(jnp.float32) for name in ("lora_a", "lora_b"))
        if a.ndim != 3 or b.shape != (len(x), x.shape[1], a.shape[1]) or a.shape[::2] != x.shape[::2]:
            raise ValueError(f"LoRA factors b {b.shape} and a {a.shape} for matrices [out, in] of shape {x.shape}")
        a, b = merge_factors(a, b, density, quantile, fuse)
        return b @ a

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        if "lora_a" not in leaf.extras or x.ndim != 3:
            return mean(x)
        return by_output(lambda x: product(x, leaf), x, leaf)

    return Transform("merge_adapters", apply, predicates=(input_first,), by_rows=False)


@method(
    "copa",
    Card(
        title="RobustMerge: Parameter-Efficient Model Merging for MLLMs with Direction Robustness (CoPA-Merging)",
        arxiv="2502.17159",
        year=2025,
        summary="merges LoRA factors after pruning, rescaled by how much of each direction was pruned",
        extras=("lora_a", "lora_b"),
        released_code="the rule and its numbers are taken from it",
    ),
)
def copa(density: float = 0.2, quantile: float = 0.8, fuse: float = 2.0) -> Transform:
    """``theta_0 + B A``, ``A = fuse sum_t A'_t``, ``B = fuse sum_t B'_t diag(s_t) / sum_t s_t``.

    ``A'``, ``B'`` are the factors of task t's adapter without their smallest entries, each matrix by itself. For each
    of the r directions ``s_t = |A_t|_1 / |A'_t|_1`` (rows of A) says how much was pruned; values below a quantile are
    raised to it, and the division by their sum over tasks balances the tasks. Source: arXiv 2502.17159, in the form of
    the authors' code (November 2025).

    Extras are ``lora_a`` (``[T, r, in]``) and ``lora_b`` (``[T, out, r]``, with LoRA's own factor alpha / r in it) for
    every adapted matrix; tensors without them get the mean of the tasks.

    Args:
      density: fraction of entries kept in each factor.
      quantile: in [0, 1), of the r scalings of one task.
      fuse: factor on each of the two merged factors, so that the product has it squared.
    """
    return merge_adapters(density, quantile, fuse)
