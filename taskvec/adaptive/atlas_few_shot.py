"""aTLAS for a new task: from a few labelled rows and the task vectors of other tasks. arXiv 2407.02880, section 4.2.

See `atlas` for the method, `selection` for a budget of task vectors, and `atlas_heads` for heads trained afterwards.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from taskvec import tree as trees
from taskvec.adaptive import atlas_parts as parts, rows as rows_lib, selection
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.keep import accuracy, keep_best
from taskvec.adaptive.learn import Learned, Problem
from taskvec.adaptive.registry import adaptive_method
from taskvec.adaptive.rows import Batch, Rows
from taskvec.merging.registry import Card


def few_shots(rows: Rows, shots: int, seed: int = 0) -> Rows:
    """At most `shots` rows of every class, drawn at random."""
    numbers = []
    for t, labels in enumerate(rows.labels):
        rng = rows_lib.generator("shots", seed, t)
        classes = [np.flatnonzero(labels == c) for c in np.unique(labels)]
        numbers.append(np.concatenate([rng.permutation(each)[:shots] for each in classes]))
    return rows_lib.chosen(rows, numbers)


def few_of(rows: Rows, share: float, seed: int = 0) -> Rows:
    """A share of every task's rows, drawn at random, at least one; with 1 the rows themselves."""
    if share == 1:
        return rows
    drawn = lambda t, n: rows_lib.generator("shots", seed, t).permutation(n)[: max(int(n * share), 1)]
    return rows_lib.chosen(rows, [drawn(t, n) for t, n in enumerate(rows.counts)])


def epochs_of(rows: Rows, batch_size: int, least: int, seed: int = 0) -> tuple[Callable[[int], Batch], int]:
    """Batches of one task's rows, which are repeated until an epoch has more than `least`; and their number in one."""
    wanted, count = least * batch_size, rows.counts[0]
    rows = rows_lib.repeated(rows, wanted // count + 1 if count < wanted else 1)
    return rows_lib.cyclic(rows, batch_size, seed), -(-rows.counts[0] // batch_size)


@adaptive_method(
    "atlas_few_shot",
    Card(
        title=parts.TITLE,
        arxiv="2407.02880",
        year=2024,
        summary="a new task from a few labelled rows and the task vectors of other tasks, all or a chosen few",
        learns="one target",
        sees=("crops",),
        pieces=True,
        data="few labelled",
        released_code=(
            "keeps the best epoch on a validation split, from zero-shot on (keep='best'); shares of a data set in "
            "place of shots crash; clips scaled gradients; the heads trained after it never move (see atlas_heads)"
        ),
    ),
)
def atlas_few_shot(
    problem: Problem,
    rows: Rows,
    *,
    shots: int | None = None,
    share: float = 1.0,
    budget: int | None = None,
    select: Literal[selection.SELECTIONS] = "gradient",
    blockwise: bool = True,
    draw: int = 0,
    pool: Sequence[np.ndarray] | None = None,
    mode: trees.GroupMode = "tensor",
    partitions: int = 1,
    partitioned: parts.Partitioned = "all",
    epochs: int = 10,
    learning_rate: float = 0.1,
    weight_decay: float = 0.1,
    gradient_norm: float | None = 1.0,
    batch_size: int = 128,
    accumulate: int = 1,
    least_batches: int = 10,
    keep: Literal["last", "best"] = "last",
    validation: Rows | None = None,
    seed: int = 0,
    loop: Loop = Loop(),
) -> Learned:
    """Few-shot recognition: cross-entropy on a task that none of the task vectors is of.

    The learning rate falls to 0 along a cosine. Rows are repeated until an epoch has more than `least_batches` batches;
    where it ends within a batch, the next begins there.

    Args:
      problem: a pool of T task vectors, and one head, the target's.
      rows: labelled rows of the target.
      shots: rows per class; ``None`` takes all.
      share: of all rows, at random, in place of shots (published with aTLAS x K: 0.01 to 1).
      budget: task vectors that are used; ``None`` uses all.
      select: ``gradient``, ``feature`` or ``random``, see `selection`.
      blockwise: whether every tensor chooses its own; by features none does.
      draw: for ``select="random"``, see `selection.choose_within`.
      pool: for ``select="feature"``, see `selection.choose_within`.
      mode, partitions, partitioned, weight_decay, gradient_norm: see `atlas`.
      epochs, learning_rate, batch_size, least_batches: as published.
      accumulate: batches a step of the optimiser; published 2 for ViT-L/14, of half the rows each.
      keep: ``last`` or, of the epochs' ends and zero-shot, the ``best`` accuracy on `validation` (to be given).
      validation: labelled rows of the target.
      seed, loop: see `atlas`.

    Returns:
      With a budget, coefficients ``[G, T]`` are 0 for task vectors that were not chosen.

    Raises:
      ValueError: not one head and one set of labelled rows, or a setting does not fit.
    """
    parts.check_labels(rows, "atlas_few_shot")
    if (problem.heads.kernel.shape[0], len(rows.counts)) != (1, 1):
        raise ValueError("atlas_few_shot takes one head and one set of rows, those of the target task")
    if keep == "best" and validation is None:
        raise ValueError("keep='best' needs validation rows; or keep='last'")
    if not 0 < share <= 1 or (share < 1 and shots is not None):
        raise ValueError(f"share={share} with shots={shots}: a share is in (0, 1], and 1 where shots are given")
    rows = few_of(rows, share, seed) if shots is None else few_shots(rows, shots, seed)
    chosen, tasks = None, problem.num_tasks
    if budget is not None:
        if mode != "tensor" or partitions > 1:
            raise ValueError("a budget goes with mode='tensor' and no partitions")
        chosen = selection.choose_within(problem, rows, budget, select, blockwise, seed, draw, pool, loop)
        problem = problem._replace(tau=chosen.tau)
    learner = parts.learner_of(
        problem.kind, parts.cross_entropies, mode, partitions, partitioned, seed if partitions > 1 else 0,
        learning_rate, weight_decay, gradient_norm, accumulate, loop.chunk, loop.pieces,
    )  # fmt: skip
    batches, length = epochs_of(rows, batch_size, least_batches, seed)
    steps, pick = epochs * length, lambda found: found
    if keep == "best":
        start = accuracy(problem, problem.theta0, validation, loop).mean()
        known = learner.parametrisation, validation, np.mean, length, steps, loop, start
        loop, pick = keep_best(problem, *known, merge=learner.merge)
    found = pick(learner.run(problem, batches, steps, seed=seed, loop=loop))
    if chosen is None:
        return found
    return found._replace(coefficients=selection.spread_out(found.coefficients, chosen.numbers, tasks))
