"""What decoder-only language models share: the forward pass over whole texts, and token after token with a cache.

A family says how it embeds, what a block does, and how the last layer becomes logits; see `Family`. Tokens stand in the
slots of the cache in which the batch has them: texts may be padded at either side, and generated tokens follow after
the longest text. What a token may see depends on slots, its position on how many tokens came before it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from taskvec.models import layers
from taskvec.models.base import Array, State, Steps
from taskvec.tree import Tree


class Context(NamedTuple):
    """Where the tokens of a call stand.

    Attributes:
      position_BxN: how many tokens of the text came before.
      bias: for `layers.attend`.
      slot: of the first token in the cache; ``None`` without one.
      keep: whether blocks return their keys and values.
    """

    position_BxN: Array
    bias: Array
    slot: Array | None = None
    keep: bool = False


class Family(NamedTuple):
    """A kind of decoder.

    Attributes:
      check: ``(config, length)`` raises `ValueError` for texts that are too long.
      embed: ``(config, params, ids [B, N], positions [B, N]) -> [B, N, D]``.
      block: ``(config, context, weights, x, tap, state) -> (x, state)``.
      norm: ``(config, params, x) -> x``, the final norm.
      logits: ``(config, params, x [..., D]) -> [..., V]`` float32, or ``None`` if the model has no head.
    """

    check: Callable[[Any, int], None]
    embed: Callable[..., Array]
    block: Callable[..., tuple[Array, Tree]]
    norm: Callable[..., Array]
    logits: Callable[..., Array | None]


def apply(family: Family, config: Any, params: Tree, batch: Mapping[str, Array], **how: Any) -> dict[str, Array]:
    """Runs a decoder over whole texts.

    Args:
      family: of the model.
      config: of the model.
      params: as its `abstract` describes.
      batch: ``ids`` int32 ``[B, N]``, ``mask`` bool ``[B, N]``, false at padding, which may be at either side.
      **how: see `taskvec.models.layers.Options`.

    Returns:
      ``features`` float32 ``[B, d]``, the last layer at the last token of the mask (what transformers'
      ``...ForSequenceClassification`` scores); ``tokens`` ``[B, N, d]``, the last layer after its norm; ``logits``
      float32 ``[B, N, V]`` if the model has a head; captured pieces.

    Raises:
      ValueError: texts longer than the model can read.
    """
    options = layers.options_of(how)
    mask = batch["mask"]
    family.check(config, mask.shape[1])
    context = Context(_positions(mask), layers.causal_bias(mask))
    x, captured, _ = _run(family, config, params, batch["ids"], context, options)
    out = {"features": _last(x, mask).astype(jnp.float32), "tokens": x, **captured}
    logits = family.logits(config, _head(params, options), x)
    return out if logits is None else {**out, "logits": logits}


def steps(family: Family, config: Any) -> Steps:
    """How such a model generates."""

    def first(params: Tree, batch: Mapping[str, Array], room: int, **how: Any) -> tuple[Array, State]:
        options, mask = layers.options_of(how), batch["mask"]
        length = mask.shape[1]
        family.check(config, length + room)
        context = Context(_positions(mask), layers.causal_bias(mask), keep=True)
        x, _, cache = _run(family, config, params, batch["ids"], context, options)
        cache = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))), cache)
        rows = {"mask": jnp.pad(mask, ((0, 0), (0, room))), "position": mask.sum(1, dtype=jnp.int32)}
        logits = family.logits(config, _head(params, options), _last(x, mask))
        return logits, State(cache, rows, {}, jnp.asarray(length, jnp.int32))

    def step(params: Tree, ids_B: Array, state: State, **how: Any) -> tuple[Array, State]:
        options, position_B = layers.options_of(how), state.rows["position"]
        mask = state.rows["mask"].at[:, state.slot].set(True)
        context = Context(position_B[:, None], layers.padding_bias(mask), state.slot, keep=True)
        x, _, new = _run(family, config, params, ids_B[:, None], context, options, state.cache)
        rows = {"mask": mask, "position": position_B + 1}
        logits = family.logits(config, _head(params, options), x[:, 0])
        return logits, State(write(state.cache, new, state.slot), rows, {}, state.slot + 1)

    return Steps(first, step)


def write(cache: Tree, new: Tree, slot: Array) -> Tree:
    """The stacked cache ``[L, B, K, G, C]`` with new tokens from `slot` on."""
    return jax.tree.map(lambda old, x: lax.dynamic_update_slice_in_dim(old, x, slot, axis=2), cache, new)


def tied_logits(word_VxD: Any, x: Array) -> Array:
    """``x @ word.T`` in float32; the table may be one that makes its array only when asked (``__jax_array__``)."""
    return jnp.einsum("...d,vd->...v", x, jnp.asarray(word_VxD).astype(x.dtype)).astype(jnp.float32)


def _run(
    family: Family, config: Any, params: Tree, ids: Array, context: Context, options: layers.Options, cache: Tree = None
) -> tuple[Array, dict[str, Array], Tree]:
    x = family.embed(config, params, ids, context.position_BxN)
    x = x if options.dtype is None else x.astype(options.dtype)

    def block(weights: Tree, x: Array, tap: layers.Tap, state: Tree) -> tuple[Array, Tree]:
        return family.block(config, context, weights, x, tap, state)

    x = layers.Tap(options, options.key).drop(x)
    x, captured, cache = layers.run_blocks(block, params["blocks"], x, options, cache)
    return family.norm(config, params, x), captured, cache


def _head(params: Tree, options: layers.Options) -> Tree:
    """The params with the head, which stands outside the blocks, in the dtype of the computation."""
    return {**params, "head": layers.cast(params["head"], options.dtype)} if "head" in params else params


def _positions(mask_BxN: Array) -> Array:
    return jnp.maximum(jnp.cumsum(mask_BxN, axis=1, dtype=jnp.int32) - 1, 0)


def _last(x_BxNxD: Array, mask_BxN: Array) -> Array:
    """The last token of the mask."""
    last_B = jnp.where(mask_BxN, jnp.arange(mask_BxN.shape[1]), 0).max(1)
    return jnp.take_along_axis(x_BxNxD, last_B[:, None, None], axis=1)[:, 0]
