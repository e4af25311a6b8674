"""GPT-2 (Radford et al., 2019): pre-norm decoder, learned positions, tanh GELU, output embeddings tied.

Query, key and value are one matrix, ``attention/qkv``, as in the file, where matrices are ``[in, out]`` already.
Checked against ``transformers`` to 1e-5.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from taskvec.io import names
from taskvec.models import causal, layers
from taskvec.models.base import Array, Model, fields_of
from taskvec.tree import Tree


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of a Hugging Face ``config.json`` that the decoder depends on, under their names there."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    tie_word_embeddings: bool = True
    eos_token_id: int | tuple[int, ...] | None = 50256
    pad_token_id: int | None = None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Config":
        """Makes a config; raises `ValueError` for what this implementation does not compute."""
        for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            if fields.get(name):
                raise ValueError(f"config.json has {name}=true; the GPT-2 decoder here supports only false")
        config = cls(**fields_of(cls, fields))
        if config.activation_function not in layers.ACTIVATIONS:
            raise ValueError(
                f"config.json has activation_function={config.activation_function!r}; supported are "
                f"{', '.join(layers.ACTIVATIONS)}"
            )
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of {config.n_head} heads")
        return config

    def to_json(self) -> dict[str, Any]:
        """The fields of a ``config.json`` that says the same."""
        return {**dataclasses.asdict(self), "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}

    @property
    def inner(self) -> int:
        """Width of the MLP."""
        return self.n_inner or 4 * self.n_embd


def table(config: Config) -> names.Table:
    """Names of the tensors in a file."""

    def conv1d(name: str, path: str) -> tuple[names.Rule, ...]:
        return names.Rule(f"{name}.weight", f"{path}/kernel"), names.Rule(f"{name}.bias", f"{path}/bias")

    layer = "transformer.h.{}"
    rules = (
        names.Rule("transformer.wte.weight", "embeddings/word"),
        names.Rule("transformer.wpe.weight", "embeddings/position"),
        *names.norm(f"{layer}.ln_1", "blocks/{}/attention_norm"),
        *conv1d(f"{layer}.attn.c_attn", "blocks/{}/attention/qkv"),
        *conv1d(f"{layer}.attn.c_proj", "blocks/{}/attention/output"),
        *names.norm(f"{layer}.ln_2", "blocks/{}/mlp_norm"),
        *conv1d(f"{layer}.mlp.c_fc", "blocks/{}/mlp/up"),
        *conv1d(f"{layer}.mlp.c_proj", "blocks/{}/mlp/down"),
        *names.norm("transformer.ln_f", "norm"),
    )
    # The buffers hold the causal mask; the rest are heads of other tasks.
    ignore = (r"h\.\d+\.attn\.(masked_)?bias", r"score\..*", r"classifier\..*", r"qa_outputs\..*")
    ignore += (r"multiple_choice_head\..*",)
    if config.tie_word_embeddings:
        return names.Table(rules, ignore, "transformer.", copies=(("lm_head.weight", "embeddings/word"),))
    return names.Table((*rules, *names.dense("lm_head", "head", bias=False)), ignore, "transformer.")


def make(config: Config, dtype: Any = jnp.float32) -> Model:
    """The model of a config; `dtype` is that of its params."""
    return Model(
        name="gpt2",
        config=config,
        apply=functools.partial(causal.apply, FAMILY, config),
        abstract=abstract(config, dtype),
        feature_dim=config.n_embd,
        scanned=True,
        table=table(config),
        steps=causal.steps(FAMILY, config),
    )


def abstract(config: Config, dtype: Any = jnp.float32) -> Tree:
    """Shapes and dtypes of the params."""
    d, depth = config.n_embd, config.n_layer

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def dense(n: int, m: int) -> Tree:
        return {"kernel": array(depth, n, m), "bias": array(depth, m)}

    def norm(*stacked: int) -> Tree:
        return {"scale": array(*stacked, d), "bias": array(*stacked, d)}

    tree = {
        "embeddings": {"word": array(config.vocab_size, d), "position": array(config.n_positions, d)},
        "blocks": {
            "attention_norm": norm(depth),
            "attention": {"qkv": dense(d, 3 * d), "output": dense(d, d)},
            "mlp_norm": norm(depth),
            "mlp": {"up": dense(d, config.inner), "down": dense(config.inner, d)},
        },
        "norm": norm(),
    }
    return tree if config.tie_word_embeddings else {**tree, "head": {"kernel": array(d, config.vocab_size)}}


def _check(config: Config, length: int) -> None:
    if length > config.n_positions:
        raise ValueError(f"texts of {length} tokens, but the model has {config.n_positions} positions")


def _embed(config: Config, params: Tree, ids: Array, positions: Array) -> Array:
    tables = params["embeddings"]
    return tables["word"].take(ids, axis=0) + tables["position"].take(positions, axis=0)


def _block(
    config: Config, context: causal.Context, weights: Tree, x: Array, tap: layers.Tap, state: Tree
) -> tuple[Array, Tree]:
    kept = None

    def attention(weights: Tree, x: Array) -> Array:
        nonlocal kept
        parts = jnp.split(layers.dense(weights["qkv"], x), 3, axis=-1)
        q, k, v = (layers.split_heads(part, config.n_head) for part in parts)
        new = {"key": k, "value": v}
        kept = new if context.keep else None
        seen = layers.with_cache(state, new, context.slot)
        scale = q.shape[-1] ** -0.5 if config.scale_attn_weights else 1.0
        return layers.dense(weights["output"], layers.attend(q, seen["key"], seen["value"], context.bias, scale, tap))

    mlp = layers.mlp(config.activation_function)
    for name, run in (("attention", attention), ("mlp", mlp)):
        y = layers.layer_norm(weights[f"{name}_norm"], x, config.layer_norm_epsilon)
        x = x + tap.drop(tap(name, run, weights[name], y))
    return x, kept


def _norm(config: Config, params: Tree, x: Array) -> Array:
    return layers.layer_norm(params["norm"], x, config.layer_norm_epsilon)


def _logits(config: Config, params: Tree, x: Array) -> Array:
    if config.tie_word_embeddings:
        return causal.tied_logits(params["embeddings"]["word"], x)
    return layers.dense(params["head"], x).astype(jnp.float32)


FAMILY = causal.Family(_check, _embed, _block, _norm, _logits)
