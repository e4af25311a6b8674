"""What every model here is: a pure function over a nested dict of arrays, and what is known of it without weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from taskvec.io.names import Table
from taskvec.tree import Tree

Array = jax.Array


class Model(NamedTuple):
    """A model without its weights.

    Attributes:
      name: of the architecture, as in the registry of `taskvec.models`.
      config: frozen dataclass made from ``config.json`` by ``from_json``; ``to_json`` gives the fields back.
      apply: ``apply(params, batch, **options)`` -> dict with ``features``, float32 ``[B, feature_dim]``, pooled and not
        normalised. The options are those of `taskvec.models.layers.Options`.
      abstract: tree of `jax.ShapeDtypeStruct` that the params have.
      feature_dim: d.
      scanned: whether layers are stacked under ``blocks`` and `apply` honours `layer_params`.
      table: names of the tensors in a Hugging Face file; ``None`` for models that have no such file.
    """

    name: str
    config: Any
    apply: Callable[..., dict[str, Array]]
    abstract: Tree
    feature_dim: int
    scanned: bool
    table: Table | None = None
