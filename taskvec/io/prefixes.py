"""The same tensors under a prefix: ``bert.encoder...`` in a model with a head is ``encoder...`` in one without.

And under old names (`taskvec.io.names.current`).
"""

from collections.abc import Collection, Iterable

from taskvec.io.names import current


def match(names: Iterable[str], reference: Collection[str]) -> dict[str, str]:
    """Maps names to those of `reference`, where a single prefix put in front or taken away makes more of them agree.

    >>> match(["bert.a.weight", "bert.b.weight", "head"], ["a.weight", "b.weight"])
    {'bert.a.weight': 'a.weight', 'bert.b.weight': 'b.weight', 'head': 'head'}

    Names that are not in `reference` either way keep their own.
    """
    theirs, own = {current(name): name for name in reference}, {name: current(name) for name in names}
    names, reference = own.values(), theirs.keys()
    prefixes = {prefix for name in (*names, *reference) for prefix in _prefixes(name)}
    changes = [lambda name: name]
    changes += [lambda name, p=prefix: name.removeprefix(p) for prefix in sorted(prefixes)]
    changes += [lambda name, p=prefix: p + name for prefix in sorted(prefixes)]
    # The first of equals, so that nothing is renamed without need.
    best = max(changes, key=lambda change: sum(change(name) in reference for name in names))
    taken = reference & set(names)
    changed = {name: best(name) for name in names}
    changed = {name: to for name, to in changed.items() if to in reference and (to == name or to not in taken)}
    return {name: theirs[changed[now]] if now in changed else name for name, now in own.items()}


def _prefixes(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:n]) + "." for n in range(1, min(3, len(parts))) if not parts[n - 1].isdigit())
