"""What every model here is: a pure function over a nested dict of arrays, and what is known of it without weights."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from taskvec.io.names import Table
from taskvec.tree import Tree

Array = jax.Array

# Fields of configs that no output depends on (names, where texts end), or that show in the names and shapes of params.
_SEEN_ELSEWHERE = {
    "architectures", "labels", "eos_token_id", "pad_token_id", "projected", "projection_dim", "vocab_size", "n_inner",
    "max_position_embeddings",
}  # fmt: skip


class State(NamedTuple):
    """What a model keeps between two tokens that it generates; B is the batch, or batch x beams.

    Attributes:
      cache: tree of ``[L, B, ...]``, keys and values of the tokens so far.
      rows: tree of ``[B, ...]``, what else belongs to one text.
      fixed: tree of ``[L, B, ...]`` that no token changes (keys and values of an encoder's output); the beams of a text
        share it.
      slot: int32, where in the cache the next token is written.
    """

    cache: Tree
    rows: Tree
    fixed: Tree
    slot: Array


class Steps(NamedTuple):
    """How a model generates token after token; options as for `Model.apply`.

    Attributes:
      start: ``(params, batch, room, **options) -> (logits [B, V], State)``: reads the prompts, keeps room for that many
        tokens more, and gives the logits of the first.
      step: ``(params, ids [B], state, **options) -> (logits [B, V], State)``: takes one token a text, gives the logits
        of the next.
    """

    start: Callable[..., tuple[Array, State]]
    step: Callable[..., tuple[Array, State]]


class Model(NamedTuple):
    """A model without its weights.

    Attributes:
      name: of the architecture, as in the registry of `taskvec.models`.
      config: frozen dataclass made from ``config.json`` by ``from_json``; ``to_json`` gives the fields back.
      apply: ``apply(params, batch, **options)`` -> dict with ``features``, float32 ``[B, feature_dim]``, pooled and not
        normalised. The options are those of `taskvec.models.layers.Options`.
      abstract: tree of `jax.ShapeDtypeStruct` that the params have.
      feature_dim: d.
      scanned: whether layers are stacked under dicts called ``blocks`` and `apply` honours `layer_params`.
      table: names of the tensors in a Hugging Face file; ``None`` for models that have no such file.
      steps: for `taskvec.models.decoding`; ``None`` for models that generate nothing.
      packs: whether `apply` also takes several texts in a row (`taskvec.data.packing`).
    """

    name: str
    config: Any
    apply: Callable[..., dict[str, Array]]
    abstract: Tree
    feature_dim: int
    scanned: bool
    table: Table | None = None
    steps: Steps | None = None
    packs: bool = False


def fields_of(cls: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``config.json`` says of the fields of a dataclass; lists as tuples, so that configs can be compared."""
    given = {f.name: fields[f.name] for f in dataclasses.fields(cls) if f.name in fields}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def differences(mine: Model, other: Model) -> dict[str, tuple[Any, Any]]:
    """The fields by which two configs make different functions of the same params, each with both values.

    Left out are fields that no output depends on, and sizes that the shapes of the params show. ``pad_token_id`` counts
    for RoBERTa alone, whose positions begin after it.
    """
    if mine.name != other.name:
        return {"model_type": (mine.name, other.name)}
    skipped = _SEEN_ELSEWHERE - ({"pad_token_id"} if mine.name == "roberta" else set())
    mine, other = (_leaves(model.config) for model in (mine, other))
    return {
        name: (value, other[name])
        for name, value in mine.items()
        if value != other[name] and name.rpartition(".")[2] not in skipped
    }


def _leaves(config: Any, at: str = "") -> dict[str, Any]:
    """The fields of a config and of those in it, by names with dots."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found |= _leaves(value, f"{at}{field.name}.") if dataclasses.is_dataclass(value) else {at + field.name: value}
    return found
