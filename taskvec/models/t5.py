"""T5 (arXiv 1910.10683) and Flan-T5 (arXiv 2210.11416): encoder-decoder with relative positions.

Pre-norm blocks with RMS norms and no biases; attention logits are not scaled, but get a bias that depends on the
bucket of the distance, learned once a stack and shared by its layers. The first T5 has a ReLU MLP and ties the output
embeddings, then scaling the last layer by ``d_model ** -0.5``; version 1.1 and Flan-T5 have a gated GELU and output
embeddings of their own. Checked against ``transformers`` to 1e-5.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from taskvec.io import names
from taskvec.models import causal, layers, relative
from taskvec.models.base import Array, Model, State, Steps, fields_of
from taskvec.tree import Tree

# ``feed_forward_proj`` -> (activation, whether the MLP is gated); what the config calls gelu is its tanh approximation.
MLPS = {"relu": ("relu", False), "gated-gelu": ("gelu_new", True)}


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of a Hugging Face ``config.json`` that the model depends on, under their names there.

    ``tie_word_embeddings`` is false for files that hold output embeddings of their own (``scale_decoder_outputs``
    false, in configs that transformers 5 wrote).
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = 0
    decoder_start_token_id: int = 0

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Config":
        """Makes a config; raises `ValueError` for what this implementation does not compute."""
        given = {name: value for name, value in fields_of(cls, fields).items() if value is not None}
        given["num_decoder_layers"] = given.get("num_decoder_layers") or fields["num_layers"]
        # transformers 5 writes tie_word_embeddings=true for every T5, and in this field what it was.
        given["tie_word_embeddings"] = fields.get("scale_decoder_outputs", given.get("tie_word_embeddings", True))
        given.setdefault("decoder_start_token_id", given.get("pad_token_id", 0))
        config = cls(**given)
        if config.feed_forward_proj not in MLPS:
            raise ValueError(
                f"config.json has feed_forward_proj={config.feed_forward_proj!r}; supported are {', '.join(MLPS)}"
            )
        if unknown := [n for n in fields.get("architectures") or () if n != "T5ForConditionalGeneration"]:
            raise ValueError(f"config.json is of a {unknown[0]}; only T5ForConditionalGeneration is supported")
        return config

    def to_json(self) -> dict[str, Any]:
        """The fields of a ``config.json`` that says the same."""
        return {
            **dataclasses.asdict(self), "model_type": "t5", "is_encoder_decoder": True,
            "architectures": ["T5ForConditionalGeneration"],
        }  # fmt: skip

    @property
    def gated(self) -> bool:
        """Whether the MLP is gated."""
        return MLPS[self.feed_forward_proj][1]


def table(config: Config) -> names.Table:
    """Names of the tensors in a file."""
    rules = [names.Rule("shared.weight", "embeddings/word")]
    letters = {"query": "q", "key": "k", "value": "v", "output": "o"}
    ups = {"gate": "wi_0", "up": "wi_1"} if config.gated else {"up": "wi"}
    for stack in ("encoder", "decoder"):
        layer, blocks = f"{stack}.block.{{}}.layer", f"{stack}/blocks/{{}}"
        halves = [("SelfAttention", "attention", letters), ("DenseReluDense", "mlp", {**ups, "down": "wo"})]
        if stack == "decoder":
            halves.insert(1, ("EncDecAttention", "cross_attention", letters))
        for i, (theirs, mine, parts) in enumerate(halves):
            rules += names.norm(f"{layer}.{i}.layer_norm", f"{blocks}/{mine}_norm", bias=False)
            for name, part in parts.items():
                rules += names.dense(f"{layer}.{i}.{theirs}.{part}", f"{blocks}/{mine}/{name}", bias=False)
        rules += names.norm(f"{stack}.final_layer_norm", f"{stack}/norm", bias=False)
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        rules.append(names.Rule(first, f"{stack}/relative_bias"))
    copies = [(f"{stack}.embed_tokens.weight", "embeddings/word") for stack in ("encoder", "decoder")]
    if config.tie_word_embeddings:
        copies.append(("lm_head.weight", "embeddings/word"))
    else:
        rules += names.dense("lm_head", "head", bias=False)
    # In old files, and never used.
    ignore = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)
    return names.Table(tuple(rules), ignore, copies=tuple(copies))


def make(config: Config, dtype: Any = jnp.float32) -> Model:
    """The model of a config; `dtype` is that of its params."""
    return Model(
        name="t5",
        config=config,
        apply=functools.partial(apply, config),
        abstract=abstract(config, dtype),
        feature_dim=config.d_model,
        scanned=True,
        table=table(config),
        steps=Steps(functools.partial(_start, config), functools.partial(_step, config)),
    )


def abstract(config: Config, dtype: Any = jnp.float32) -> Tree:
    """Shapes and dtypes of the params."""
    d, ff, inner = config.d_model, config.d_ff, config.num_heads * config.d_kv

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def stack(depth: int, attentions: tuple[str, ...]) -> Tree:
        shapes = {"query": (d, inner), "key": (d, inner), "value": (d, inner), "output": (inner, d)}
        parts = dict.fromkeys(attentions, shapes)
        parts["mlp"] = {**({"gate": (d, ff)} if config.gated else {}), "up": (d, ff), "down": (ff, d)}
        blocks = {n: {k: {"kernel": array(depth, *s)} for k, s in part.items()} for n, part in parts.items()}
        return {
            "blocks": blocks | {f"{name}_norm": {"scale": array(depth, d)} for name in parts},
            "norm": {"scale": array(d)},
            "relative_bias": array(config.relative_attention_num_buckets, config.num_heads),
        }

    tree = {"embeddings": {"word": array(config.vocab_size, d)}, "encoder": stack(config.num_layers, ("attention",))}
    tree["decoder"] = stack(config.num_decoder_layers, ("attention", "cross_attention"))
    return tree if config.tie_word_embeddings else {**tree, "head": {"kernel": array(d, config.vocab_size)}}


def apply(config: Config, params: Tree, batch: Mapping[str, Array], **how: Any) -> dict[str, Array]:
    """Runs the encoder, and the decoder if the batch says what it reads.

    Args:
      config: of the model.
      params: as `abstract` describes.
      batch: ``ids`` int32 ``[B, N]`` and ``mask`` bool ``[B, N]`` of the encoder; ``decoder_ids`` int32 ``[B, M]``, the
        answers shifted right behind ``decoder_start_token_id`` (teacher forcing), padded at the end or not at all.
      **how: see `taskvec.models.layers.Options`. Hooks and `layer_params` serve the layers of both stacks;
        ``cross_attention`` is a piece of the decoder's.

    Returns:
      ``features`` float32 ``[B, d]``, the mean of the encoder's last layer over the tokens of the mask; ``tokens``
      ``[B, N, d]``, that layer; with ``decoder_ids`` also ``logits`` float32 ``[B, M, V]``; captured pieces as
      ``encoder_...`` and ``decoder_...``.
    """
    options = layers.options_of(how)
    encoded, captured = _encode(config, params, batch, options)
    weight_BxNx1 = batch["mask"][..., None].astype(jnp.float32)
    mean = (encoded * weight_BxNx1).sum(1) / jnp.maximum(weight_BxNx1.sum(1), 1e-9)
    out = {"features": mean, "tokens": encoded} | {f"encoder_{k}": v for k, v in captured.items()}
    if "decoder_ids" in batch:
        ids = batch["decoder_ids"]
        bias = layers.causal_bias(jnp.ones((1, ids.shape[1]), bool))
        bias += _relative_bias(config, params["decoder"], jnp.arange(ids.shape[1]), ids.shape[1], causal=True)
        block = functools.partial(
            _decoder_block, config, encoded, layers.padding_bias(batch["mask"]), bias, None, False
        )
        x, captured, _ = _stack(config, params, "decoder", block, ids, options)
        out |= {"logits": _logits(config, params, x)} | {f"decoder_{k}": v for k, v in captured.items()}
    return out


def _start(config: Config, params: Tree, batch: Mapping[str, Array], room: int, **how: Any) -> tuple[Array, State]:
    """Runs the encoder, and the decoder on ``decoder_ids``, which is ``decoder_start_token_id`` if absent."""
    options, mask = layers.options_of(how), batch["mask"]
    encoded, _ = _encode(config, params, batch, options)
    ids = batch.get("decoder_ids")
    if ids is None:
        ids = jnp.full((len(mask), 1), config.decoder_start_token_id, jnp.int32)
    length = ids.shape[1]
    bias = _causal_bias(config, params, length)
    block = functools.partial(_decoder_block, config, encoded, layers.padding_bias(mask), bias, None, True)
    x, _, kept = _stack(config, params, "decoder", block, ids, options)
    own = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))), kept["own"])
    return _logits(config, params, x[:, -1]), State(own, {"mask": mask}, kept["cross"], jnp.asarray(length, jnp.int32))


def _step(config: Config, params: Tree, ids_B: Array, state: State, **how: Any) -> tuple[Array, State]:
    options = layers.options_of(how)
    length = state.cache["key"].shape[2]
    bias = layers.padding_bias((jnp.arange(length) <= state.slot)[None])
    bias += _relative_bias(config, params["decoder"], state.slot[None], length, causal=True)
    other = layers.padding_bias(state.rows["mask"])
    block = functools.partial(_decoder_block, config, None, other, bias, state.slot, True)
    cache = {"own": state.cache, "cross": state.fixed}
    x, _, kept = _stack(config, params, "decoder", block, ids_B[:, None], options, cache)
    cache = causal.write(state.cache, kept["own"], state.slot)
    return _logits(config, params, x[:, 0]), state._replace(cache=cache, slot=state.slot + 1)


def _encode(
    config: Config, params: Tree, batch: Mapping[str, Array], options: layers.Options
) -> tuple[Array, dict[str, Array]]:
    length = batch["ids"].shape[1]
    bias = _relative_bias(config, params["encoder"], jnp.arange(length), length, causal=False)
    block = functools.partial(_encoder_block, config, bias + layers.padding_bias(batch["mask"]))
    x, captured, _ = _stack(config, params, "encoder", block, batch["ids"], options)
    return x, captured


def _causal_bias(config: Config, params: Tree, length: int) -> Array:
    bias = layers.causal_bias(jnp.ones((1, length), bool))
    return bias + _relative_bias(config, params["decoder"], jnp.arange(length), length, causal=True)


def _relative_bias(config: Config, stack: Tree, position_Q: Array, keys: int, causal: bool) -> Array:
    longest = config.relative_attention_max_distance
    return relative.bias(stack["relative_bias"], position_Q, keys, longest, both_ways=not causal)


def _stack(
    config: Config,
    params: Tree,
    name: str,
    block: layers.Block,
    ids: Array,
    options: layers.Options,
    cache: Tree = None,
) -> tuple[Array, dict[str, Array], Tree]:
    if options.key is not None:
        options = options._replace(key=jax.random.fold_in(options.key, ("encoder", "decoder").index(name)))
    x = params["embeddings"]["word"].take(ids, axis=0)
    x = x if options.dtype is None else x.astype(options.dtype)
    x = layers.Tap(options, options.key).drop(x)
    x, captured, cache = layers.run_blocks(block, params[name]["blocks"], x, options, cache)
    return layers.rms_norm(params[name]["norm"], x, config.layer_norm_epsilon), captured, cache


def _encoder_block(
    config: Config, bias: Array, weights: Tree, x: Array, tap: layers.Tap, state: None
) -> tuple[Array, None]:
    def attention(weights: Tree, x: Array) -> Array:
        return _attend(config, weights, x, _keys(config, weights, x), bias, tap)

    x = _half(config, "attention", attention, weights, x, tap)
    return _half(config, "mlp", functools.partial(_mlp, config), weights, x, tap), state


def _decoder_block(
    config: Config, encoded: Array | None, encoder_bias: Array, bias: Array, slot: Array | None, keep: bool,
    weights: Tree, x: Array, tap: layers.Tap, state: Tree,
) -> tuple[Array, Tree]:  # fmt: skip
    """`encoded` is needed where `state` is not; with `keep` the block returns its own and the encoder's new keys."""
    kept = {}

    def attention(weights: Tree, x: Array) -> Array:
        kept["own"] = _keys(config, weights, x)
        seen = layers.with_cache(None if state is None else state["own"], kept["own"], slot)
        return _attend(config, weights, x, seen, bias, tap)

    def cross_attention(weights: Tree, x: Array) -> Array:
        if state is None:
            kept["cross"] = _keys(config, weights, encoded)
        return _attend(config, weights, x, kept["cross"] if state is None else state["cross"], encoder_bias, tap)

    x = _half(config, "attention", attention, weights, x, tap)
    x = _half(config, "cross_attention", cross_attention, weights, x, tap)
    return _half(config, "mlp", functools.partial(_mlp, config), weights, x, tap), kept if keep else None


def _half(config: Config, name: str, run: Any, weights: Tree, x: Array, tap: layers.Tap) -> Array:
    y = layers.rms_norm(weights[f"{name}_norm"], x, config.layer_norm_epsilon)
    return x + tap.drop(tap(name, run, weights[name], y))


def _keys(config: Config, weights: Tree, x: Array) -> Tree:
    return {n: layers.split_heads(layers.dense(weights[n], x), config.num_heads) for n in ("key", "value")}


def _attend(config: Config, weights: Tree, x: Array, seen: Tree, bias: Array, tap: layers.Tap) -> Array:
    q = layers.split_heads(layers.dense(weights["query"], x), config.num_heads)
    return layers.dense(weights["output"], layers.attend(q, seen["key"], seen["value"], bias, 1.0, tap))


def _mlp(config: Config, weights: Tree, x: Array) -> Array:
    y = layers.ACTIVATIONS[MLPS[config.feed_forward_proj][0]](
        layers.dense(weights["gate" if config.gated else "up"], x)
    )
    return layers.dense(weights["down"], y * layers.dense(weights["up"], x) if config.gated else y)


def _logits(config: Config, params: Tree, x: Array) -> Array:
    if config.tie_word_embeddings:
        return causal.tied_logits(params["embeddings"]["word"], x * config.d_model**-0.5)
    return layers.dense(layers.cast(params["head"], x.dtype), x).astype(jnp.float32)
