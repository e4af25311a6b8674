"""What CLIP and ViT share: images cut into patches, and pre-norm transformer blocks (arXiv 2010.11929, 2103.00020)."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from taskvec.io import names
from taskvec.models import layers
from taskvec.models.base import Array
from taskvec.tree import Tree


class Pixels(Protocol):
    """What a config must say of its images: pixels a side, mean and deviation of the three colours in [0, 1]."""

    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]


class Sizes(Protocol):
    """What a config must say of its blocks."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float


def check(fields: Mapping[str, Any], config: Sizes, fixed: Mapping[str, Any], what: str) -> None:
    """Raises `ValueError` if a ``config.json`` asks for what is not computed here.

    Args:
      fields: of the file.
      config: made of them.
      fixed: fields with the only value that is computed.
      what: the model's name for the message.
    """
    for name, value in fixed.items():
        if fields.get(name, value) != value:
            raise ValueError(f"config.json has {name}={fields[name]!r}; the {what} here supports only {value!r}")
    if config.hidden_act not in layers.ACTIVATIONS:
        known = ", ".join(layers.ACTIVATIONS)
        raise ValueError(f"config.json has hidden_act={config.hidden_act!r}; supported are {known}")
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(config, name, 0), int):
            raise ValueError(f"config.json has {name}={fields[name]!r}; the {what} here has one number for both sides")
    for name in ("image_mean", "image_std"):
        if len(getattr(config, name, "rgb")) != 3:
            raise ValueError(f"{name}={fields[name]!r}; the {what} here has one number for each of three colours")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(f"hidden_size {config.hidden_size} is not a multiple of {config.num_attention_heads} heads")


def block_rules(at: str, attention: Mapping[str, str], rest: Mapping[str, str], bias: bool = True) -> tuple:
    """Rules of the blocks' tensors.

    Args:
      at: what names of a layer begin with, ``{}`` for its number.
      attention: names of query, key and value below `at`.
      rest: of output, up, down, attention_norm and mlp_norm.
      bias: whether query, key and value have one.
    """
    place = {"output": "attention/output", "up": "mlp/up", "down": "mlp/down"}
    return (
        *(rule for p, n in attention.items() for rule in names.dense(f"{at}.{n}", f"blocks/{{}}/attention/{p}", bias)),
        *(rule for p, to in place.items() for rule in names.dense(f"{at}.{rest[p]}", f"blocks/{{}}/{to}")),
        *(r for p in ("attention_norm", "mlp_norm") for r in names.norm(f"{at}.{rest[p]}", f"blocks/{{}}/{p}")),
    )


def abstract_blocks(config: Sizes, dtype: Any, bias: bool = True) -> Tree:
    """Shapes of the stacked blocks; `bias` as for `block_rules`."""
    d, ff, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers

    def dense(n: int, m: int, bias: bool = True) -> Tree:
        kernel = {"kernel": jax.ShapeDtypeStruct((depth, n, m), dtype)}
        return {**kernel, "bias": jax.ShapeDtypeStruct((depth, m), dtype)} if bias else kernel

    norm = {name: jax.ShapeDtypeStruct((depth, d), dtype) for name in ("scale", "bias")}
    return {
        "attention": {**{name: dense(d, d, bias) for name in ("query", "key", "value")}, "output": dense(d, d)},
        "attention_norm": dict(norm),
        "mlp": {"up": dense(d, ff), "down": dense(ff, d)},
        "mlp_norm": dict(norm),
    }


def block(config: Sizes, bias: Array | None, weights: Tree, x: Array, tap: layers.Tap, state: None):
    """One block, as `taskvec.models.layers.run_blocks` wants it once `config` and `bias` of attention are given."""

    attention = layers.self_attention(config.num_attention_heads, bias, tap)
    for name, run in (("attention", attention), ("mlp", layers.mlp(config.hidden_act))):
        y = layers.layer_norm(weights[f"{name}_norm"], x, config.layer_norm_eps)
        x = x + tap.drop(tap(name, run, weights[name], y))
    return x, state


def pixels(image: Array, config: Pixels) -> Array:
    """Float32 pixels as the model wants them: uint8 ones are normalised, others are taken as they are.

    Raises:
      ValueError: images of another shape than ``[B, size, size, 3]``, or of another integer type than uint8.
    """
    size = config.image_size
    if image.ndim != 4 or image.shape[1:] != (size, size, 3):
        raise ValueError(f"images of shape {image.shape}, but the model takes [B, {size}, {size}, 3]; resize them")
    if image.dtype == jnp.uint8:
        return (image.astype(jnp.float32) / 255 - jnp.array(config.image_mean)) / jnp.array(config.image_std)
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(f"images of {image.dtype}; the model takes uint8, or floats that are normalised already")
    return image.astype(jnp.float32)


def embed(weights: Tree, x_BxHxWx3: Array, dtype: Any) -> Array:
    """Class token and patches, with positions: ``[B, H, W, 3] -> [B, 1 + P, d]``.

    Args:
      weights: ``patch``, a dense layer of kernel ``[p, p, 3, d]``; ``class``, d numbers; ``position`` ``[1 + P, d]``.
      x_BxHxWx3: normalised pixels.
      dtype: of the computation, that of the weights if ``None``.
    """
    weights = layers.cast(weights, dtype)
    patch = weights["patch"]
    p, _, _, width = patch["kernel"].shape
    batch, height, _, _ = x_BxHxWx3.shape
    grid = height // p
    # A convolution whose stride is its size is a product of matrices, and XLA on CPU is faster at those.
    x = x_BxHxWx3[:, : grid * p, : grid * p].astype(patch["kernel"].dtype).reshape(batch, grid, p, grid, p, 3)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid * grid, p * p * 3)
    x = layers.dense({**patch, "kernel": patch["kernel"].reshape(-1, width)}, x)
    first = jnp.broadcast_to(weights["class"].reshape(1, 1, width), (batch, 1, width))
    return jnp.concatenate([first, x], axis=1) + weights["position"].reshape(1, -1, width)
