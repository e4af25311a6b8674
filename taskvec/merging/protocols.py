"""Published search protocols by name: which values are tried, and what is maximised.

All of them score on validation splits and evaluate the winner once on the test split.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Score = Callable[[Mapping[str, float]], float]


class Grid(NamedTuple):
    """Values to try for some settings, all combinations.

    Attributes:
      values: ``{setting: values}``.
      patience: stop after so many trials in a row that do not improve; ``None``: never.
    """

    values: Mapping[str, tuple[Any, ...]]
    patience: int | None = None


def _range(first: float, last: float, steps: int) -> tuple[float, ...]:
    return tuple(round(float(x), 6) for x in np.linspace(first, last, steps))


_TENTHS = _range(0.1, 1.0, 10)
_MERGELM = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)

GRIDS: Mapping[str, Grid] = {
    # Task arithmetic (2212.04089), and tangent task arithmetic: 0, .05, ..., 1; mean normalised accuracy.
    "task_arithmetic": Grid({"scale": _range(0, 1, 21)}),
    # TALL-masks and Consensus (2405.07813): ten points, not the twenty that the settings suggest.
    "tall_masks": Grid({"scale": _TENTHS}),
    "tall_masks_threshold": Grid({"threshold": (0.2, 0.3, 0.4, 0.5, 0.6)}),
    # LiNeS (2410.17146): the beta of merged vectors, and the alpha of a single model.
    "lines": Grid({"scale": _TENTHS}),
    "lines_ties": Grid({"scale": _range(0.1, 1.5, 15)}),
    "lines_edit": Grid({"alpha": _range(0, 1, 11)}),
    # TSV (2412.00081) and Isotropic merging (2502.04959); their baselines in thirtieths.
    "tsv": Grid({"scale": _range(0.1, 3.0, 30)}),
    "iso": Grid({"scale": _range(0.1, 3.0, 30)}, patience=3),
    "tsv_baselines": Grid({"scale": _range(1 / 30, 1, 30)}),
    # TIES (2306.01708), T5 and IA3.
    "ties_nlp": Grid({"scale": _range(0.8, 2.5, 18)}),
    "ties_nlp_task_arithmetic": Grid({"scale": _TENTHS}),
    # DARE's code (2311.03099): TIES with mask rates .7, .8, .9; RegMean's non-diagonal factor.
    "mergelm": Grid({"scale": _MERGELM}),
    "mergelm_ties": Grid({"scale": _MERGELM, "density": (0.3, 0.2, 0.1)}),
    "mergelm_regmean": Grid({"reduce_nondiagonal": (0.7, 0.8, 0.9, 1.0)}),
    # MagMax (2407.06322): .05, .1, ..., 1.
    "magmax": Grid({"scale": _range(0.05, 1, 20)}),
}


class Box(NamedTuple):
    """Where an evolutionary search looks for one number a task.

    Attributes:
      low, high: bounds.
      start: first point.
      budget: number of evaluations.
    """

    low: float
    high: float
    start: float
    budget: int


BOXES: Mapping[str, Box] = {
    # PCB-Merging (2410.02396); its language experiments search on the test split, which nobody should repeat.
    "pcb_vision": Box(0.8, 1.3, 1.0, 100),
    "pcb_nlp": Box(0.5, 3.0, 1.0, 200),
}


def mean(scores: Mapping[str, float]) -> float:
    """Mean over the tasks."""
    return float(np.mean(list(scores.values())))


def normalised(references: Mapping[str, float]) -> Score:
    """Mean over the tasks of the score divided by that of the task's fine-tuned model.

    Args:
      references: ``{task: score of its fine-tuned model}``.
    """

    def score(scores: Mapping[str, float]) -> float:
        return float(np.mean([scores[task] / references[task] for task in references]))

    return score


def negation(control: str, pretrained: float, keep: float = 0.95) -> Score:
    """For forgetting: the lowest score of the other tasks at which a control task keeps 95 % of its score.

    Source: task arithmetic, arXiv 2212.04089, section 3. Candidates that do not keep it are never chosen.

    Args:
      control: name of the control task (ImageNet).
      pretrained: its score under the pretrained model.
      keep: fraction of it to be kept.
    """

    def score(scores: Mapping[str, float]) -> float:
        if scores[control] < keep * pretrained:
            return -np.inf
        return -float(np.mean([value for task, value in scores.items() if task != control]))

    return score


def trade_off(target: str, finetuned: float, pretrained: Mapping[str, float], weight: float = 2.0) -> Score:
    """For editing one model: ``weight * target / finetuned + mean_control(score / pretrained)`` (LiNeS).

    Args:
      target: name of the task that the model was fine-tuned for.
      finetuned: its score under the fine-tuned model.
      pretrained: ``{control task: score under the pretrained model}``.
      weight: of the target.
    """

    def score(scores: Mapping[str, float]) -> float:
        kept = np.mean([scores[task] / reference for task, reference in pretrained.items()])
        return float(weight * scores[target] / finetuned + kept)

    return score
