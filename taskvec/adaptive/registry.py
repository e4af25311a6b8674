"""The registry of adaptive methods: functions that learn a merge, with the same cards as data-free methods.

    @adaptive_method("adamerging", Card(...))
    def adamerging(problem, rows, *, steps=500, ..., seed=0, loop=Loop()) -> Learned

Settings are the keyword arguments, their defaults the published ones.
"""

import dataclasses
import inspect
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
        """The published settings."""
        parameters = inspect.signature(self.run).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in NOT_SETTINGS}

    def __call__(self, problem: Any, rows: Any, **settings: Any) -> Learned:
        """Runs the method, and notes in the result how, and in a checkpoint of which run it is.

        Raises:
          ValueError: a setting that it does not have; a checkpoint of another run.
        """
        known = (*self.defaults, *NOT_SETTINGS)
        unknown = sorted(settings.keys() - set(known))
        if unknown:
            allowed = ", ".join(f"{k}={v!r}" for k, v in self.defaults.items()) or "none"
            hint = did_you_mean(unknown[0], known)
            raise ValueError(f"{self.name} has no setting {', '.join(map(repr, unknown))}{hint}; it has {allowed}")
        given = {name: value for name, value in settings.items() if name not in NOT_SETTINGS}
        whole, loop = {**self.defaults, **given}, settings.get("loop")
        if loop is not None and hasattr(loop.checkpoint, "of"):
            about = fingerprint.of(self.name, problem, rows, whole, settings.get("seed", 0))
            settings["loop"] = loop._replace(checkpoint=loop.checkpoint.of(about))
        found = self.run(problem, rows, **settings)
        return found._replace(method=self.name, settings=whole)


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
