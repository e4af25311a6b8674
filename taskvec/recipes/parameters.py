"""Settings of a recipe: numbers, per-layer gradients, and rules chosen by a part of the tensor's name."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from taskvec.messages import did_you_mean


class Rule(NamedTuple):
    """A value for the tensors whose names hold `filter` (all, if ``None``); several knots make a gradient."""

    filter: str | None
    knots: tuple[Any, ...]


Setting = tuple[Rule, ...]


def parse_settings(given: Any, allowed: Mapping[str, Any], where: str, elsewhere: str = "") -> dict[str, Setting]:
    """Checks a ``parameters`` mapping; `allowed` holds defaults, whose types the values must have.

    Raises:
      ValueError: unknown name, value of a wrong type, malformed rule; says where.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: parameters must be a mapping, got {given!r}")
    for name in given:
        if name not in allowed:
            hint = did_you_mean(name, allowed)
            raise ValueError(f"{where}: no parameter {name!r} here{hint}; allowed: {', '.join(allowed)}{elsewhere}")
    return {name: _setting(value, allowed[name], f"{where}: {name}") for name, value in given.items()}


def _setting(value: Any, default: Any, where: str) -> Setting:
    if isinstance(value, Mapping):
        value = [value]
    if not (isinstance(value, list) and any(isinstance(each, Mapping) for each in value)):
        return (Rule(None, _knots(value, default, where)),)
    rules = []
    for each in value:
        if not isinstance(each, Mapping) or "value" not in each or not each.keys() <= {"value", "filter"}:
            raise ValueError(f"{where}: a rule is {{filter: part of a name, value: ...}}, got {each!r}")
        part = each.get("filter")
        if part is not None and not isinstance(part, str):
            raise ValueError(f"{where}: filter must be a string, got {part!r}")
        rules.append(Rule(None if part in (None, "*") else part, _knots(each["value"], default, where)))
    return tuple(rules)


def _knots(value: Any, default: Any, where: str) -> tuple:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"{where}: the list is empty; give one value, or the knots of a gradient")
    return tuple(_scalar(each, default, where) for each in values)


def _scalar(value: Any, default: Any, where: str) -> Any:
    """A boolean where the default is one; a number otherwise. YAML reads 1e-4 as a string."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{where} must be true or false, got {value!r}")
        return value
    try:
        number = float(value) if not isinstance(value, bool) else float("nan")
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < float("inf"):
        raise ValueError(f"{where} must be a number, got {value!r}")
    if isinstance(default, int):
        if number != int(number):
            raise ValueError(f"{where} must be a whole number, got {value!r}")
        return int(number)
    return number


def resolve(name: str, scopes: Iterable[Mapping[str, Setting]], tensor: str, t: float) -> Any:
    """The value of a setting for one tensor, ``None`` if no scope has one.

    The first scope wins that has a rule for this tensor; in a scope, the first such rule.

    Args:
      name: of the setting.
      scopes: from the nearest to the farthest.
      tensor: name of the output tensor.
      t: place of the layer in its slice, 0 at the first and 1 at the last.
    """
    for scope in scopes:
        for rule in scope.get(name, ()):
            if rule.filter is None or rule.filter in tensor:
                return at(rule.knots, t)
    return None


def at(knots: tuple, t: float) -> Any:
    """Linear between numeric knots that are evenly spaced over [0, 1]; the knot at or before t of booleans."""
    place = t * (len(knots) - 1)
    before = int(place)
    if isinstance(knots[0], bool) or len(knots) == 1:
        return knots[before]
    after, share = min(before + 1, len(knots) - 1), place - before
    return (1 - share) * knots[before] + share * knots[after]
