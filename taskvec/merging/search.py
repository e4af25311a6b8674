"""Searches on the host: settings of any method, by the values of any `evaluate`.

`grid` tries combinations of settings, `per_task` picks a value for each task from the same trials, `evolve` moves one
number a task in a box, `greedy_soup` chooses the models of an average. All of them keep a list of trials, which can be
written to a file as it grows (`on_trial`) and given back to go on (`earlier`): a trial with the same settings is not
run again. Candidates that differ in numbers only (scales, weights, mask thresholds) share one compiled program;
densities do not.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from taskvec.merging import protocols
from taskvec.merging.api import Which, merge
from taskvec.merging.evolution import cma_es
from taskvec.merging.protocols import BOXES, GRIDS, Box, Grid, Score, negation, normalised, trade_off
from taskvec.merging.registry import Card, Search
from taskvec.merging.soup import Soup, greedy_soup
from taskvec.merging.trials import Evaluate, Found, Record, Trial
from taskvec.tree import Tree

__all__ = [
    "BOXES",
    "GRIDS",
    "Box",
    "Found",
    "Grid",
    "Soup",
    "Trial",
    "evolve",
    "greedy_soup",
    "grid",
    "negation",
    "normalised",
    "pcb_search",
    "per_task",
    "soup_search",
    "trade_off",
]


def grid(
    method: Which,
    pretrained: Tree | None,
    finetuned: Sequence[Tree],
    evaluate: Evaluate,
    values: str | Grid | Mapping[str, Sequence],
    *,
    score: Score = protocols.mean,
    earlier: Iterable[Trial | Mapping] = (),
    on_trial: Callable[[Trial], None] | None = None,
    **merge_arguments: Any,
) -> Found:
    """Tries all combinations of some settings' values.

    >>> found = search.grid("ties", base, models, evaluate, "tall_masks")  # doctest: +SKIP
    >>> merged = tv.merge("ties", base, models, **found.settings)  # doctest: +SKIP

    Args:
      method, pretrained, finetuned: as in `merge`.
      evaluate: the result of the merge to a number, or to one number a task.
      values: name of a published protocol (`GRIDS`), or ``{setting: values}``.
      score: makes one number of those of the tasks: the mean, `normalised`, `negation`, `trade_off`.
      earlier: trials of an interrupted search with the same models and data, or their ``_asdict()``.
      on_trial: called with every new trial.
      **merge_arguments: other settings of the method, `policy`, `extras`.

    Raises:
      ValueError: an unknown protocol, or no finite score.
    """
    chosen = _grid(values)
    record = Record(evaluate, score, earlier, on_trial)
    best, since = -math.inf, 0
    for combination in itertools.product(*chosen.values.values()):
        settings = dict(zip(chosen.values, combination, strict=True))
        run = lambda settings=settings: merge(method, pretrained, finetuned, **settings, **merge_arguments)
        found = record.run(settings, run).worth
        since = 0 if found > best else since + 1
        best = max(best, found)
        if chosen.patience is not None and since >= chosen.patience:
            break
    return record.found()


def _grid(values: str | Grid | Mapping[str, Sequence]) -> Grid:
    if isinstance(values, str):
        if values not in GRIDS:
            raise ValueError(f"unknown protocol {values!r}; there are: {', '.join(sorted(GRIDS))}")
        return GRIDS[values]
    chosen = values if isinstance(values, Grid) else Grid(values)
    if not chosen.values or not all(len(v) for v in chosen.values.values()):
        raise ValueError(f"every setting of a grid needs values, got {dict(chosen.values)}")
    return chosen


def per_task(
    method: Which,
    pretrained: Tree | None,
    finetuned: Sequence[Tree],
    evaluate: Callable[[Any], Mapping[str, float]],
    values: str | Grid | Mapping[str, Sequence] = "tall_masks_threshold",
    **arguments: Any,
) -> Found:
    """Chooses one setting for every task apart, such as the mask thresholds of TALL-masks.

    For methods with one result a task: every value is tried once for all tasks, and each task takes what suits it best
    (the smallest in a tie).

    Args:
      method, pretrained, finetuned, **arguments: as in `grid`.
      evaluate: must give T scores by task, in the order of the fine-tuned models.
      values: one setting and its values.

    Returns:
      `Found`, whose setting is a tuple of one value per task and whose score is that of these together.
    """
    chosen, score = _grid(values), arguments.get("score", protocols.mean)
    if len(chosen.values) != 1:
        raise ValueError(f"per_task chooses one setting, got {list(chosen.values)}")
    (name,) = chosen.values
    trials = grid(method, pretrained, finetuned, evaluate, chosen, **arguments).trials
    if any(len(trial.scores) != len(finetuned) for trial in trials):
        raise ValueError(f"evaluate must give one score for each of the {len(finetuned)} tasks, by name")
    tasks = list(trials[0].scores)
    best = [min(trials, key=lambda each, task=task: (-each.scores[task], each.settings[name])) for task in tasks]
    together = {task: trial.scores[task] for task, trial in zip(tasks, best, strict=True)}
    return Found({name: tuple(trial.settings[name] for trial in best)}, score(together), trials)


def evolve(
    method: Which,
    pretrained: Tree | None,
    finetuned: Sequence[Tree],
    evaluate: Evaluate,
    box: str | Box = "pcb_vision",
    *,
    setting: str = "weights",
    sigma: float = 0.25,
    seed: int = 0,
    score: Score = protocols.mean,
    earlier: Iterable[Trial | Mapping] = (),
    on_trial: Callable[[Trial], None] | None = None,
    **merge_arguments: Any,
) -> Found:
    """Searches one number a task in a box, by an evolution strategy (`evolution.cma_es`).

    Args:
      method, pretrained, finetuned, evaluate, score, earlier, on_trial, **merge_arguments: as in `grid`. A search goes
        on exactly where it was interrupted, as its points depend only on the seed and on the scores.
      box: bounds, start and budget, or the name of published ones (`BOXES`).
      setting: name of the setting that takes one number a task.
      sigma: initial step, as a fraction of the box.
      seed: of the samples.
    """
    if isinstance(box, str) and box not in BOXES:
        raise ValueError(f"unknown protocol {box!r}; there are: {', '.join(sorted(BOXES))}")
    low, high, start, budget = BOXES[box] if isinstance(box, str) else box
    if not low <= start <= high or low == high or budget < 1:
        raise ValueError(f"a search needs low <= start <= high, low < high and a budget, got {box}")
    record = Record(evaluate, score, earlier, on_trial)
    full = lambda value: np.full(len(finetuned), float(value))
    points = cma_es(full(start), full(low), full(high), sigma, seed)
    point = next(points)
    for number in range(budget):
        settings = {setting: tuple(float(x) for x in point)}
        run = lambda settings=settings: merge(method, pretrained, finetuned, **settings, **merge_arguments)
        value = record.run(settings, run).worth
        if number + 1 < budget:
            # The value of the start is only recorded: the strategy learns from whole generations.
            point = next(points) if number == 0 else points.send(value)
    return record.found()


soup_search = Search(
    "greedy_soup",
    Card(
        title="Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing "
        "inference time",
        arxiv="2203.05482",
        year=2022,
        summary="average of those fine-tunings of one task that raise the score on held-out data",
        data="few labelled",
        base="optional",
    ),
    greedy_soup,
    "greedy_soup(models, evaluate)",
    "taskvec merge --method weight_average --expert ...",
)
pcb_search = Search(
    "pcb_search",
    Card(
        title="Parameter Competition Balancing for Model Merging",
        arxiv="2410.02396",
        year=2024,
        summary="PCB-Merging with one weight per task, by an evolution strategy on held-out data",
        data="few labelled",
        ordered=True,
        released_code="its language experiments search on the test split; box='pcb_nlp' has their bounds",
    ),
    evolve,
    'evolve("pcb", pretrained, finetuned, evaluate)',
    "taskvec merge --method pcb --set weights=...",
)
