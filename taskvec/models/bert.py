"""BERT encoders (arXiv 1810.04805) with mean pooling, such as the sentence encoder all-MiniLM-L6-v2.

Post-norm blocks, learned positions, exact GELU. Weights of a dense layer are ``[in, out]``; the layers are stacked on a
leading axis under ``blocks`` and run by one `lax.scan`. Checked against ``transformers`` to 1e-5.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from taskvec.models.base import Array, Model
from taskvec.tree import Tree


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of a Hugging Face ``config.json`` that the encoder depends on, under their names there."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Config":
        """Makes a config; raises `ValueError` for what this implementation does not compute."""
        fixed = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
        for name, value in fixed.items():
            if fields.get(name, value) != value:
                raise ValueError(
                    f"config.json has {name}={fields[name]!r}; the BERT encoder here supports only {value!r}"
                )
        config = cls(**{f.name: fields[f.name] for f in dataclasses.fields(cls) if f.name in fields})
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"hidden_size {config.hidden_size} is not a multiple of {config.num_attention_heads} heads"
            )
        return config


def make(config: Config, dtype: Any = jnp.float32) -> Model:
    """The model of a config; `dtype` is that of its params."""
    return Model(
        name="bert",
        config=config,
        apply=functools.partial(apply, config),
        abstract=abstract(config, dtype),
        feature_dim=config.hidden_size,
        scanned=True,
    )


def abstract(config: Config, dtype: Any = jnp.float32) -> Tree:
    """Shapes and dtypes of the params."""
    d, ff, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def dense(n: int, m: int) -> Tree:
        return {"kernel": array(layers, n, m), "bias": array(layers, m)}

    norm = {"scale": array(layers, d), "bias": array(layers, d)}
    attention = {name: dense(d, d) for name in ("query", "key", "value", "output")}
    return {
        "embeddings": {
            "word": array(config.vocab_size, d),
            "position": array(config.max_position_embeddings, d),
            "token_type": array(config.type_vocab_size, d),
            "norm": {"scale": array(d), "bias": array(d)},
        },
        "blocks": {
            "attention": {**attention, "norm": dict(norm)},
            "mlp": {"up": dense(d, ff), "down": dense(ff, d), "norm": dict(norm)},
        },
    }


def apply(
    config: Config, params: Tree, batch: Mapping[str, Array], *, layer_params: Callable[[Tree], Tree] | None = None
) -> dict[str, Array]:
    """Runs the encoder.

    Args:
      config: of the model.
      params: as `abstract` describes; ``params["blocks"]`` may be any tree with a leading layer axis if `layer_params`
        turns a slice of it into a layer's weights, and the tables of ``params["embeddings"]`` may be any objects with
        ``take(ids, axis=0)``.
      batch: ``ids`` int32 ``[B, N]``, ``mask`` bool ``[B, N]`` (false at padding); every token has type 0.
      layer_params: see `taskvec.models.base.Model`.

    Returns:
      ``features`` float32 ``[B, d]``, the mean of the last layer over the tokens of the mask; ``tokens`` ``[B, N, d]``,
      the last layer.
    """
    batch_size, length = batch["ids"].shape
    if length > config.max_position_embeddings:
        raise ValueError(f"texts of {length} tokens, but the model has {config.max_position_embeddings} positions")
    tables = params["embeddings"]
    x = tables["word"].take(batch["ids"], axis=0)
    x += tables["position"].take(jnp.arange(length), axis=0) + tables["token_type"].take(
        jnp.zeros(1, jnp.int32), axis=0
    )
    # [B * N, d] from here on: XLA on CPU multiplies two matrices faster than a stack of them by one.
    x_RxD = _norm(config, tables["norm"], x.reshape(batch_size * length, -1))
    bias_Bx1x1xN = jnp.where(batch["mask"], 0.0, -1e9).astype(jnp.float32)[:, None, None, :]

    def step(x_RxD: Array, layer: Tree) -> tuple[Array, None]:
        weights = layer if layer_params is None else layer_params(layer)
        return _block(config, weights, x_RxD, bias_Bx1x1xN), None

    if layer_params is not None:
        # Merged weights are outputs of `layer_params`: kept for the backward pass, they would be a whole merged stack.
        step = jax.checkpoint(step, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)
    x_RxD, _ = lax.scan(step, x_RxD, params["blocks"])
    x_BxNxD = x_RxD.reshape(batch_size, length, -1)
    weight_BxNx1 = batch["mask"][..., None].astype(jnp.float32)
    mean = (x_BxNxD * weight_BxNx1).sum(1) / jnp.maximum(weight_BxNx1.sum(1), 1e-9)
    return {"features": mean.astype(jnp.float32), "tokens": x_BxNxD}


def _block(config: Config, weights: Tree, x_RxD: Array, bias_Bx1x1xN: Array) -> Array:
    attention, mlp = weights["attention"], weights["mlp"]
    y_RxD = _dense(attention["output"], _attend(config, attention, x_RxD, bias_Bx1x1xN))
    x_RxD = _norm(config, attention["norm"], x_RxD + y_RxD)
    y_RxD = _dense(mlp["down"], _gelu(_dense(mlp["up"], x_RxD)))
    return _norm(config, mlp["norm"], x_RxD + y_RxD)


def _attend(config: Config, weights: Tree, x_RxD: Array, bias_Bx1x1xN: Array) -> Array:
    batch_size, length = bias_Bx1x1xN.shape[0], bias_Bx1x1xN.shape[-1]
    heads = (batch_size, length, config.num_attention_heads, -1)
    q, k, v = (_dense(weights[name], x_RxD).reshape(heads) for name in ("query", "key", "value"))
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) / math.sqrt(q.shape[-1])
    probabilities = jax.nn.softmax(logits + bias_Bx1x1xN).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", probabilities, v).reshape(x_RxD.shape)


def _dense(weights: Tree, x: Array) -> Array:
    return x @ weights["kernel"] + weights["bias"]


def _norm(config: Config, weights: Tree, x: Array) -> Array:
    y = x.astype(jnp.float32)
    y -= y.mean(-1, keepdims=True)
    y *= lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + config.layer_norm_eps)
    return (y * weights["scale"] + weights["bias"]).astype(x.dtype)


def _gelu(x: Array) -> Array:
    # `jax.nn.gelu` goes through erfc, which is dearer than erf on CPU.
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))
