"""What the user asked for, as plain data that a record can hold."""

import ast
import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from taskvec.io import provenance

DTYPES = ("float32", "bfloat16", "float16")
_UNITS = {"": 1, "B": 1} | {
    name: base**power
    for base, suffix in ((1000, "B"), (1024, "iB"))
    for power, letter in enumerate("KMGT", 1)
    for name in (letter + suffix,)
}


@dataclasses.dataclass(frozen=True)
class Request:
    """A merge, as asked for.

    Attributes:
      method: a registered name; "" if there is a recipe.
      settings: of the method, as far as they were given.
      base: the pretrained model, or "".
      experts: (label, model) of each.
      recipe: text of a recipe, or "".
      include: regular expression of the tensors that take part, or "".
      dtype: of the floating-point tensors written, or "" for those of the base.
      task: number or label of the expert whose model to write, for task-conditioned methods; or "".
      lora: ``delta`` or ``factor``.
      extras: (name, model) of further inputs, T of each name.
      shard_bytes: the most in one file.
      memory: bytes for the blocks in flight. How tensors are cut into blocks follows from it, and so does rounding.
    """

    method: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    base: str = ""
    experts: tuple[tuple[str, str], ...] = ()
    recipe: str = ""
    include: str = ""
    dtype: str = ""
    task: str = ""
    lora: str = "delta"
    extras: tuple[tuple[str, str], ...] = ()
    shard_bytes: int = 5_000_000_000
    memory: int = 1_000_000_000

    def __post_init__(self):
        if bool(self.method) == bool(self.recipe):
            raise ValueError("say how to merge: either --method NAME (`taskvec methods` lists them) or a recipe file")
        if self.recipe and (self.base or self.experts or self.settings or self.include or self.extras):
            raise ValueError(
                "a recipe says all about models and settings: leave out --base, --expert, --set, --include"
            )
        if self.method and not self.experts:
            raise ValueError("name the fine-tuned models, each with --expert MODEL (or --expert LABEL=MODEL)")
        if self.dtype and self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        labels = [label for label, _ in self.experts]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"two experts are called {twice[0]!r}; name them with --expert LABEL=MODEL")
        try:
            re.compile(self.include)
        except re.error as error:
            raise ValueError(f"--include {self.include!r} is no regular expression: {error}") from error


def from_record(path: pathlib.Path) -> tuple[Request, dict[str, Any]]:
    """The request of a recorded merge, and the record."""
    record = provenance.load(path)
    fields = dict(record["request"])
    for name in ("experts", "extras"):
        fields[name] = tuple(tuple(pair) for pair in fields[name])
    try:
        return Request(**fields), record
    except TypeError as error:
        raise ValueError(f"{path} was written by another version of taskvec: {error}") from error


def named(refs: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """``LABEL=MODEL`` or ``MODEL`` (labelled by its last part) to pairs."""
    pairs = []
    for ref in refs:
        label, equals, model = ref.partition("=")
        if not equals or pathlib.Path(ref).exists():
            label, model = pathlib.PurePath(ref.rpartition("+")[2]).name or ref, ref
        if not label or not model:
            raise ValueError(f"an expert is written MODEL or LABEL=MODEL, got {ref!r}")
        pairs.append((label, model))
    # Folders of one name in different places are told apart by number.
    labels = [label for label, _ in pairs]
    given = [bool(ref.partition("=")[1]) for ref in refs]
    return tuple(
        (f"{label}#{i + 1}" if labels.count(label) > 1 and not given[i] else label, model)
        for i, (label, model) in enumerate(pairs)
    )


def named_extras(pairs: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """``NAME=MODEL`` texts to pairs; a name is given once for every expert, in their order."""
    wrong = [pair for pair in pairs if not all(pair.partition("="))]
    if wrong:
        raise ValueError(f"--extra takes NAME=MODEL, got {wrong[0]!r}")
    return tuple((pair.partition("=")[0], pair.partition("=")[2]) for pair in pairs)


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    """``key=value`` texts to settings; values are Python literals, or words."""
    found = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ValueError(f"--set takes key=value, got {pair!r}")
        if key in found:
            raise ValueError(f"--set gives {key!r} twice")
        try:
            found[key] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            found[key] = text.strip()
    return found


def size(text: str) -> int:
    """``2GB``, ``500 MiB`` or a number of bytes, as bytes."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", text)
    units = {name.upper(): factor for name, factor in _UNITS.items()} | {"G": 10**9, "M": 10**6, "K": 10**3}
    if not match or match[2].upper() not in units or match[1].count(".") > 1:
        raise ValueError(f"a size is written like 2GB, 500MB or 1GiB, got {text!r}")
    return int(float(match[1]) * units[match[2].upper()])
