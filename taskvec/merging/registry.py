"""Method cards and the registry: what each published method needs, gives and takes as settings."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from taskvec.messages import did_you_mean
from taskvec.transforms import Chain, Transform, chain

DATA = ("none", "unlabelled test", "unlabelled train", "few labelled")
RESULTS = ("static", "task-conditioned", "input-conditioned")
BASES = ("required", "optional")
LEARNS = ("all tasks", "one target", "target and control")
SEES = ("pairs", "tokens", "teacher", "crops")


@dataclasses.dataclass(frozen=True)
class Card:
    """What a user must know before choosing a method.

    Attributes:
      title, arxiv, year: the paper.
      summary: one line.
      data: one of `DATA`.
      base: ``required``, or ``optional`` for methods that can work on raw weights, without a pretrained model.
      tasks: how many fine-tuned models it takes, at least and at most (``None``: any number).
      ordered: whether the order of the models matters: they play different parts, or draw different random numbers.
      extras: trees needed besides weights, e.g. ``("gram",)``.
      collect: the function of `merging.collect` that makes them from data; "" if none does.
      result: one of `RESULTS`.
      heads_trained: whether classification heads are trained.
      learns: of adaptive methods: one model for all tasks; one for a target, from other tasks' vectors; or one that
        forgets a target and keeps a control task.
      sees: of adaptive methods, what rows have besides their inputs: ``pairs`` of one class, every single one of their
        ``tokens`` (so that texts are not packed), features by a ``teacher``, the task's expert, which are computed if
        they are not given, or random ``crops``.
      steps: of adaptive methods: whether there are any, which a checkpoint can keep.
      pieces: of adaptive methods: whether a step may take its rows in pieces (`taskvec.adaptive.fit.Loop`), whatever
        the other settings.
      beside: what is learned beside coefficients, without which these do not make the result; "" if nothing is.
      released_code: how the authors' released code differs, and which setting reproduces it; "" if it does not.
    """

    title: str
    arxiv: str
    year: int
    summary: str
    data: str = "none"
    extras: tuple[str, ...] = ()
    collect: str = ""
    result: str = "static"
    heads_trained: bool = False
    learns: str = "all tasks"
    sees: tuple[str, ...] = ()
    steps: bool = True
    pieces: bool = False
    beside: str = ""
    released_code: str = ""
    base: str = "required"
    tasks: tuple[int, int | None] = (1, None)
    ordered: bool = False

    def check(self, name: str, num_tasks: int, has_base: bool, extras: Collection[str]) -> None:
        """Raises `ValueError` if a merge by this method cannot be with these inputs."""
        low, high = self.tasks
        if not low <= num_tasks <= (high or num_tasks):
            allowed = f"{low} or more" if high is None else str(low) if low == high else f"{low} to {high}"
            raise ValueError(f"{name} takes {allowed} fine-tuned models, got {num_tasks}")
        if not has_base and self.base == "required":
            raise ValueError(f"{name} needs the pretrained model that the others were fine-tuned from")
        missing = [each for each in self.extras if each not in extras]
        if missing:
            raise ValueError(f"{name} needs extras {missing}: trees computed from data, see its card")
        surplus = sorted(set(extras) - set(self.extras))
        if surplus:
            raise ValueError(f"{name} has no use for extras {surplus}; it takes {list(self.extras) or 'none'}")

    def __post_init__(self):
        known = ((self.data, DATA), (self.result, RESULTS), (self.base, BASES), (self.learns, LEARNS))
        for value, allowed in (*known, *((seen, SEES) for seen in self.sees)):
            if value not in allowed:
                raise ValueError(f"card of {self.title!r}: {value!r} is none of {', '.join(allowed)}")


@dataclasses.dataclass(frozen=True)
class Method:
    """A published method: a name, a card, and a function from settings to a chain of transforms."""

    name: str
    card: Card
    build: Callable[..., Transform | Chain]

    @property
    def defaults(self) -> dict[str, Any]:
        """The published settings."""
        return {p.name: p.default for p in inspect.signature(self.build).parameters.values()}

    def __call__(self, **settings) -> Chain:
        """Builds the chain; raises `ValueError` for a setting the method does not have or that is out of range."""
        unknown = sorted(settings.keys() - self.defaults.keys())
        if unknown:
            allowed = ", ".join(f"{k}={v!r}" for k, v in self.defaults.items()) or "none"
            hint = did_you_mean(unknown[0], self.defaults)
            raise ValueError(f"{self.name} has no setting {', '.join(map(repr, unknown))}{hint}; it has {allowed}")
        return chain(self.build(**settings))


@dataclasses.dataclass(frozen=True)
class Search:
    """A published method that needs the scores of models on held-out data too, from a function `evaluate`.

    Attributes:
      name, card: as of a `Method`; ``data`` is what `evaluate` looks at.
      run: the function of `merging.search`.
      call: how it is called from Python.
      then: how `taskvec merge` applies what it found.
    """

    name: str
    card: Card
    run: Callable
    call: str
    then: str

    @property
    def defaults(self) -> dict[str, Any]:
        """The published settings; not what scores, records or resumes."""
        parameters = inspect.signature(self.run).parameters.values()
        others = ("score", "earlier", "on_trial")
        return {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in others}

    @property
    def how(self) -> str:
        """What to do instead of a merge by its name."""
        return f"call taskvec.merging.search.{self.call} from Python; what it finds is merged by `{self.then}`"


def method(name: str, card: Card) -> Callable[[Callable], Method]:
    """Decorator that makes a `Method` of a function ``(settings with defaults) -> chain``."""
    return lambda build: Method(name, card, build)


_METHODS: dict[str, Method] = {}
_SEARCHES: dict[str, Search] = {}


def register(*new: Method | Search) -> None:
    """Adds methods to the registry; the library's own are added in `taskvec/merging/__init__.py`."""
    for each in new:
        if (_METHODS | _SEARCHES).get(each.name, each) is not each:
            raise ValueError(f"a method named {each.name!r} is registered already; choose another name")
        (_SEARCHES if isinstance(each, Search) else _METHODS)[each.name] = each


def methods() -> Mapping[str, Method]:
    """All registered methods by name."""
    return dict(_METHODS)


def searches() -> Mapping[str, Search]:
    """All registered searches by name."""
    return dict(_SEARCHES)


def get(name: str) -> Method:
    """Looks a method up; an unknown name raises `ValueError` with all names there are, a search with what to do."""
    if name in _SEARCHES:
        raise ValueError(f"{name} needs the scores of models on held-out data: {_SEARCHES[name].how}")
    if name not in _METHODS:
        hint = did_you_mean(name, _METHODS)
        raise ValueError(f"unknown method {name!r}{hint}; there are: {', '.join(sorted(_METHODS))}")
    return _METHODS[name]


@functools.lru_cache(maxsize=256)
def _built(method_: Method, settings: tuple) -> Chain:
    return method_(**dict(settings))


def resolve(which: str | Method | Transform | Chain, **settings) -> Chain:
    """The chain of a method name or `Method` with settings, or of a ready transform.

    The same name and settings give the same object, so that compiled programs are reused.
    """
    if isinstance(which, Transform | Chain):
        if settings:
            raise ValueError(f"settings {sorted(settings)} go into the transforms when a chain is given")
        return chain(which)
    which = get(which) if isinstance(which, str) else which
    return _built(which, tuple(sorted((k, _frozen(v)) for k, v in settings.items())))


def _frozen(value: Any) -> Any:
    """Lists as tuples, at any depth: settings come from JSON too, and must be hashable."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
