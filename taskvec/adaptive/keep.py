"""Keeping the best step instead of the last, chosen on validation rows, and ending a run early.

What is kept is what a method's authors report; a result says so (`Learned.kept`). The choice sees what validation rows
tell, so those must not be the rows that are scored. Such a run cannot be resumed: the best step so far is in no
checkpoint.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskvec.adaptive.fit import Evaluate, Loop
from taskvec.adaptive.learn import Learned, Problem, with_table
from taskvec.adaptive.parametrisation import Parametrisation
from taskvec.adaptive.rows import Rows
from taskvec.adaptive.teachers import expert, features_of
from taskvec.training import heads as heads_lib
from taskvec.tree import Tree


def logits_of(problem: Problem, features_Nxd: np.ndarray, task: int) -> np.ndarray:
    """Logits of one task's own classes: ``[N, d] -> [N, C_t]``."""
    heads = problem.heads
    mask_C = np.asarray(heads.class_mask[task])
    logits = heads_lib.logits(heads.kernel[task], heads.class_mask[task], heads.scale, jnp.asarray(features_Nxd))
    return np.asarray(logits)[:, mask_C]


def accuracy(problem: Problem, params: Tree, rows: Rows, batch_size: int = 64) -> np.ndarray:
    """Share of correct predictions on every task's labelled rows: ``[S]`` float64.

    Raises:
      ValueError: the rows have no labels.
    """
    return _accuracies(problem, lambda task: params, rows, batch_size)


def normalised(problem: Problem, rows: Rows) -> Callable[[np.ndarray], float]:
    """``accuracies [T] -> mean_t a_t / a*_t``, a*_t that of the task's own expert ``theta0 + tau_t`` on these rows.

    A task whose expert gets no row right counts with a_t. Every expert passes its rows once.
    """
    own_T = _accuracies(problem, lambda task: expert(problem, task), rows, 64)
    own_T = np.where(own_T > 0, own_T, 1.0)
    return lambda found_T: float(np.mean(found_T / own_T))


def _accuracies(problem: Problem, params: Callable[[int], Tree], rows: Rows, batch_size: int) -> np.ndarray:
    if rows.labels is None:
        raise ValueError("accuracy needs labelled rows")
    each = []
    for task, labels in enumerate(rows.labels):
        logits_NxC = logits_of(problem, features_of(problem, params(task), rows, task, batch_size), task)
        each.append(np.mean(logits_NxC.argmax(-1) == labels))
    return np.array(each)


def keep_best(
    problem: Problem,
    parametrisation: Parametrisation,
    rows: Rows,
    worth: Callable[[np.ndarray], float],
    every: int,
    steps: int,
    loop: Loop,
    start: float = -math.inf,
    stop: Callable[[np.ndarray], bool] | None = None,
) -> tuple[Loop, Callable[[Learned], Learned]]:
    """A loop that watches the accuracies on validation rows, and what picks the best result after it.

    Args:
      problem, parametrisation: of the run.
      rows: labelled, for validation.
      worth: ``accuracies [S] -> number``; the step with the largest is kept, -inf for none that may be.
      every: steps from one evaluation to the next.
      steps: of the run.
      loop: the caller's; its own evaluation goes on.
      start: worth of what the run starts from, which is kept if no step is better.
      stop: ``accuracies [S] -> whether to end the run``.

    Returns:
      ``(loop, pick)``; evaluations are dicts of ``accuracy`` ``[S]`` and ``evaluation``, what the caller's own gave.

    Raises:
      ValueError: the loop has a checkpoint.
    """
    loop.refuse("a run that keeps its best step (keep='best')", checkpoint="it cannot resume")
    best = {"worth": start, "learnables": parametrisation.init(), "kept": 0}
    theirs = loop.evaluate

    def call(step: int, now: Learned) -> dict[str, Any]:
        out = {}
        if step % every == 0 or step == steps:
            out["accuracy"] = accuracy(problem, now.params, rows)
            if worth(out["accuracy"]) > best["worth"]:
                best.update(worth=worth(out["accuracy"]), learnables=now.learnables, kept=step)
        if theirs is not None and (step % theirs.every == 0 or step == steps):
            out["evaluation"] = theirs.call(step, now)
        return out

    def ends(out: dict[str, Any]) -> bool:
        mine = stop is not None and "accuracy" in out and stop(out["accuracy"])
        return mine or ("evaluation" in out and theirs.stop is not None and theirs.stop(out["evaluation"]))

    def pick(found: Learned) -> Learned:
        params = jax.jit(parametrisation.merge)(problem.theta0, problem.tau, best["learnables"])
        found = found._replace(params=params, learnables=best["learnables"], kept=best["kept"])
        return with_table(found, parametrisation)

    both = every if theirs is None else math.gcd(every, theirs.every)
    return loop._replace(evaluate=Evaluate(both, call, ends)), pick
