"""A merge that can start: what is known of it, and how its numbers are counted."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from taskvec.commands.request import Request
from taskvec.io.folders import Model
from taskvec.io.lora import ADAPTER_WEIGHTS
from taskvec.merging.stream_plan import Streaming, nbytes


@dataclasses.dataclass(frozen=True)
class Part:
    """One call of `merge_streamed`; a request makes one, a recipe may make several.

    Attributes:
      method, pretrained, finetuned: as `merge_streamed` takes them.
      options: its further arguments.
      streaming: what it will do.
    """

    method: Any
    pretrained: Any
    finetuned: Sequence[Any]
    options: Mapping[str, Any]
    streaming: Streaming


@dataclasses.dataclass(frozen=True)
class Job:
    """A merge that can start.

    Attributes:
      request: with every setting resolved.
      models: by label; the first gives config and tokenizer files.
      parts: what to run.
      specs: shapes and dtypes of all tensors that will be written.
      copies: ``{tensor: tensor that it is tied to}``, written twice.
      kept: tensors copied from the first model though they are no part of the merge.
      config: fields of ``config.json`` that change, besides its dtype.
      dtype: of the floating-point tensors written; "" for that of each in the first model.
      rows: the coefficients, for recipes.
      notes: what the user should know.
      extras: what the method takes besides models, by label.
    """

    request: Request
    models: Mapping[str, Model]
    parts: tuple[Part, ...]
    specs: Mapping[str, jax.ShapeDtypeStruct]
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kept: tuple[str, ...] = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = ""
    rows: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()
    extras: Mapping[str, Model] = dataclasses.field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Model]:
        """All that is read, by label."""
        return {**self.models, **self.extras}

    @property
    def first(self) -> Model:
        """The model that config and tokenizer files are copied from."""
        return next(iter(self.models.values()))

    @property
    def write_bytes(self) -> int:
        """Size of the tensors that will be written."""
        return sum(nbytes(spec) for spec in self.specs.values())

    @property
    def read_bytes(self) -> int:
        """What all passes together read."""
        return sum(part.streaming.read_bytes for part in self.parts)

    @property
    def single_name(self) -> str:
        """The file name of the weights where a folder has one fixed name for them, or ""."""
        return ADAPTER_WEIGHTS if self.first.kind == "factors" else ""


class Zeros:
    """A reader of zeros: the base of an adapter's factors."""

    def __init__(self, specs: Mapping[str, Any]):
        self.specs = specs

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Zeros in the shape of a tensor, or of some of its rows."""
        spec = self.specs[name]
        length, *rest = spec.shape or (1,)
        count = len(range(*(rows or slice(None)).indices(length)))
        return np.zeros((count, *rest) if spec.shape else (), spec.dtype)


def notes(models: Mapping[str, Model]) -> list[str]:
    """What the user should know of how models are read and what comes with them."""
    told = []
    for label, model in models.items():
        if model.kind == "orbax":
            told.append(f"{label} is an orbax checkpoint: its leaves are restored whole, which takes memory and time")
        if model.kind == "lora":
            told.append(f"{label} is a LoRA adapter: read as its base plus the product of its factors")
    first, model = next(iter(models.items()))
    if model.home is None:
        told.append(f"{first} is no model folder: no config or tokenizer files will be written")
    return told
