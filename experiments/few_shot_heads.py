"""Tip-Adapter and LP++ as rows of a benchmark: heads trained on a few rows of every task, on top of an earlier result.

Rows are the few shots that `atlas_few_shot` draws with the same seed, from the training rows or, where its last epoch
counts, the held-out ones; without crops. Features are those of the earlier result's model of the task, the pretrained
one for Tip-Adapter and LP++ by themselves, on training rows.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments import learning
from experiments.prepare import Bench
from taskvec.adaptive import atlas_heads, registry
from taskvec.adaptive.atlas_few_shot import few_shots
from taskvec.adaptive.learn import Problem, heads_of
from taskvec.modular.results import Merged


def _defaults(train: Callable) -> dict[str, Any]:
    parameters = inspect.signature(train).parameters.values()
    given = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    return {"shots": None} | {k: v for k, v in given.items() if k not in ("seed", "loop", "scale")}


SETTINGS = {
    "tip_adapter": _defaults(atlas_heads.tip_adapter),
    "lp_plus_plus": _defaults(atlas_heads.lp_plus_plus),
}


def stands_on(name: str) -> bool:
    """Whether such a head may stand on the features of this method."""
    return name == "pretrained" or (name in registry.methods() and registry.get(name).card.learns == "one target")


def train(
    bench: Bench, name: str, merged: Merged, settings: Mapping[str, Any], held_out: bool = False
) -> list[Callable]:
    """One function a task from features ``[N, d]`` to logits ``[N, C]``.

    Args:
      bench: with its heads.
      name: of `SETTINGS`.
      merged: whose features; nothing may be corrected behind its encoder.
      settings: ``shots`` a class (``None``: all rows), and those of the head.
      held_out: whether rows are held-out ones, as those of the earlier result.
    """
    settings = dict(settings)
    shots = settings.pop("shots", None)
    given = learning.rows(
        bench, "few labelled", taken=[task.held_out if held_out else task.train for task in bench.tasks]
    )
    made = []
    for t in range(len(bench.tasks)):
        model = bench.base.model
        problem = Problem(model.apply, bench.base.pretrained, None, heads_of(bench.heads, [t]), model.scanned)
        few = given.only([t]) if shots is None else few_shots(given.only([t]), shots, bench.seed)
        z_Nxd, logits_NxC = atlas_heads.cached(problem, merged.params_for(t), few)
        if name == "tip_adapter":
            head, _ = atlas_heads.tip_adapter(z_Nxd, logits_NxC, few.labels[0], seed=bench.seed, **settings)
        else:
            scale = float(np.asarray(bench.heads.scale))
            head, _ = atlas_heads.lp_plus_plus(z_Nxd, logits_NxC, few.labels[0], scale=scale, **settings)
        made.append(atlas_heads.classifier(problem, head))
    return made
