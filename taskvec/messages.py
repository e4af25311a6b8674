"""Pieces of error messages."""

import difflib
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any


def listing(folder: pathlib.Path) -> str:
    """What a folder holds, for error messages."""
    return some(sorted(p.name for p in folder.iterdir())) or "nothing"


def some(names: Sequence[str], most: int = 8) -> str:
    """The first names of a list and how many more there are, for error messages."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """A hint at the closest of the known names, "" if none is close."""
    close = difflib.get_close_matches(str(name), list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
