"""Llama-like decoders: Llama (arXiv 2302.13971), Mistral (arXiv 2310.06825), Qwen2 (arXiv 2407.10671).

Pre-norm blocks with RMS norms, rotary positions (arXiv 2104.09864; scaled as by Llama 3.1), grouped-query attention and
a gated SiLU MLP. Checked against ``transformers`` to 1e-5.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskvec.io import names
from taskvec.models import causal, layers
from taskvec.models.base import Array, Model, fields_of
from taskvec.tree import Tree

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
ROPE_TYPES = ("default", "llama3")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: ``rope_theta`` and ``rope_scaling``, or ``rope_parameters`` since transformers 5."""

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Rope":
        """Reads either form; raises `ValueError` for other kinds of scaling."""
        given = dict(fields.get("rope_scaling") or fields.get("rope_parameters") or {})
        kind = given.get("rope_type") or given.get("type") or "default"
        if kind not in ROPE_TYPES:
            raise ValueError(f"config.json has rope_type {kind!r}; supported are {', '.join(ROPE_TYPES)}")
        if (given.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0) != 1.0:
            raise ValueError("config.json has a partial_rotary_factor; only rotation of whole heads is supported")
        theta = given.get("rope_theta") or fields.get("rope_theta") or cls.rope_theta
        if kind == "default":
            return cls(rope_theta=theta)
        missing = [n for n in ("factor", "low_freq_factor", "high_freq_factor") if n not in given]
        if missing:
            raise ValueError(f"config.json has rope_type 'llama3' without {', '.join(missing)}")
        known = {f.name: given[f.name] for f in dataclasses.fields(cls) if given.get(f.name) is not None}
        length = known.get("original_max_position_embeddings") or fields["max_position_embeddings"]
        return cls(**{**known, "rope_theta": theta, "rope_type": kind, "original_max_position_embeddings": length})

    def to_json(self) -> dict[str, Any]:
        """Both forms."""
        scaling = {k: v for k, v in dataclasses.asdict(self).items() if k != "rope_theta"}
        scaling = None if self.rope_type == "default" else scaling
        parameters = {"rope_theta": self.rope_theta, **(scaling or {"rope_type": "default"})}
        return {"rope_theta": self.rope_theta, "rope_scaling": scaling, "rope_parameters": parameters}

    def frequencies(self, width: int) -> np.ndarray:
        """Radians a position, float32 ``[width / 2]``."""
        plain = 1 / np.float32(self.rope_theta) ** (np.arange(0, width, 2, dtype=np.float32) / width)
        if self.rope_type == "default":
            return plain
        # Waves that the first training saw many times are kept, those it never saw whole are stretched by `factor`;
        # between the two, in proportion.
        seen = self.original_max_position_embeddings * plain / (2 * math.pi)
        kept = (seen - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0, 1)
        return (plain * (kept + (1 - kept) / self.factor)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of a Hugging Face ``config.json`` that the decoder depends on, under their names there.

    ``sliding_window`` is ``None`` where the config does not use it; texts up to its length are computed all the same.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: Rope = Rope()
    model_type: str = "llama"
    architectures: tuple[str, ...] = ("LlamaForCausalLM",)
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Config":
        """Makes a config; raises `ValueError` for what this implementation does not compute."""
        kind = fields.get("model_type", "llama")
        if kind not in ARCHITECTURES:
            raise ValueError(f"model_type {kind!r} is not one of {', '.join(ARCHITECTURES)}")
        if (act := fields.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"config.json has hidden_act={act!r}; the {kind} decoder here supports only 'silu'")
        given = fields_of(cls, fields)
        heads = fields["num_attention_heads"]
        given["num_key_value_heads"] = given.get("num_key_value_heads") or heads
        given["head_dim"] = given.get("head_dim") or fields["hidden_size"] // heads
        given["architectures"] = given.get("architectures") or (ARCHITECTURES[kind],)
        if kind == "qwen2":
            given |= {"attention_bias": True, "eos_token_id": given.get("eos_token_id")}
        if kind == "mistral":
            given["sliding_window"] = given.get("sliding_window", 4096)
        if kind == "llama" or (kind == "qwen2" and not fields.get("use_sliding_window")):
            given["sliding_window"] = None
        if heads % given["num_key_value_heads"]:
            raise ValueError(f"{heads} attention heads are not a multiple of {given['num_key_value_heads']} key heads")
        return cls(**given, rope=Rope.from_json(fields))

    def to_json(self) -> dict[str, Any]:
        """The fields of a ``config.json`` that says the same."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k != "rope"}
        fields |= {"hidden_act": "silu", "architectures": list(self.architectures), **self.rope.to_json()}
        if self.model_type == "qwen2":
            fields["use_sliding_window"] = self.sliding_window is not None
        return fields

    @property
    def head(self) -> bool:
        """Whether the file has output embeddings of its own."""
        return not self.tie_word_embeddings and self.speaks

    @property
    def speaks(self) -> bool:
        """Whether there are logits."""
        return self.tie_word_embeddings or any(name.endswith("ForCausalLM") for name in self.architectures)

    def biased(self, name: str) -> bool:
        """Whether a dense layer of the attention has a bias."""
        return self.attention_bias and not (self.model_type == "qwen2" and name == "output")


def table(config: Config) -> names.Table:
    """Names of the tensors in a file."""
    layer, attention = "model.layers.{}", {"query": "q", "key": "k", "value": "v", "output": "o"}
    rules = [
        names.Rule("model.embed_tokens.weight", "embeddings/word"),
        *names.norm(f"{layer}.input_layernorm", "blocks/{}/attention_norm", bias=False),
        *names.norm(f"{layer}.post_attention_layernorm", "blocks/{}/mlp_norm", bias=False),
        *names.norm("model.norm", "norm", bias=False),
    ]
    for name, letter in attention.items():
        path = f"blocks/{{}}/attention/{name}"
        rules += names.dense(f"{layer}.self_attn.{letter}_proj", path, config.biased(name))
    for name in ("gate", "up", "down"):
        rules += names.dense(f"{layer}.mlp.{name}_proj", f"blocks/{{}}/mlp/{name}", config.mlp_bias)
    if config.head:
        rules += names.dense("lm_head", "head", bias=False)
    copies = (("lm_head.weight", "embeddings/word"),) if config.tie_word_embeddings else ()
    # Frequencies are a constant; the rest are heads of other tasks.
    ignore = (r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", r"score\..*", r"classifier\..*", r"qa_outputs\..*")
    return names.Table(tuple(rules), ignore, "model.", copies)


def make(config: Config, dtype: Any = jnp.float32) -> Model:
    """The model of a config; `dtype` is that of its params."""
    return Model(
        name=config.model_type,
        config=config,
        apply=functools.partial(causal.apply, FAMILY, config),
        abstract=abstract(config, dtype),
        feature_dim=config.hidden_size,
        scanned=True,
        table=table(config),
        steps=causal.steps(FAMILY, config) if config.speaks else None,
    )


def abstract(config: Config, dtype: Any = jnp.float32) -> Tree:
    """Shapes and dtypes of the params."""
    d, ff, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def dense(n: int, m: int, bias: bool) -> Tree:
        return {"kernel": array(depth, n, m), **({"bias": array(depth, m)} if bias else {})}

    shapes = {"query": (d, queries), "key": (d, keys), "value": (d, keys), "output": (queries, d)}
    tree = {
        "embeddings": {"word": array(config.vocab_size, d)},
        "blocks": {
            "attention_norm": {"scale": array(depth, d)},
            "attention": {name: dense(*shape, config.biased(name)) for name, shape in shapes.items()},
            "mlp_norm": {"scale": array(depth, d)},
            "mlp": {name: dense(d, ff, config.mlp_bias) for name in ("gate", "up")}
            | {"down": dense(ff, d, config.mlp_bias)},
        },
        "norm": {"scale": array(d)},
    }
    return {**tree, "head": {"kernel": array(d, config.vocab_size)}} if config.head else tree


def rotate(x_BxNxHxC: Array, position_BxN: Array, frequencies: np.ndarray) -> Array:
    """Turns the pair ``(c, c + C / 2)`` of every head by position x frequency, in float32."""
    angle_BxNx1xF = (position_BxN[..., None].astype(jnp.float32) * frequencies[None, None])[:, :, None]
    cos, sin = jnp.cos(angle_BxNx1xF), jnp.sin(angle_BxNx1xF)
    a, b = jnp.split(x_BxNxHxC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxNxHxC.dtype)


def _check(config: Config, length: int) -> None:
    if config.sliding_window is not None and length > config.sliding_window:
        raise ValueError(
            f"texts of {length} tokens, but the model attends to a sliding window of {config.sliding_window}, which is "
            "computed here only for texts that fit into it"
        )


def _embed(config: Config, params: Tree, ids: Array, positions: Array) -> Array:
    return params["embeddings"]["word"].take(ids, axis=0)


def _block(
    config: Config, context: causal.Context, weights: Tree, x: Array, tap: layers.Tap, state: Tree
) -> tuple[Array, Tree]:
    kept = None
    frequencies = config.rope.frequencies(config.head_dim)

    def attention(weights: Tree, x: Array) -> Array:
        nonlocal kept
        counts = {"query": config.num_attention_heads, "key": config.num_key_value_heads}
        q, k, v = (
            layers.split_heads(layers.dense(weights[name], x), counts.get(name, config.num_key_value_heads))
            for name in ("query", "key", "value")
        )
        q, k = (rotate(part, context.position_BxN, frequencies) for part in (q, k))
        new = {"key": k, "value": v}
        kept = new if context.keep else None
        seen = layers.with_cache(state, new, context.slot)
        return layers.dense(
            weights["output"], layers.attend(q, seen["key"], seen["value"], context.bias, q.shape[-1] ** -0.5, tap)
        )

    def mlp(weights: Tree, x: Array) -> Array:
        gate = jax.nn.silu(layers.dense(weights["gate"], x))
        return layers.dense(weights["down"], gate * layers.dense(weights["up"], x))

    for name, run in (("attention", attention), ("mlp", mlp)):
        y = layers.rms_norm(weights[f"{name}_norm"], x, config.rms_norm_eps)
        x = x + tap.drop(tap(name, run, weights[name], y))
    return x, kept


def _norm(config: Config, params: Tree, x: Array) -> Array:
    return layers.rms_norm(params["norm"], x, config.rms_norm_eps)


def _logits(config: Config, params: Tree, x: Array) -> Array | None:
    if config.tie_word_embeddings:
        return causal.tied_logits(params["embeddings"]["word"], x)
    return layers.dense(params["head"], x).astype(jnp.float32) if config.head else None


FAMILY = causal.Family(_check, _embed, _block, _norm, _logits)
