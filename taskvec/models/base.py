"""What every model here is: a pure function over a nested dict of arrays, and what is known of it without weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from taskvec.tree import Tree

Array = jax.Array


class Model(NamedTuple):
    """A model without its weights.

    Attributes:
      name: of the architecture, as in the registry of `taskvec.models`.
      config: frozen dataclass made from ``config.json``.
      apply: ``apply(params, batch, *, layer_params=None)`` -> dict with ``features``, float32 ``[B, feature_dim]``,
        pooled and not normalised. `layer_params` maps one layer's slice of ``params["blocks"]`` to the weights of that
        layer (default: the slice itself), so that a caller can merge one layer at a time inside the scan.
      abstract: tree of `jax.ShapeDtypeStruct` that the params have.
      feature_dim: d.
      scanned: whether layers are stacked under ``blocks`` and `apply` honours `layer_params`.
    """

    name: str
    config: Any
    apply: Callable[..., dict[str, Array]]
    abstract: Tree
    feature_dim: int
    scanned: bool
