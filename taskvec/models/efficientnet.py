"""EfficientNet-Lite0 (ImageNet) as a feature extractor, with batch normalisation folded into the convolutions.

Source: EfficientNet, arXiv 1905.11946; the Lite variant has no squeeze-and-excitation and ReLU6 for swish. The folded
network has 49 convolutions with bias, 98 tensors; 1x1 convolutions are matrices ``[in, out]``. Any input size works:
padding is TensorFlow's "same", computed from the actual size, as in the dynamic mode of ``efficientnet_lite_pytorch``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from taskvec import tree as trees
from taskvec.models.base import Array, Model
from taskvec.tree import Tree

NAME = "efficientnet_lite0_folded"
# Input statistics of the Lite models (`efficientnet_lite_builder.py` of the authors), for pixels in [0, 1].
MEAN, STD = 127 / 255, 128 / 255
BATCH_NORM_EPS = 1e-3

# (repeats, kernel size, stride of the first, expansion, channels in, channels out)
_STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


@dataclasses.dataclass(frozen=True)
class Block:
    """One inverted bottleneck: expand (1x1), depthwise (k x k), project (1x1), and a skip where shapes allow it."""

    kernel: int
    stride: int
    expansion: int
    inputs: int
    outputs: int

    @property
    def skips(self) -> bool:
        """Whether the input is added to the output."""
        return self.stride == 1 and self.inputs == self.outputs


@dataclasses.dataclass(frozen=True)
class Config:
    """The architecture; there is one."""

    stem: int = 32
    head: int = 1280
    blocks: tuple[Block, ...] = tuple(
        Block(kernel, stride if i == 0 else 1, expansion, inputs if i == 0 else outputs, outputs)
        for repeats, kernel, stride, expansion, inputs, outputs in _STAGES
        for i in range(repeats)
    )


def make(config: Config = Config(), dtype: Any = jnp.float32) -> Model:
    """The model; `dtype` is that of its params."""
    return Model(NAME, config, apply, abstract(config, dtype), config.head, scanned=False)


def abstract(config: Config = Config(), dtype: Any = jnp.float32) -> Tree:
    """Shapes and dtypes of the params: ``{stem, blocks: {i: {expand, depthwise, project}}, head}``."""

    def conv(*shape: int) -> Tree:
        return {"kernel": jax.ShapeDtypeStruct(shape, dtype), "bias": jax.ShapeDtypeStruct(shape[-1:], dtype)}

    def block(b: Block) -> Tree:
        wide = b.inputs * b.expansion
        expand = {"expand": conv(b.inputs, wide)} if b.expansion > 1 else {}
        return {**expand, "depthwise": conv(b.kernel, b.kernel, wide), "project": conv(wide, b.outputs)}

    return {
        "stem": conv(3, 3, 3, config.stem),
        "blocks": {str(i): block(b) for i, b in enumerate(config.blocks)},
        "head": conv(config.blocks[-1].outputs, config.head),
    }


def apply(params: Tree, batch: Mapping[str, Array], *, layer_params: None = None) -> dict[str, Array]:
    """Pooled features of images.

    Args:
      params: as `abstract` describes.
      batch: ``image`` ``[B, H, W, 3]``, RGB, uint8 or float in [0, 1].
      layer_params: not supported, since the blocks differ in shape.

    Returns:
      ``features`` float32 ``[B, 1280]``, the mean over places of the last layer; they are in [0, 6].
    """
    if layer_params is not None:
        raise ValueError("the blocks of EfficientNet differ in shape and are not scanned: merge the whole tree instead")
    image = batch["image"]
    dtype = params["stem"]["kernel"].dtype
    x = image.astype(jnp.float32) / (255 if image.dtype == jnp.uint8 else 1)
    x = ((x - MEAN) / STD).astype(dtype)
    x = _relu6(_conv(params["stem"], x, 2))
    for i, block in enumerate(Config().blocks):
        weights, y = params["blocks"][str(i)], x
        if block.expansion > 1:
            y = _relu6(_pointwise(weights["expand"], y))
        y = _relu6(_depthwise(weights["depthwise"], y, block.stride))
        y = _pointwise(weights["project"], y)
        x = x + y if block.skips else y
    x = _relu6(_pointwise(params["head"], x))
    return {"features": x.astype(jnp.float32).mean((1, 2))}


def fold(tensors: Mapping[str, np.ndarray]) -> Tree:
    """Params from the state dict of ``efficientnet_lite_pytorch``, batch normalisation folded in.

    With ``s = scale / sqrt(variance + eps)`` a convolution w followed by normalisation becomes ``s w`` (per output
    channel) with bias ``beta - s mean``; computed in float64. The classifier is left out.

    Raises:
      ValueError: names or shapes are not those of EfficientNet-Lite0.
    """
    left = {name for name in tensors if not name.endswith("num_batches_tracked") and not name.startswith("_fc.")}

    def take(name: str) -> np.ndarray:
        if name not in left:
            raise ValueError(f"no tensor {name}: not a state dict of EfficientNet-Lite0")
        left.discard(name)
        return tensors[name].astype(np.float64)

    def conv(kernel: str, norm: str, kind: str) -> Tree:
        scale = take(f"{norm}.weight") / np.sqrt(take(f"{norm}.running_var") + BATCH_NORM_EPS)
        w = take(f"{kernel}.weight").transpose(2, 3, 1, 0)  # [h, w, in, out]
        w = {"matrix": lambda: w[0, 0], "depthwise": lambda: w[:, :, 0], "full": lambda: w}[kind]() * scale
        bias = take(f"{norm}.bias") - take(f"{norm}.running_mean") * scale
        return {"kernel": w.astype(np.float32), "bias": bias.astype(np.float32)}

    blocks = {}
    for i, block in enumerate(Config().blocks):
        at = f"_blocks.{i}"
        expand = {"expand": conv(f"{at}._expand_conv", f"{at}._bn0", "matrix")} if block.expansion > 1 else {}
        depthwise = conv(f"{at}._depthwise_conv", f"{at}._bn1", "depthwise")
        blocks[str(i)] = {
            **expand,
            "depthwise": depthwise,
            "project": conv(f"{at}._project_conv", f"{at}._bn2", "matrix"),
        }
    params = {
        "stem": conv("_conv_stem", "_bn0", "full"),
        "blocks": blocks,
        "head": conv("_conv_head", "_bn1", "matrix"),
    }
    shapes, wanted = ({p: x.shape for p, x in trees.flatten(t).items()} for t in (params, abstract()))
    odd = sorted(p for p in wanted if shapes.get(p) != wanted[p]) + sorted(left)
    if odd:
        raise ValueError(f"not a state dict of EfficientNet-Lite0: unexpected names or shapes at {', '.join(odd[:8])}")
    return params


def _relu6(x: Array) -> Array:
    return jnp.clip(x, 0, 6)


def _pointwise(weights: Tree, x: Array) -> Array:
    return (x.reshape(-1, x.shape[-1]) @ weights["kernel"]).reshape(*x.shape[:-1], -1) + weights["bias"]


def _conv(weights: Tree, x: Array, stride: int) -> Array:
    axes = ("NHWC", "HWIO", "NHWC")
    return (
        lax.conv_general_dilated(x, weights["kernel"], (stride, stride), "SAME", dimension_numbers=axes)
        + weights["bias"]
    )


def _depthwise(weights: Tree, x: Array, stride: int) -> Array:
    """A depthwise convolution as a sum of shifted slices."""
    kernel = weights["kernel"]
    k = kernel.shape[0]
    sizes = [-(-n // stride) for n in x.shape[1:3]]
    pads = [max((m - 1) * stride + k - n, 0) for n, m in zip(x.shape[1:3], sizes, strict=True)]
    x = jnp.pad(x, ((0, 0), *((p // 2, p - p // 2) for p in pads), (0, 0)))
    h, w = ((m - 1) * stride + 1 for m in sizes)
    parts = [kernel[i, j] * x[:, i : i + h : stride, j : j + w : stride] for i in range(k) for j in range(k)]
    return sum(parts[1:], parts[0]) + weights["bias"]
