"""MergeKit's recipes, run by this library's chains.

    recipe = recipes.load("recipe.yml")
    for group in recipe.groups(SafetensorsReader):
        merge_streamed(group.method, group.pretrained, group.finetuned, write, dtype=recipe.dtype)

What is read: ``merge_method``, ``models`` or ``slices``, ``base_model``, ``parameters`` with per-layer gradients and
filters, ``dtype`` and ``out_dtype``. A gradient's first knot also holds for embeddings, final norm and head; a slice of
one layer takes the last. What is refused, and why: `grammar.REFUSED`. Arithmetic is float32 whatever ``dtype`` says; it
is the dtype of the output if ``out_dtype`` is not given.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from taskvec.merging.stream_plan import Reader
from taskvec.recipes.grammar import Parsed, parse as parse_mapping, read
from taskvec.recipes.groups import Group, Row, View, make_groups, make_table

__all__ = ["Group", "Recipe", "Row", "View", "load", "parse"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
      parsed: its content.
    """

    parsed: Parsed

    @property
    def dtype(self) -> Any:
        """Of the merged floating-point tensors; ``None`` keeps that of the inputs."""
        return self.parsed.dtype

    @property
    def models(self) -> tuple[str, ...]:
        """References to all models that are read, the base first."""
        named = [source.model for one in self.parsed.slices for source in one.sources]
        first = [self.reference] if self.reference in named else []
        return tuple(dict.fromkeys([*first, *named]))

    @property
    def reference(self) -> str:
        """The model whose configuration and tokenizer go with the result."""
        return self.parsed.base_model or self.parsed.slices[0].sources[0].model

    @property
    def num_layers(self) -> int | None:
        """Layers of the output where slices are stacked (for its configuration); ``None`` where they do not change."""
        if self.parsed.whole:
            return None
        return sum(one.sources[0].layers[1] - one.sources[0].layers[0] for one in self.parsed.slices)

    def groups(self, open_model: Callable[[str], Reader]) -> list[Group]:
        """Output tensors by equal settings; every output tensor is in one group.

        Args:
          open_model: makes a reader of a reference as the recipe has it, ``path[@revision][+lora[@revision]]``.

        Raises:
          ValueError: what cannot be merged, from names, shapes and dtypes alone.
        """
        return make_groups(self.parsed, open_model)

    def table(self, open_model: Callable[[str], Reader]) -> list[Row]:
        """What a dry run shows: for every group of tensors and every model the resolved coefficients."""
        return make_table(self.groups(open_model))


def load(path: str | pathlib.Path) -> Recipe:
    """Reads and checks a YAML file; raises `ValueError` that says what is wrong and where."""
    return parse(read(path))


def parse(given: Mapping) -> Recipe:
    """Checks a recipe that is a mapping already."""
    return Recipe(parse_mapping(given))
