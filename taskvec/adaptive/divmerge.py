"""DivMerge: coefficients that bring the merged model's predictions close to every expert's. arXiv 2509.02108.

    theta_l = theta0_l + sum_t lam[l, t] tau_{l,t},    min_lam sum_t E_{x in X_t} JS(p_t(.|x), p_theta(.|x))

with JS the Jensen-Shannon divergence, at most log 2, so that no task can outweigh the others by far.
"""

from typing import Literal

import numpy as np
import optax

from taskvec import tree as trees
from taskvec.adaptive import objectives
from taskvec.adaptive.coefficients import Constraint, coefficients
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.learn import Learned, Problem, learn
from taskvec.adaptive.registry import adaptive_method
from taskvec.adaptive.rows import Rows, together
from taskvec.adaptive.teachers import with_targets
from taskvec.merging.registry import Card

DIVERGENCES = {"js": objectives.jensen_shannon, "kl": objectives.kl}


@adaptive_method(
    "divmerge",
    Card(
        title="DivMerge: A divergence-based model merging method for multi-tasking",
        arxiv="2509.02108",
        year=2025,
        summary="coefficients that minimise the Jensen-Shannon divergence from each expert's predictions",
        sees=("teacher",),
        pieces=True,
        data="unlabelled train",
        released_code="none known; start, optimiser and steps are those of AdaMerging",
    ),
)
def divmerge(
    problem: Problem,
    rows: Rows,
    *,
    divergence: Literal[tuple(DIVERGENCES)] = "js",
    mode: trees.GroupMode = "tensor",
    constraint: Constraint = "identity",
    init: float | np.ndarray = 0.3,
    steps: int = 500,
    learning_rate: float = 1e-3,
    per_task: int = 16,
    seed: int = 0,
    loop: Loop = Loop(),
) -> Learned:
    """Learns merging coefficients on unlabelled rows, from what the experts predict on them.

    The paper's start, optimiser and number of steps are not known to us: the defaults of `constraint`, `init`, `steps`,
    `learning_rate` and `per_task` are our choice, AdaMerging's without its clamp.

    Args:
      problem: what is merged.
      rows: unlabelled; with ``target_features`` of the experts (`teachers.with_targets`), or they are made here.
      divergence: ``js``, or ``kl``, KL(expert || merged), which the paper compares it with.
      mode: ``tensor``, ``task``, or another of `taskvec.tree.groups`.
      constraint, init: see `coefficients.coefficients`.
      steps, learning_rate: of Adam.
      per_task: rows of a task in a step.
      seed: of the rows drawn.
      loop: see `fit.Loop`.

    Raises:
      ValueError: unknown divergence; numbers of tasks do not fit.
      FitDiverged: see `fit.fit`.
    """
    problem.check(rows)
    by_group = coefficients(trees.groups(problem.theta0, mode), problem.num_tasks, init, constraint)
    rows = with_targets(problem, rows, loop=loop)
    return learn(
        problem,
        by_group,
        lambda outputs: DIVERGENCES[divergence](outputs.logits, outputs.target_logits),
        together(rows, per_task, seed),
        optax.adam(learning_rate),
        steps,
        seed=seed,
        loop=loop,
    )
