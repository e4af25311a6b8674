"""Greedy and beam search, jitted, over any model that generates token after token (`base.Steps`).

    out = decoding.generate(model, params, {"ids": ids, "mask": mask}, max_new_tokens=20, num_beams=4)
    texts = [tokenizer.decode(row[keep]) for row, keep in zip(out.ids, out.mask)]

What is found equals what transformers' ``generate`` finds without sampling and without processors of logits; its
``generation_config.json`` is not read. One compilation for every shape of the batch and every setting.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from taskvec.models.base import Array, Model, State, Steps
from taskvec.tree import Tree

_NEVER = -1e9


class Generated(NamedTuple):
    """New tokens.

    Attributes:
      ids: int32 ``[B, max_new_tokens]``, without the prompt; padding after the end of a text.
      mask: bool ``[B, max_new_tokens]``, true up to and with the token that ends the text.
      score: float32 ``[B]``, the log probability of the new tokens, divided by ``length ** length_penalty``.
    """

    ids: Array
    mask: Array
    score: Array


class _Search(NamedTuple):
    """The settings of a search; part of the key of its compilation."""

    new: int
    beams: int
    eos: tuple[int, ...]
    pad: int
    length_penalty: float
    early_stopping: bool | str
    how: tuple[tuple[str, Any], ...]


def generate(
    model: Model,
    params: Tree,
    batch: Mapping[str, Array],
    max_new_tokens: int,
    num_beams: int = 1,
    *,
    eos: int | tuple[int, ...] | None = None,
    pad: int | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    dtype: Any = None,
    layer_params: Callable[[Tree], Tree] | None = None,
) -> Generated:
    """Generates the most probable texts, greedily or by beam search.

    Args:
      model: with `steps`: GPT-2, Llama-like, T5.
      params: of the model.
      batch: prompts, as for ``model.apply``: padded at either side. Encoder-decoders start from ``decoder_ids`` if
        given.
      max_new_tokens: the most tokens a text gets.
      num_beams: 1 takes the best token every time.
      eos: tokens that end a text; by default those of the config, () for none.
      pad: written after the end; by default that of the config, or the first of `eos`, or 0.
      length_penalty: beams are compared by ``log probability / length ** length_penalty``; only for `num_beams` > 1.
      early_stopping: when a text's search ends: False when the running beams are unlikely to do better than the
        finished ones, True when there are `num_beams` finished ones, ``"never"`` when none can do better.
      dtype, layer_params: see `taskvec.models.layers.Options`.

    Raises:
      ValueError: a model that generates nothing, a count below 1, or texts that get too long for the model.
    """
    if model.steps is None:
        raise ValueError(f"{model.name} generates no text: it has no output embeddings")
    if max_new_tokens < 1 or num_beams < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} and num_beams {num_beams} must be 1 or more")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping {early_stopping!r} is not one of False, True, 'never'")
    eos = model.config.eos_token_id if eos is None else eos
    eos = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    pad = model.config.pad_token_id if pad is None else pad
    pad = (eos[0] if eos else 0) if pad is None else pad
    how = (("dtype", dtype), ("layer_params", layer_params))
    search = _Search(max_new_tokens, num_beams, eos, pad, float(length_penalty), early_stopping, how)
    return (_greedy if num_beams == 1 else _beam)(model.steps, search, params, dict(batch))


def _is_eos(search: _Search, ids: Array) -> Array:
    return jnp.isin(ids, jnp.array(search.eos, ids.dtype)) if search.eos else jnp.zeros(ids.shape, bool)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _greedy(steps: Steps, search: _Search, params: Tree, batch: Mapping[str, Array]) -> Generated:
    how = dict(search.how)

    def choose(count, logits_BxV, out, ended_B):
        """Writes the best tokens; texts that have ended get padding."""
        best_B = jnp.where(ended_B, search.pad, logits_BxV.argmax(-1).astype(jnp.int32))
        gain_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BxV), best_B[:, None], axis=1)[:, 0]
        out = Generated(
            out.ids.at[:, count].set(best_B),
            out.mask.at[:, count].set(~ended_B),
            out.score + jnp.where(ended_B, 0.0, gain_B),
        )
        return count + 1, out, ended_B | _is_eos(search, best_B)

    def more(carry):
        (count, _, ended_B), _ = carry
        return (count < search.new) & ~ended_B.all()

    def advance(carry):
        (count, out, ended_B), state = carry
        logits_BxV, state = steps.step(params, out.ids[:, count - 1], state, **how)
        return choose(count, logits_BxV, out, ended_B), state

    logits_BxV, state = steps.start(params, batch, search.new, **how)
    rows = len(logits_BxV)
    nothing = Generated(
        jnp.full((rows, search.new), search.pad, jnp.int32), jnp.zeros((rows, search.new), bool), jnp.zeros(rows)
    )
    first = choose(jnp.int32(0), logits_BxV, nothing, jnp.zeros(rows, bool))
    (_, out, _), _ = lax.while_loop(more, advance, (first, state))
    return out._replace(score=out.score / out.mask.sum(1) ** search.length_penalty)


class _Beams(NamedTuple):
    """The state of a beam search: K running and K finished texts a prompt, best first.

    Attributes:
      count: how many tokens were generated.
      ids_BxKxM, score_BxK: the running texts; the sum of their log probabilities.
      parent_BxK: the running beams of which these are continuations.
      done_BxKxM, length_BxK, done_score_BxK, finished_BxK: the finished texts; their scores, which length penalises;
        which of them are texts at all.
      open_B: whether a running text could still be better than the finished ones.
      stuck: whether no candidate can be continued.
    """

    count: Array
    ids_BxKxM: Array
    score_BxK: Array
    parent_BxK: Array
    done_BxKxM: Array
    length_BxK: Array
    done_score_BxK: Array
    finished_BxK: Array
    open_B: Array
    stuck: Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def _beam(steps: Steps, search: _Search, params: Tree, batch: Mapping[str, Array]) -> Generated:
    how, k = dict(search.how), search.beams
    logits_BxV, state = steps.start(params, batch, search.new, **how)
    rows, vocabulary = logits_BxV.shape

    def more(carry):
        beams, _ = carry
        full = beams.finished_BxK.all() & (search.early_stopping is True)
        return beams.open_B.any() & ~full & ~beams.stuck

    def advance(carry):
        beams, state = carry
        # The running texts are already the new ones, the cache still belongs to those they continue.
        state = _reorder(state, (jnp.arange(rows)[:, None] * k + beams.parent_BxK).ravel())
        last = lax.dynamic_index_in_dim(beams.ids_BxKxM, beams.count - 1, axis=2, keepdims=False)
        logits, state = steps.step(params, last.ravel(), state, **how)
        return _choose(search, beams, logits.reshape(rows, k, vocabulary)), state

    blank = jnp.full((rows, k, search.new), search.pad, jnp.int32)
    none = jnp.full((rows, k), _NEVER, jnp.float32)
    beams = _Beams(
        count=jnp.int32(0), ids_BxKxM=blank, score_BxK=none.at[:, 0].set(0.0),
        parent_BxK=jnp.zeros((rows, k), jnp.int32), done_BxKxM=blank, length_BxK=jnp.zeros((rows, k), jnp.int32),
        done_score_BxK=none, finished_BxK=jnp.zeros((rows, k), bool), open_B=jnp.ones(rows, bool),
        stuck=jnp.array(False),
    )  # fmt: skip
    # All beams start as the prompt; the scores let only the first one continue.
    beams = _choose(search, beams, jnp.broadcast_to(logits_BxV[:, None], (rows, k, vocabulary)))
    beams, _ = lax.while_loop(more, advance, (beams, _repeat(state, k)))
    mask = jnp.arange(search.new) < beams.length_BxK[:, :1]
    return Generated(jnp.where(mask, beams.done_BxKxM[:, 0], search.pad), mask, beams.done_score_BxK[:, 0])


def _choose(search: _Search, beams: _Beams, logits_BxKxV: Array) -> _Beams:
    """Continues every running text by one token: the best go on running, those that ended compete with the finished."""
    k, count = search.beams, beams.count + 1
    rows, _, vocabulary = logits_BxKxV.shape
    # Enough candidates that K of them go on even if every beam has all its ends among them.
    keep = min(max(2, 1 + len(search.eos)) * k, k * vocabulary)
    score_BxKxV = jax.nn.log_softmax(logits_BxKxV.astype(jnp.float32)) + beams.score_BxK[..., None]
    score_BxC, index_BxC = lax.top_k(score_BxKxV.reshape(rows, k * vocabulary), keep)
    parent_BxC, token_BxC = index_BxC // vocabulary, (index_BxC % vocabulary).astype(jnp.int32)
    ids_BxCxM = _pick(beams.ids_BxKxM, parent_BxC)
    ids_BxCxM = lax.dynamic_update_index_in_dim(ids_BxCxM, token_BxC, beams.count, axis=2)
    ends_BxC = _is_eos(search, token_BxC) | (count == search.new)

    running_score, running = lax.top_k(jnp.where(ends_BxC, score_BxC + _NEVER, score_BxC), k)
    # Only the best K candidates may end here, and only where the search goes on.
    takes_part = ends_BxC & (jnp.arange(keep) < k)[None]
    full_B = beams.finished_BxK.all(1) & (search.early_stopping is True)
    counts = takes_part & (beams.open_B & ~full_B)[:, None]
    ended_score = jnp.where(counts, score_BxC / count.astype(jnp.float32) ** search.length_penalty, _NEVER)
    done_score, best = lax.top_k(jnp.concatenate([beams.done_score_BxK, ended_score], axis=1), k)
    finished = _pick(jnp.concatenate([beams.finished_BxK, counts], axis=1), best)

    reach = search.new if search.early_stopping == "never" and search.length_penalty > 0 else count
    hope_B = running_score[:, 0] / jnp.asarray(reach, jnp.float32) ** search.length_penalty
    worst_BxK = jnp.where(finished, done_score.min(1, keepdims=True), _NEVER)
    return _Beams(
        count=count,
        ids_BxKxM=_pick(ids_BxCxM, running),
        score_BxK=running_score,
        parent_BxK=_pick(parent_BxC, running).astype(jnp.int32),
        done_BxKxM=_pick(jnp.concatenate([beams.done_BxKxM, ids_BxCxM], axis=1), best),
        length_BxK=_pick(jnp.concatenate([beams.length_BxK, jnp.full((rows, keep), count)], axis=1), best),
        done_score_BxK=done_score,
        finished_BxK=finished,
        open_B=beams.open_B & (hope_B[:, None] > worst_BxK).any(1),
        stuck=ends_BxC.all(),
    )


def _pick(x_BxCx: Array, index_BxK: Array) -> Array:
    """The entries of axis 1 with these numbers."""
    return jnp.take_along_axis(x_BxCx, index_BxK.reshape(*index_BxK.shape, *[1] * (x_BxCx.ndim - 2)), axis=1)


def _repeat(state: State, beams: int) -> State:
    """The state of every text once a beam."""
    cache, fixed = (jax.tree.map(lambda a: jnp.repeat(a, beams, axis=1), t) for t in (state.cache, state.fixed))
    return State(cache, jax.tree.map(lambda a: jnp.repeat(a, beams, axis=0), state.rows), fixed, state.slot)


def _reorder(state: State, index: Array) -> State:
    """The state with these beams; what is fixed is the same for all beams of a text."""
    cache = jax.tree.map(lambda a: a.take(index, axis=1), state.cache)
    return state._replace(cache=cache, rows=jax.tree.map(lambda a: a.take(index, axis=0), state.rows))
