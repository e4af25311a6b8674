"""AdaMerging: coefficients that make the merged model's predictions certain, arXiv 2310.02575 (ICLR 2024).

    theta_l = theta0_l + sum_t clip(lam[l, t], 0, 1) tau_{l,t},    min_lam sum_t E_{x in X_t} H(softmax(h_t(f(x))))

with H the Shannon entropy, f the encoder with weights theta, h_t the frozen head of task t, X_t unlabelled rows of its
test set (transductive, as published) or of held-out data (inductive).
"""

from typing import Literal

import jax
import numpy as np
import optax

from taskvec import transforms, tree as trees
from taskvec.adaptive import objectives
from taskvec.adaptive.coefficients import Constraint, coefficients
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.learn import Learned, Problem, learn
from taskvec.adaptive.registry import adaptive_method
from taskvec.adaptive.rows import Rows, cyclic, together
from taskvec.merging.coefficients import agreeing
from taskvec.merging.registry import Card
from taskvec.tree import Tree


def keep_agreeing(theta0: Tree, tau: Tree, plus_plus: bool | str = True) -> Tree:
    """AdaMerging++'s task vectors, see `taskvec.merging.coefficients.agreeing`."""
    return jax.jit(lambda *args: transforms.transform_task_vectors(agreeing(plus_plus), *args))(theta0, tau)


ORDERS = {"anew": together, "epochs": cyclic}


@adaptive_method(
    "adamerging",
    Card(
        title="AdaMerging: Adaptive Model Merging for Multi-Task Learning",
        arxiv="2310.02575",
        year=2024,
        summary="coefficients by task, or by task and tensor, that minimise the entropy of predictions",
        pieces=True,
        data="unlabelled test",
        released_code=(
            "a step sums the entropies of two batches of 16 a task, and merges anew for each; coefficients for six "
            "leftovers of the text tower have gradient zero. FusionBench: 1000 steps, constraint='identity', "
            "entropy_eps=1e-8, order='epochs'. ++ elects the majority sign where signs cancel and keeps one entry more "
            "(plus_plus='released')"
        ),
    ),
)
def adamerging(
    problem: Problem,
    rows: Rows,
    *,
    mode: trees.GroupMode = "tensor",
    plus_plus: bool | Literal["released"] = False,
    constraint: Constraint = "clip",
    init: float | np.ndarray = 0.3,
    steps: int = 500,
    learning_rate: float = 1e-3,
    per_task: int = 16,
    entropy_eps: float = 0.0,
    order: Literal[tuple(ORDERS)] = "anew",
    seed: int = 0,
    loop: Loop = Loop(),
) -> Learned:
    """Learns merging coefficients on unlabelled rows.

    Args:
      problem: what is merged.
      rows: unlabelled.
      mode: ``tensor`` (the paper's layer-wise), ``task`` (task-wise), or another of `taskvec.tree.groups`.
      plus_plus: trim task vectors and elect signs first, as TIES (arXiv 2306.01708) before its mean: AdaMerging++;
        ``"released"`` by the rules of the released code, see `taskvec.merging.coefficients.agreeing`.
      constraint: see `coefficients.coefficients`.
      init: start of all coefficients, or ``[G, T]``.
      steps: of Adam (betas 0.9, 0.999).
      learning_rate: of Adam.
      per_task: rows of a task in a step.
      entropy_eps: see `objectives.entropy`.
      order: rows are drawn ``anew`` in every step, or every task goes through its own in ``epochs`` (FusionBench).
      seed: of the rows drawn.
      loop: see `fit.Loop`.

    Raises:
      ValueError: numbers of tasks do not fit.
      FitDiverged: see `fit.fit`.
    """
    problem.check(rows)
    if plus_plus:
        problem.check_dense("adamerging with plus_plus")
        problem = problem._replace(tau=keep_agreeing(problem.theta0, problem.tau, plus_plus))
    groups = trees.groups(problem.theta0, mode)
    return learn(
        problem,
        coefficients(groups, problem.num_tasks, init, constraint),
        lambda outputs: objectives.entropy(outputs.logits, eps=entropy_eps),
        ORDERS[order](rows, per_task, seed),
        optax.adam(learning_rate),
        steps,
        seed=seed,
        loop=loop,
    )
