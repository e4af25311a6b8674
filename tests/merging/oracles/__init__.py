"""Every data-free method once more, from its paper's formula, in float64 NumPy on named per-layer tensors.

Written without the library: plain loops, np.sort and np.linalg.svd. One file a family of methods, with

* a function of the method's name, ``oracle(taus, depths, [base], [extras], **settings)``: ``taus`` is
  ``{name: [T, ...]}``, ``base`` the pretrained ``{name: [...]}``; returns ``{name: merged vector}``, or T such dicts if
  task-conditioned;
* ``CASES[method]``: the settings to compare at;
* ``EXPERT[method]``: settings at which one task gives the expert back, or ``None``;
* ``EXTRAS[method]``: ``(pretrained, finetuned) -> extras``, if it needs any;
* ``RANDOM[method]``: ``(pretrained, finetuned, settings) -> keywords`` for the oracle: the random masks drawn.
"""

import importlib
import inspect
import pkgutil
from typing import Any, NamedTuple


class Oracle(NamedTuple):
    """What a family file holds for one method."""

    fn: Any
    cases: list
    expert: dict | None
    extras: Any
    random: Any

    def __call__(self, taus, depths, base, extras, **settings):
        """Calls the function with the arguments that it takes; settings that only choose a solver may be left out."""
        takes = inspect.signature(self.fn).parameters
        given = {"base": base, "extras": extras}
        return self.fn(taus, depths, **{k: v for k, v in given.items() if k in takes}, **settings)


_FAMILIES = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]


def of(name: str) -> Oracle:
    """The oracle of a method; an empty one if there is none (test_oracles.py wants one of all in the registry)."""
    for family in _FAMILIES:
        if name in family.CASES:
            optional = lambda table, family=family: getattr(family, table, {}).get(name)
            return Oracle(
                getattr(family, name), family.CASES[name], family.EXPERT[name], optional("EXTRAS"), optional("RANDOM")
            )
    return Oracle(None, [], None, None, None)
