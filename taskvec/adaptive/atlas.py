"""aTLAS: one free coefficient per task and tensor, learned on labelled rows. arXiv 2407.02880 (NeurIPS 2024).

    theta_l = theta0_l + sum_t lam[l, t] tau_{l,t},    lam = 0 at the start, of any sign

for adding tasks (`atlas`), for forgetting one (`atlas_negation`), for a new task from the task vectors of others
(`atlas_few_shot`) and the same at test time without labels (`atlas_ufm`). *aTLAS x K* (``partitions=K``) splits the
entries of every tensor at random into K parts with a coefficient each. Task vectors may be LoRA factors (`LowRank`),
and the model linearised (`Problem.linear`).

All use `atlas_parts.optimiser`: AdamW, with weight decay 0.1 on the coefficients themselves (it pulls them to theta0),
along the *normalised* gradient g / |g|. That is what the released code comes to: it clips gradients to length 1, but
before they are unscaled by 2^16, so that nearly all are cut. ``gradient_norm=2**-16`` has that code's lengths to the
end (they matter beside Adam's 1e-8), ``None`` takes gradients as they are.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from taskvec import tree as trees
from taskvec.adaptive import atlas_parts as parts, rows as rows_lib
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.keep import accuracy, keep_best, normalised
from taskvec.adaptive.learn import Learned, Outputs, Problem, learn
from taskvec.adaptive.registry import adaptive_method
from taskvec.adaptive.rows import Rows
from taskvec.merging.registry import Card

# Epochs and learning rate by task to forget, which the authors tuned on the validation sets of ViT-B/32.
NEGATION = {
    "Cars": (20, 5e-3),
    "DTD": (20, 1e-2),
    "EuroSAT": (3, 5e-3),
    "GTSRB": (5, 5e-3),
    "MNIST": (7, 3e-3),
    "RESISC45": (10, 2e-3),
    "SUN397": (10, 3e-3),
    "SVHN": (2, 5e-3),
}


def negated(outputs: Outputs) -> jax.Array:
    """Of a target and a control task: ``[-CE, CE]``."""
    return parts.cross_entropies(outputs) * jnp.array([-1.0, 1.0])


@adaptive_method(
    "atlas",
    Card(
        title=parts.TITLE,
        arxiv="2407.02880",
        year=2024,
        summary="free coefficients by task and tensor from the cross-entropy of labelled rows",
        sees=("crops",),
        pieces=True,
        data="few labelled",
        released_code=(
            "keeps the epoch of the best mean normalised accuracy on the rows it trains on, from zero-shot on "
            "(keep='best'); clips scaled gradients (gradient_norm=2**-16); task vectors in float16; an epoch's last "
            "batch is a short one"
        ),
    ),
)
def atlas(
    problem: Problem,
    rows: Rows,
    *,
    mode: trees.GroupMode = "tensor",
    partitions: int = 1,
    partitioned: parts.Partitioned = "all",
    epochs: int = 20,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    gradient_norm: float | None = 1.0,
    regularise: int | None = None,
    per_task: int = 16,
    accumulate: int = 1,
    keep: Literal["last", "best"] = "last",
    validation: Rows | None = None,
    seed: int = 0,
    loop: Loop = Loop(),
) -> Learned:
    """Task addition: minimises the sum of the tasks' cross-entropies.

    Args:
      problem: what is merged, with a head per task.
      rows: labelled; published: the validation split of every task, augmented.
      mode: ``tensor``, ``task`` (the isotropic variant), or another of `taskvec.tree.groups`.
      partitions, partitioned: K of aTLAS x K, see `atlas_parts.free_coefficients`.
      epochs: as long as the smallest task is in batches of `per_task` (`rows.zipped`).
      learning_rate, weight_decay, gradient_norm: see `atlas_parts.optimiser`.
      regularise: p of `atlas_parts.lp_penalty`, or ``None``.
      per_task: rows of a task in a step; published 128 over the number of tasks.
      accumulate: batches a step of the optimiser; published 2 for ViT-L/14, with half the rows each.
      keep: ``last`` step or, of the epochs' ends and zero-shot, the ``best`` mean of accuracies on `validation`, each
        divided by that of the task's expert.
      validation: labelled rows; by default `rows`, as published.
      seed: of the rows drawn and of the parts.
      loop: see `fit.Loop`.

    Raises:
      ValueError: numbers of tasks do not fit, rows have no labels, or a setting is unknown.
      FitDiverged: see `fit.fit`.
    """
    problem.check(rows)
    parts.check_labels(rows, "atlas")
    parametrisation = parts.free_coefficients(problem, mode, partitions, partitioned, seed)
    batches, length = rows_lib.zipped(rows, per_task, seed)
    pick = lambda found: found
    if keep == "best":
        watched = rows if validation is None else validation
        worth = normalised(problem, watched, loop)
        start = worth(accuracy(problem, problem.theta0, watched, loop))
        loop, pick = keep_best(problem, parametrisation, watched, worth, length, epochs * length, loop, start)
    found = learn(
        problem,
        parametrisation,
        parts.cross_entropies,
        batches,
        parts.optimiser(learning_rate, weight_decay, gradient_norm),
        epochs * length,
        penalty=parts.lp_penalty(regularise),
        accumulate=accumulate,
        seed=seed,
        loop=loop,
    )
    return pick(found)


@adaptive_method(
    "atlas_negation",
    Card(
        title=parts.TITLE,
        arxiv="2407.02880",
        year=2024,
        summary="forgets a task by coefficients on its vector, while a control task keeps 95 % of its accuracy",
        learns="target and control",
        sees=("crops",),
        pieces=True,
        data="few labelled",
        tasks=(1, 1),
        released_code="clips scaled gradients (gradient_norm=2**-16); crashes where no epoch may be kept",
    ),
)
def atlas_negation(
    problem: Problem,
    rows: Rows,
    *,
    mode: trees.GroupMode = "tensor",
    epochs: int = 20,
    learning_rate: float = 5e-3,
    weight_decay: float = 0.1,
    gradient_norm: float | None = 1.0,
    per_task: int = 64,
    accumulate: int = 1,
    control: float = 0.95,
    validation: Rows | None = None,
    seed: int = 0,
    loop: Loop = Loop(),
) -> Learned:
    """Forgetting: minimises ``CE(control) - CE(target)`` over the coefficients of the target's one task vector.

    After every epoch accuracies are taken; kept is the lowest of the target at which the control task has at least
    `control` of its zero-shot accuracy, or theta0 if there is none. The run ends once the control falls below.

    Args:
      problem: with one task vector and two heads, target and control.
      rows: labelled, of target and control; published: validation splits, the control's that of ImageNet.
      mode: see `atlas`.
      epochs, learning_rate: by task in `NEGATION`; the defaults are those for Cars. An epoch goes through the rows of
        the smaller set (the released code: through the target's, and needs a larger control set).
      weight_decay, gradient_norm, per_task, accumulate: see `atlas`.
      control: share of the zero-shot accuracy.
      validation: labelled rows of both; by default `rows`, as published.
      seed, loop: see `atlas`.

    Raises:
      ValueError: not one task vector and two heads and sets of labelled rows.
    """
    parts.check_labels(rows, "atlas_negation")
    sizes = problem.num_tasks, problem.heads.kernel.shape[0], len(rows.counts)
    if sizes != (1, 2, 2):
        raise ValueError(
            f"atlas_negation takes (1 task vector, 2 heads, 2 sets of rows: target, control), found {sizes}"
        )
    parametrisation = parts.free_coefficients(problem, mode)
    batches, length = rows_lib.zipped(rows, per_task, seed)
    watched = rows if validation is None else validation
    target0, control0 = accuracy(problem, problem.theta0, watched, loop)
    kept = lambda found: found[1] >= control * control0
    worth = lambda found: -found[0] if kept(found) else -np.inf
    stop = lambda found: not kept(found)
    loop, pick = keep_best(
        problem, parametrisation, watched, worth, length, epochs * length, loop, start=-target0, stop=stop
    )
    found = learn(
        problem,
        parametrisation,
        negated,
        batches,
        parts.optimiser(learning_rate, weight_decay, gradient_norm),
        epochs * length,
        accumulate=accumulate,
        seed=seed,
        loop=loop,
    )
    return pick(found)
