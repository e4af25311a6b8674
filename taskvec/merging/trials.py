"""Trials of a search: run once, kept in order, found again when a search goes on."""

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from taskvec.merging.protocols import Score

# Gets merged params (or a `PerTask`); gives a number to be maximised, or one for each task by name.
Evaluate = Callable[[Any], float | Mapping[str, float]]


class Trial(NamedTuple):
    """One evaluation.

    Attributes:
      settings: those that were searched.
      score: what is maximised.
      scores: of each task, if `evaluate` gives them.
    """

    settings: dict[str, Any]
    score: float
    scores: dict[str, float]

    @property
    def worth(self) -> float:
        """The score; minus infinity if it is NaN or infinite, so that such a trial is never the best."""
        return self.score if math.isfinite(self.score) else -math.inf


class Found(NamedTuple):
    """The end of a search.

    Attributes:
      settings: the best ones; in a tie those with the smallest numbers.
      score: theirs.
      trials: all of them, in order.
    """

    settings: dict[str, Any]
    score: float
    trials: list[Trial]


class Record:
    """Runs trials, or finds them among earlier ones."""

    def __init__(self, evaluate: Evaluate, score: Score, earlier: Iterable, on_trial: Callable | None):
        self.evaluate, self.score, self.on_trial = evaluate, score, on_trial
        known = [Trial(**each) if isinstance(each, Mapping) else Trial(*each) for each in earlier]
        self.earlier = {_key(each.settings): each for each in known}
        self.trials: list[Trial] = []

    def run(self, settings: dict[str, Any], make: Callable[[], Any]) -> Trial:
        """The trial of some settings; `make` gives the model."""
        known = self.earlier.get(_key(settings))
        if known is not None:
            trial = known._replace(settings=settings)
        else:
            value = self.evaluate(make())
            scores = {k: float(v) for k, v in value.items()} if isinstance(value, Mapping) else {}
            trial = Trial(settings, self.score(scores) if isinstance(value, Mapping) else float(value), scores)
        self.trials.append(trial)
        if self.on_trial is not None and known is None:
            self.on_trial(trial)
        return trial

    def found(self) -> Found:
        """The best trial; raises `ValueError` if none has a finite score."""
        best = min(self.trials, key=_rank)
        if best.worth == -math.inf:
            raise ValueError(f"none of {len(self.trials)} trials has a finite score; see `on_trial`")
        return Found(best.settings, best.score, self.trials)


def _key(settings: Mapping[str, Any]) -> tuple:
    frozen = lambda v: tuple(frozen(each) for each in v) if isinstance(v, list | tuple) else v
    return tuple(sorted((name, frozen(value)) for name, value in settings.items()))


def _rank(trial: Trial) -> tuple:
    """Best first: the highest score, then the smallest numbers, setting by setting; text does not count."""
    sizes = []
    for value in trial.settings.values():
        each = value if isinstance(value, list | tuple) else [value]
        sizes.append([x for x in each if isinstance(x, numbers.Real)])
    return (-trial.worth, sizes)
