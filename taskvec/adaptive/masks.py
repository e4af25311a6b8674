"""Masks on what another parametrisation adds to the pretrained weights: by entry, or by rank of a factorised matrix."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from taskvec import tree as trees
from taskvec.adaptive.parametrisation import LowRank, Parametrisation, tensor_numbers
from taskvec.transforms.base import check_choice, mixed
from taskvec.tree import Tree

Array = jax.Array

MASKS = ("sample", "mean", "hard")
START = 0.1  # of a rank's logit: kept if positive, dropped if negative


def concrete(
    base: Parametrisation, theta0: Tree, temperature: float = 0.5, mask: str = "sample", init: float = 0.0
) -> Parametrisation:
    """One mask shared by all tasks: ``theta = theta0 + m / mean(m) * (what base adds)``, the mean over a tensor.

    Learnables are ``{"base": those of base, "mask": tree}`` of float32 logits a, one an entry of `theta0`. Concrete
    subspace learning, arXiv 2312.06173.

    Args:
      base: adds to `theta0` something that does not depend on it, such as coefficients.
      theta0: parameters, or their shapes.
      temperature: T of the relaxed Bernoulli distribution.
      mask: ``sample`` draws ``m = sigmoid((a + log u - log(1 - u)) / T)`` with `uniform` u, by `merge`'s key;
        ``mean`` takes the probability ``sigmoid(a)``; ``hard`` takes ``[sigmoid(a) >= 1/2]``, without gradient.
      init: start of all logits.

    Raises:
      ValueError: unknown `mask`; ``sample`` without a key.
    """
    check_choice("mask", mask, MASKS)
    draw = _draws(mask, temperature)

    def logits(path: str, x: Any) -> Array:
        # A tensor that is not merged needs none; one a layer keeps the layer axis where a scan looks for it.
        shape = x.shape if trees.is_float(x) else x.shape[: int(trees.is_stacked(path))]
        return jnp.full(shape, init, jnp.float32)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), theta0)

    def start() -> Tree:
        return {"base": base.init(), "mask": trees.map_with_path(logits, shapes)}

    def spread(learnables: Tree, key: Any = None) -> Tree:
        if key is None and mask == "sample":
            raise ValueError("a sampled mask needs a key: merge(theta0, tau, learnables, key); or mask='mean', 'hard'")
        factors = base.spread(learnables["base"], None if key is None else jax.random.fold_in(key, 1))
        parts = {"logits": learnables["mask"], "base": factors}
        if mask == "sample":
            parts["seeds"] = tensor_seeds(learnables["mask"], key)
        return jax.tree.map(lambda _, *each: dict(zip(parts, each, strict=True)), shapes, *parts.values())

    def combine(theta0: Array, tau: Any, factor: Tree) -> Array:
        dtype = jnp.promote_types(theta0.dtype, jnp.float32)
        delta = base.combine(jnp.zeros(theta0.shape, dtype), tau, factor["base"])
        m = draw(factor).astype(dtype)
        return theta0.astype(dtype) + m / jnp.maximum(m.mean(), jnp.finfo(dtype).tiny) * delta

    return Parametrisation(start, spread, combine, *_of_base(base))


def _draws(mask: str, temperature: float) -> Callable[[Tree], Array]:
    def sample(factor: Tree) -> Array:
        u = uniform(factor["seeds"], factor["logits"].shape)
        return jax.nn.sigmoid((factor["logits"] + jnp.log(u) - jnp.log1p(-u)) / temperature)

    return {
        "sample": sample,
        "mean": lambda factor: jax.nn.sigmoid(factor["logits"]),
        "hard": lambda factor: factor["logits"] >= 0,
    }[mask]


def tensor_seeds(theta0: Tree, key: Array) -> Tree:
    """Two words for every per-layer tensor, from its path and the key: uint32 ``[2]``, ``[L, 2]`` of stacked leaves."""
    one, two = jax.random.bits(key, (2,), jnp.uint32)
    words = lambda n: jnp.stack([mixed(one ^ mixed(n)), mixed(two + n)], axis=-1)
    return jax.tree.map(words, tensor_numbers(theta0))


def uniform(seeds: Array, shape: tuple[int, ...]) -> Array:
    """Numbers in (0, 1), float32, from a hash of seeds ``[2]`` and position.

    jax's generator takes seven times as long on a CPU, and long to compile for every shape.
    """
    x = jax.lax.iota(jnp.uint32, math.prod(shape)) * jnp.uint32(0x9E3779B1) + seeds[0]
    x = mixed(mixed(x) ^ seeds[1])
    return (((x >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-23)).reshape(shape)


def _of_base(base: Parametrisation) -> tuple[Callable, Callable | None]:
    """`project` and `table` of what is wrapped."""
    project = lambda learnables: learnables | {"base": base.project(learnables["base"])}
    return project, base.table and (lambda learnables: base.table(learnables["base"]))


def rank_masks(base: Parametrisation, tau: Tree, temperature: float = 10.0, kept: float = 1.0) -> Parametrisation:
    """Which ranks of every factorised matrix each task keeps, beside what `base` learns.

    ``tau_t = sum_i [sigmoid(a_ti / T) > 1/2] up_ti down_ti``; backwards the step function counts as the sigmoid itself
    (straight through). Other tensors are merged by `base` alone. Learnables are ``{"base": those of base, "mask":
    tree}`` of float32 logits a, ``[T, r]`` or ``[L, T, r]``, for the `LowRank` leaves only. AdaRank, arXiv 2503.22178.

    Args:
      base: whose factors multiply whole task vectors, such as coefficients.
      tau: task vectors with `LowRank` leaves, most important rank first; only their shapes are kept.
      temperature: T; it scales the gradient, not the result.
      kept: fraction of the ranks kept at the start (logit 0.1, the others -0.1).

    Raises:
      ValueError: no leaf is `LowRank`; `kept` is not in [0, 1].
    """
    if not 0 <= kept <= 1:
        raise ValueError(f"kept must lie in [0, 1], got {kept!r}")
    is_factors = lambda x: isinstance(x, LowRank)
    leaves = jax.tree_util.tree_flatten_with_path(tau, is_leaf=is_factors)[0]
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    named = {name(path): (*x.up.shape[:-2], x.up.shape[-1]) for path, x in leaves if is_factors(x)}
    if not named:
        raise ValueError("rank masks need task vectors with LowRank leaves: factorise some matrices first")

    def start() -> Tree:
        sign = lambda r: jnp.where(jnp.arange(r) < int(kept * r), START, -START).astype(jnp.float32)
        masks = {path: jnp.broadcast_to(sign(shape[-1]), shape) for path, shape in named.items()}
        return {"base": base.init(), "mask": trees.unflatten(masks)}

    skeleton = jax.tree.map(lambda x: 0, tau, is_leaf=is_factors)

    def spread(learnables: Tree, key: Any = None) -> Tree:
        masks = trees.flatten(learnables["mask"])
        one = lambda path, _, factor: {"base": factor, "logits": masks[path]} if path in masks else factor
        return trees.map_with_path(one, skeleton, base.spread(learnables["base"], key))

    def combine(theta0: Array, tau: Any, factor: Any) -> Array:
        if not is_factors(tau):
            return base.combine(theta0, tau, factor)
        soft_Txr = jax.nn.sigmoid(factor["logits"] / temperature)
        mask_Txr = (soft_Txr > 0.5) + (soft_Txr - jax.lax.stop_gradient(soft_Txr))
        return base.combine(theta0, LowRank(tau.up * mask_Txr[:, None, :], tau.down), factor["base"])

    return Parametrisation(start, spread, combine, *_of_base(base))
