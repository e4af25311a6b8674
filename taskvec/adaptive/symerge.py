"""SyMerge, and Model Tinting before it: coefficients and heads trained together by the experts' labels. 2412.19098.

    theta_l = theta0_l + sum_t clip(lam[l, t], 0, 1) tau_{l,t},    min_{lam, h} sum_t E_{x in X_t} CE(h_t(f(x)), y_t(x))

y_t is the class that task t's own expert gives under the frozen head. Most of the published gain comes from the heads:
69.1 to 79.6 on task arithmetic that stays as it is (8 tasks, ViT-B/32).
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
import optax

from taskvec import tree as trees
from taskvec.adaptive import objectives
from taskvec.adaptive.coefficients import Constraint, coefficients
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.learn import Learned, Problem, learn, trainable
from taskvec.adaptive.optimisers import by_task, resting
from taskvec.adaptive.registry import adaptive_method
from taskvec.adaptive.rows import Rows, in_turn, together
from taskvec.adaptive.teachers import with_targets
from taskvec.merging.registry import Card

SCHEDULES = {"in_turn": in_turn, "together": together}
# What to ask of a batch; the experts' features come with the rows.
OBJECTIVES = {
    "confident": lambda outputs: objectives.confident_pseudo_label(outputs.logits, outputs.target_logits),
    "labels": lambda outputs: objectives.pseudo_label(outputs.logits, outputs.target_logits),
    "soft": lambda outputs: objectives.kl(outputs.logits, outputs.target_logits),
    "entropy": lambda outputs: objectives.entropy(outputs.logits),
    "features": lambda outputs: objectives.l1(outputs.features, outputs.batch["target_features"]),
}


@adaptive_method(
    "symerge",
    Card(
        title="SyMerge: From Non-Interference to Synergistic Merging via Single-Layer Adaptation",
        arxiv="2412.19098",
        year=2026,
        summary="coefficients and each task's head, trained together on the labels that the experts give",
        sees=("teacher",),
        data="unlabelled test",
        result="task-conditioned",
        heads_trained=True,
        released_code=(
            "trains a bias of the heads as well, from 0 on (bias=True); a batch that keeps no row gives NaN, here a "
            "loss of 0; the paper allows any one layer a task, the code takes the head, and so do we. Model Tinting: "
            "objective='labels'; its code has a rate of 1e-3 for coefficients as well, commented out"
        ),
    ),
)
def symerge(
    problem: Problem,
    rows: Rows,
    *,
    objective: Literal[tuple(OBJECTIVES)] = "confident",
    schedule: Literal[tuple(SCHEDULES)] = "in_turn",
    mode: trees.GroupMode = "tensor",
    constraint: Constraint = "clip",
    init: float | np.ndarray = 0.3,
    rounds: int = 500,
    learning_rate: float = 1e-2,
    head_learning_rate: float = 1e-2,
    bias: bool = False,
    per_task: int = 32,
    seed: int = 0,
    loop: Loop = Loop(),
) -> Learned:
    """Trains coefficients and heads on unlabelled rows.

    Every task's head has an Adam of its own, which takes a step with that task's rows only.

    Args:
      problem: what is merged.
      rows: unlabelled; with ``target_features`` of the experts (`teachers.with_targets`), or they are made here.
      objective: ``confident``, cross-entropy to the experts' labels without the rows on which the merged model
        contradicts the expert and is surer (SyMerge); ``labels``, of all rows (Model Tinting). Options of the released
        code besides: ``soft``, to the experts' probabilities (KL, the same but for a constant); ``entropy``;
        ``features``, their mean absolute difference, which leaves heads alone.
      schedule: ``in_turn``: a step takes rows of one task, the tasks in a new random order every round, so that later
        tasks see the moves of earlier ones (as published). ``together``: a step takes rows of all tasks.
      mode, constraint, init: of the coefficients, see `adamerging.adamerging`.
      rounds: over all tasks: ``rounds * T`` steps in turn, `rounds` together.
      learning_rate: of Adam on the coefficients: one rate for them and the heads is what the released code runs with. A
        group of 1e-3 for the coefficients, AdaMerging's rate, stands in it commented out (the benchmark's row
        ``model_tinting_grouped``); which of them the paper states was not seen.
      head_learning_rate: of Adam on the heads as released code has them, with the factor of the logits in the weights:
        our unit-norm kernels move by ``head_learning_rate / scale``.
      bias: whether heads get a bias, that starts at 0 and is trained too (released code).
      per_task: rows of a task in a batch.
      seed: of the rows and the order drawn.
      loop: see `fit.Loop`.

    Returns:
      `Learned` with `heads`: the result is task-conditioned.

    Raises:
      ValueError: unknown objective or schedule; numbers of tasks do not fit.
      FitDiverged: see `fit.fit`.
    """
    problem.check(rows)
    if objective == "confident":
        loop.refuse("symerge with objective='confident'", pieces="the mean is over the rows that a batch keeps")
    by_group = coefficients(trees.groups(problem.theta0, mode), problem.num_tasks, init, constraint)
    rows = with_targets(problem, rows, loop=loop)
    scale = float(jnp.asarray(problem.heads.scale))
    # Adam's epsilon stands beside a gradient that is `scale` times as large as that by the scaled weights.
    adams = {
        "kernel": optax.adam(head_learning_rate / scale, eps=1e-8 * scale),
        "bias": optax.adam(head_learning_rate),
    }
    if bias and problem.heads.bias is None:
        problem = problem._replace(heads=problem.heads._replace(bias=jnp.zeros(problem.heads.class_mask.shape)))
    parts = {name: name for name in trainable(problem.heads)}
    # A batch of which no row is kept moves nothing, as where released code, in half precision, skips a step of NaN.
    adam = optax.adam(learning_rate)
    optimisers = {"merge": resting(adam) if objective == "confident" else adam} | {
        name: by_task(adams[name]) for name in parts
    }
    return learn(
        problem,
        by_group,
        OBJECTIVES[objective],
        SCHEDULES[schedule](rows, per_task, seed),
        optax.multi_transform(optimisers, {"merge": "merge", "heads": parts}),
        rounds * (problem.num_tasks if schedule == "in_turn" else 1),
        train_heads=True,
        seed=seed,
        loop=loop,
    )
