"""The registry of adaptive methods: functions that learn a merge, with the same cards as data-free methods.

    @adaptive_method("adamerging", Card(...))
    def adamerging(problem, rows, *, steps=500, ..., seed=0, loop=Loop()) -> Learned

Settings are the keyword arguments, their defaults the published ones, or ours where none was seen, as the method's
docstring says. Those annotated as `typing.Literal`, numbers or
truth values are checked before anything runs.
"""

import dataclasses
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from taskvec.adaptive import fingerprint
from taskvec.adaptive.learn import Learned
from taskvec.merging.registry import Card, did_you_mean

NOT_SETTINGS = ("seed", "loop")


@dataclasses.dataclass(frozen=True)
class AdaptiveMethod:
    """A published adaptive method: a name, a card, and a function ``(problem, rows, **settings) -> Learned``."""

    name: str
    card: Card
    run: Callable[..., Learned]

    @property
    def defaults(self) -> dict[str, Any]:
        """The published settings, see the module's docstring."""
        parameters = inspect.signature(self.run).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in NOT_SETTINGS}

    def check(self, **settings: Any) -> None:
        """Raises `ValueError` for a setting that the method does not have, or that cannot have this value."""
        known = (*self.defaults, *NOT_SETTINGS)
        unknown = sorted(settings.keys() - set(known))
        if unknown:
            allowed = ", ".join(f"{k}={v!r}" for k, v in self.defaults.items()) or "none"
            hint = did_you_mean(unknown[0], known)
            raise ValueError(f"{self.name} has no setting {', '.join(map(repr, unknown))}{hint}; it has {allowed}")
        kinds = typing.get_type_hints(self.run)
        for key, value in settings.items():
            kind = kinds.get(key, Any)
            if not _fits(value, kind):
                raise ValueError(f"{self.name}: unknown {key} {value!r}; allowed: {', '.join(_allowed(kind))}")

    def __call__(self, problem: Any, rows: Any, **settings: Any) -> Learned:
        """Runs the method, and notes in the result how, and in a checkpoint of which run it is.

        Raises:
          ValueError: see `check`; a checkpoint of another run.
        """
        self.check(**settings)
        given = {name: value for name, value in settings.items() if name not in NOT_SETTINGS}
        whole, loop = {**self.defaults, **given}, settings.get("loop")
        if loop is not None and hasattr(loop.checkpoint, "of"):
            about = fingerprint.of(self.name, problem, rows, whole, settings.get("seed", 0))
            settings["loop"] = loop._replace(checkpoint=loop.checkpoint.of(about))
        found = self.run(problem, rows, **settings)
        return found._replace(method=self.name, settings=whole)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind: a union, `Literal`, number or truth value; of others nothing is known."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    of_numbers = {int: numbers.Integral, float: numbers.Real}
    if kind in of_numbers:
        return isinstance(value, of_numbers[kind]) and not isinstance(value, bool)
    return not isinstance(kind, type) or kind not in (bool, str, type(None)) or isinstance(value, kind)


def _allowed(kind: Any) -> list[str]:
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return list(parts)
    words = {int: "a whole number", float: "a number", bool: "True, False", str: "a text", types.NoneType: "None"}
    return [text for part in parts for text in _allowed(part)] or [words.get(kind, str(kind))]


def adaptive_method(name: str, card: Card) -> Callable[[Callable[..., Learned]], AdaptiveMethod]:
    """Decorator that makes an `AdaptiveMethod` of a function."""
    return lambda run: AdaptiveMethod(name, card, run)


_METHODS: dict[str, AdaptiveMethod] = {}


def register(*new: AdaptiveMethod) -> None:
    """Adds methods to the registry; the library's own are added in `taskvec/adaptive/__init__.py`."""
    for each in new:
        if each.name in _METHODS and _METHODS[each.name] is not each:
            raise ValueError(f"an adaptive method named {each.name!r} is registered already; choose another name")
        _METHODS[each.name] = each


def methods() -> Mapping[str, AdaptiveMethod]:
    """All registered adaptive methods by name."""
    return dict(_METHODS)


def get(name: str) -> AdaptiveMethod:
    """Looks a method up; an unknown name raises `ValueError` with all names there are."""
    if name not in _METHODS:
        hint = did_you_mean(name, _METHODS)
        raise ValueError(f"unknown adaptive method {name!r}{hint}; there are: {', '.join(sorted(_METHODS))}")
    return _METHODS[name]
