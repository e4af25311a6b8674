"""BERT (arXiv 1810.04805) and RoBERTa (arXiv 1907.11692) encoders with mean pooling, such as all-MiniLM-L6-v2.

Post-norm blocks, learned positions, exact GELU. Weights of a dense layer are ``[in, out]``; the layers are stacked on a
leading axis under ``blocks`` and run by one `lax.scan`. Checked against ``transformers`` to 1e-5.

RoBERTa differs in its positions: they count the tokens that are not padding, from ``pad_token_id + 1`` on.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from taskvec.io import names
from taskvec.models import layers
from taskvec.models.base import Array, Model
from taskvec.tree import Tree

ARCHITECTURES = {"bert": "BertModel", "roberta": "RobertaModel"}


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
    pad_token_id: int = 0
    model_type: str = "bert"

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Config":
        """Makes a config; raises `ValueError` for what this implementation does not compute."""
        fixed = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
        for name, value in fixed.items():
            if fields.get(name, value) != value:
                raise ValueError(
                    f"config.json has {name}={fields[name]!r}; the BERT encoder here supports only {value!r}"
                )
        default = {"pad_token_id": 1} if fields.get("model_type") == "roberta" else {}
        given = {f.name: fields[f.name] for f in dataclasses.fields(cls) if fields.get(f.name) is not None}
        config = cls(**{**default, **given})
        if config.model_type not in ARCHITECTURES:
            raise ValueError(f"model_type {config.model_type!r} is not one of {', '.join(ARCHITECTURES)}")
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"hidden_size {config.hidden_size} is not a multiple of {config.num_attention_heads} heads"
            )
        return config

    def to_json(self) -> dict[str, Any]:
        """The fields of a ``config.json`` that says the same."""
        return {
            **dataclasses.asdict(self), "hidden_act": "gelu", "architectures": [ARCHITECTURES[self.model_type]],
        }  # fmt: skip

    @property
    def first_position(self) -> int:
        """The position of a text's first token."""
        return self.pad_token_id + 1 if self.model_type == "roberta" else 0


TABLE = names.Table(
    rules=(
        names.Rule("embeddings.word_embeddings.weight", "embeddings/word"),
        names.Rule("embeddings.position_embeddings.weight", "embeddings/position"),
        names.Rule("embeddings.token_type_embeddings.weight", "embeddings/token_type"),
        *names.norm("embeddings.LayerNorm", "embeddings/norm"),
        *names.dense("encoder.layer.{}.attention.self.query", "blocks/{}/attention/query"),
        *names.dense("encoder.layer.{}.attention.self.key", "blocks/{}/attention/key"),
        *names.dense("encoder.layer.{}.attention.self.value", "blocks/{}/attention/value"),
        *names.dense("encoder.layer.{}.attention.output.dense", "blocks/{}/attention/output"),
        *names.norm("encoder.layer.{}.attention.output.LayerNorm", "blocks/{}/attention/norm"),
        *names.dense("encoder.layer.{}.intermediate.dense", "blocks/{}/mlp/up"),
        *names.dense("encoder.layer.{}.output.dense", "blocks/{}/mlp/down"),
        *names.norm("encoder.layer.{}.output.LayerNorm", "blocks/{}/mlp/norm"),
    ),
    # The position numbers are a constant; features are means over tokens and use neither the pooler nor a head.
    ignore=(r"embeddings\.position_ids", r"pooler\..*", r"cls\..*", r"classifier\..*", r"lm_head\..*"),
    prefix="bert.",
)
TABLES = {"bert": TABLE, "roberta": TABLE._replace(prefix="roberta.")}


def make(config: Config, dtype: Any = jnp.float32) -> Model:
    """The model of a config; `dtype` is that of its params."""
    return Model(
        name=config.model_type,
        config=config,
        apply=functools.partial(apply, config),
        abstract=abstract(config, dtype),
        feature_dim=config.hidden_size,
        scanned=True,
        packs=True,
        table=TABLES[config.model_type],
    )


def abstract(config: Config, dtype: Any = jnp.float32) -> Tree:
    """Shapes and dtypes of the params."""
    d, ff, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def dense(n: int, m: int) -> Tree:
        return {"kernel": array(depth, n, m), "bias": array(depth, m)}

    norm = {"scale": array(depth, d), "bias": array(depth, d)}
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


def apply(config: Config, params: Tree, batch: Mapping[str, Array], **how: Any) -> dict[str, Array]:
    """Runs the encoder.

    Args:
      config: of the model.
      params: as `abstract` describes; the tables of ``params["embeddings"]`` may be any objects with
        ``take(ids, axis=0)``.
      batch: ``ids`` int32 ``[B, N]``, ``mask`` bool ``[B, N]`` (false at padding). Or packed, with several sentences in
        a row (`taskvec.data.packing`): ``ids`` int32 ``[R, N]``, ``sentence`` int32 ``[R, N]``, the number of a token's
        sentence (-1 at padding), and ``first`` int32 ``[S]``, where in ``ids.ravel()`` a sentence begins. In both
        ``type_ids``, int32 like ``ids``, may say which text of a pair a token is of: 0, as without it, or 1. A model
        with one type (RoBERTa) does not look at them.
      **how: see `taskvec.models.layers.Options`. Hooks and captured pieces see packed rows as they are.

    Returns:
      ``features`` float32 ``[B, d]`` (packed: ``[S, d]``), the mean of the last layer over the tokens of a sentence;
      ``tokens`` ``[B, N, d]`` (packed: ``[R, N, d]``), the last layer, whose ``[:, 0]`` (packed: flat, at ``first``) is
      what classification heads of BERT and RoBERTa read; captured pieces.

    Raises:
      ValueError: more tokens than the model has positions.
    """
    options = layers.options_of(how)
    length, packed = batch["ids"].shape[1], "sentence" in batch
    if length > (longest := config.max_position_embeddings - config.first_position):
        raise ValueError(f"texts of {length} tokens, but the model has {longest} positions")
    tables = params["embeddings"]
    x = tables["word"].take(batch["ids"], axis=0)
    x += tables["position"].take((_packed_positions if packed else _positions)(config, batch), axis=0)
    x += _types(config, tables["token_type"], batch)
    x = layers.layer_norm(tables["norm"], x.astype(options.dtype or x.dtype), config.layer_norm_eps)
    bias = layers.packed_bias(batch["sentence"]) if packed else layers.padding_bias(batch["mask"])
    block = functools.partial(_block, config, bias)
    x_BxNxD, captured, _ = layers.run_blocks(block, params["blocks"], layers.Tap(options, options.key).drop(x), options)
    features = (_mean_of_sentences if packed else _mean)(x_BxNxD, batch)
    return {"features": features, "tokens": x_BxNxD, **captured}


def _mean(x_BxNxD: Array, batch: Mapping[str, Array]) -> Array:
    weight_BxNx1 = batch["mask"][..., None].astype(jnp.float32)
    return (x_BxNxD * weight_BxNx1).sum(1) / jnp.maximum(weight_BxNx1.sum(1), 1e-9)


def _mean_of_sentences(x_RxNxD: Array, batch: Mapping[str, Array]) -> Array:
    """``[S, D]``; 0 for a sentence without tokens, as `_mean` gives."""
    sentences = batch["first"].shape[0]
    # Padding has a segment of its own, the last, which is left out.
    segment = jnp.where(batch["sentence"] < 0, sentences, batch["sentence"]).ravel()
    add = functools.partial(jax.ops.segment_sum, segment_ids=segment, num_segments=sentences + 1)
    total_SxD = add(x_RxNxD.reshape(segment.size, -1).astype(jnp.float32))[:-1]
    return total_SxD / jnp.maximum(add(jnp.ones(segment.size))[:-1, None], 1e-9)


def _types(config: Config, table: Any, batch: Mapping[str, Array]) -> Array:
    """What the tokens' types add: ``[1, d]`` where all have type 0, else ``[B, N, d]``."""
    if "type_ids" not in batch or config.type_vocab_size == 1:
        return table.take(jnp.zeros(1, jnp.int32), axis=0)
    # A table may merge the rows that are asked for: ask for each once.
    return jnp.take(table.take(jnp.arange(config.type_vocab_size), axis=0), batch["type_ids"], axis=0)


def _positions(config: Config, batch: Mapping[str, Array]) -> Array:
    """Positions ``[N]``, or ``[B, N]`` where they depend on the padding."""
    if config.model_type == "bert":
        return jnp.arange(batch["ids"].shape[1])
    counted_BxN = batch["mask"] & (batch["ids"] != config.pad_token_id)
    return jnp.where(counted_BxN, jnp.cumsum(counted_BxN, axis=1), 0) + config.pad_token_id


def _packed_positions(config: Config, batch: Mapping[str, Array]) -> Array:
    """Positions ``[R, N]``, which begin anew with every sentence."""
    ids_RxN, sentence_RxN, first_S = batch["ids"], batch["sentence"], batch["first"]
    begin_RxN = first_S[sentence_RxN]  # of padding, whose position does not matter, that of the last sentence
    if config.model_type == "bert":
        return jnp.where(sentence_RxN < 0, 0, jnp.arange(ids_RxN.size).reshape(ids_RxN.shape) - begin_RxN)
    counted = ((sentence_RxN >= 0) & (ids_RxN != config.pad_token_id)).ravel()
    before = jnp.cumsum(counted) - counted
    position_RxN = (before + 1).reshape(ids_RxN.shape) - before[begin_RxN]
    return jnp.where(counted.reshape(ids_RxN.shape), position_RxN, 0) + config.pad_token_id


def _block(config: Config, bias: Array, weights: Tree, x: Array, tap: layers.Tap, state: None) -> tuple[Array, None]:
    attention = layers.self_attention(config.num_attention_heads, bias, tap)
    for name, run in (("attention", attention), ("mlp", layers.mlp("gelu"))):
        y = tap.drop(tap(name, run, weights[name], x))
        x = layers.layer_norm(weights[name]["norm"], x + y, config.layer_norm_eps)
    return x, state
