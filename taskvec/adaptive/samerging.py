"""SAMerging: distillation from all experts into the coefficients, at a flat minimum. arXiv 2512.21288.

    theta_l = theta0_l + sum_t lam[l, t] tau_{l,t},    min_lam max_{|e| < rho} sum_t E_{x in X_t} KL(p_t || p_{lam+e})

with predictions softened by a temperature; the inner maximum is SAM's (arXiv 2010.01412), in the space of coefficients.
"""

from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
import optax

from taskvec import tree as trees
from taskvec.adaptive import objectives
from taskvec.adaptive.coefficients import Constraint, coefficients
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.learn import Learned, Outputs, Problem, learn
from taskvec.adaptive.optimisers import sharpness_aware
from taskvec.adaptive.registry import adaptive_method
from taskvec.adaptive.rows import Rows, cyclic
from taskvec.adaptive.teachers import with_targets
from taskvec.merging.registry import Card

OBJECTIVES = ("kl", "jsd", "cross_entropy", "entropy")


def objective_of(name: str, temperature: float) -> Callable[[Outputs], jax.Array]:
    """One of `OBJECTIVES`, of all tasks."""
    return {
        "kl": lambda outputs: objectives.kl(outputs.logits, outputs.target_logits, temperature),
        "jsd": lambda outputs: objectives.mean_logit_divergence(outputs.logits, outputs.target_logits),
        "cross_entropy": lambda outputs: objectives.pseudo_label(outputs.logits, outputs.target_logits),
        "entropy": lambda outputs: objectives.entropy(outputs.logits),
    }[name]


@adaptive_method(
    "samerging",
    Card(
        title="Model Merging via Multi-Teacher Knowledge Distillation",
        arxiv="2512.21288",
        year=2025,
        summary="coefficients that distil all experts by KL, with sharpness-aware steps",
        sees=("teacher",),
        data="unlabelled test",
        released_code=(
            "does not merge at the perturbed coefficients, so that SAM has no effect (rho=0 reproduces it), and asks "
            "for its adaptive form (adaptive=True); ten epochs over the same 100 batches; has other losses as well, "
            "of which 'jsd' takes the mean of logits, not of probabilities (objective='jsd')"
        ),
    ),
)
def samerging(
    problem: Problem,
    rows: Rows,
    *,
    objective: Literal[tuple(OBJECTIVES)] = "kl",
    temperature: float = 2.0,
    rho: float = 0.07,
    adaptive: bool = False,
    mode: trees.GroupMode = "tensor",
    constraint: Constraint = "identity",
    init: float | np.ndarray = 0.0,
    steps: int = 1000,
    learning_rate: float = 1e-3,
    weight_decay: float = 5e-4,
    per_task: int = 16,
    seed: int = 0,
    loop: Loop = Loop(),
) -> Learned:
    """Learns merging coefficients on unlabelled rows, from what the experts predict on them.

    Args:
      problem: what is merged.
      rows: unlabelled; with ``target_features`` of the experts (`teachers.with_targets`), or they are made here.
      objective: ``kl``, the paper's; ``jsd`` (`objectives.mean_logit_divergence`), ``cross_entropy`` to the experts'
        classes and ``entropy`` are the other losses of the released code.
      temperature: of both predictions under ``kl``; the loss has no factor of its square.
      rho: radius of SAM; 0 is Adam alone.
      adaptive: take the radius relative to the coefficients, see `optimisers.sharpness_aware`.
      mode: ``tensor``, ``task``, or another of `taskvec.tree.groups`.
      constraint, init: see `coefficients.coefficients`.
      steps: 10 epochs of 100 steps, as in the released configuration.
      learning_rate: of Adam.
      weight_decay: times the coefficients, added to the gradient before Adam (from the released configuration).
      per_task: rows of a task in a step; tasks go through their rows in epochs.
      seed: of the rows drawn.
      loop: see `fit.Loop`.

    Raises:
      ValueError: unknown objective; numbers of tasks do not fit.
      FitDiverged: see `fit.fit`.
    """
    problem.check(rows)
    by_group = coefficients(trees.groups(problem.theta0, mode), problem.num_tasks, init, constraint)
    rows = with_targets(problem, rows, loop=loop)
    return learn(
        problem,
        by_group,
        objective_of(objective, temperature),
        cyclic(rows, per_task, seed),
        optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate)),
        steps,
        gradient=sharpness_aware(rho, adaptive),
        seed=seed,
        loop=loop,
    )
