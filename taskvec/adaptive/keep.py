"""Keeping the best step instead of the last, chosen on validation rows, and ending a run early.

What is kept is what a method's authors report; a result says so (`Learned.kept`). The choice sees what validation rows
tell, so those must not be the rows that are scored. A run that resumes has the best step so far from a checkpoint of
its own.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from taskvec.adaptive.fit import Evaluate, Loop
from taskvec.adaptive.learn import Learned, Problem, heads_of, with_table
from taskvec.adaptive.parametrisation import Parametrisation
from taskvec.adaptive.rows import Rows
from taskvec.adaptive.teachers import expert, features_of
from taskvec.training import heads as heads_lib
from taskvec.tree import Tree

_logits = jax.jit(heads_lib.all_logits)


def logits_of(problem: Problem, features_Nxd: np.ndarray, task: int, batch_size: int = 256) -> np.ndarray:
    """Logits of one task's own classes: ``[N, d] -> [N, C_t]``; one compiled program for all tasks."""
    head, count = heads_of(problem.heads, [task]), len(features_Nxd)
    features_Nxd = np.pad(features_Nxd, ((0, -count % batch_size), (0, 0)))
    parts = [_logits(head, features_Nxd[None, at : at + batch_size])[0] for at in range(0, count, batch_size)]
    return np.concatenate(parts)[:count, np.asarray(head.class_mask[0])]


def accuracy(problem: Problem, params: Tree, rows: Rows, loop: Loop = Loop()) -> np.ndarray:
    """Share of correct predictions on every task's labelled rows: ``[S]`` float64; of the loop, `on_phase` is called.

    Raises:
      ValueError: the rows have no labels.
    """
    return _accuracies(problem, lambda task: params, rows, loop)


def normalised(problem: Problem, rows: Rows, loop: Loop = Loop()) -> Callable[[np.ndarray], float]:
    """``accuracies [T] -> mean_t a_t / a*_t``, a*_t that of the task's own expert ``theta0 + tau_t`` on these rows.

    A task whose expert gets no row right counts with a_t. Every expert passes its rows once.
    """
    own_T = _accuracies(problem, lambda task: expert(problem, task), rows, loop)
    own_T = np.where(own_T > 0, own_T, 1.0)
    return lambda found_T: float(np.mean(found_T / own_T))


def _accuracies(problem: Problem, params: Callable[[int], Tree], rows: Rows, loop: Loop) -> np.ndarray:
    if rows.labels is None:
        raise ValueError("accuracy needs labelled rows")
    each = []
    for task, labels in enumerate(rows.labels):
        logits_NxC = logits_of(problem, features_of(problem, params(task), rows, task, loop=loop), task)
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
    merge: Callable[..., Tree] | None = None,
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
      merge: the parametrisation's, where it is compiled already.

    Returns:
      ``(loop, pick)``; evaluations are dicts of ``accuracy`` ``[S]`` and ``evaluation``, what the caller's own gave.
    """
    # Worth in float32, as it is saved: a run that resumes shall choose as one that did not.
    best = {"worth": np.float32(start), "learnables": parametrisation.init(), "kept": np.int32(0)}
    best = jax.tree.map(np.asarray, best)
    checkpoint = loop.part("best").checkpoint
    if saved := checkpoint and checkpoint.restore(best):
        best = jax.tree.map(np.asarray, saved[1])
    theirs = loop.evaluate

    def call(step: int, now: Learned) -> dict[str, Any]:
        out = {}
        if step % every == 0 or step == steps:
            out["accuracy"] = accuracy(problem, now.params, rows, loop)
            found = np.asarray(worth(out["accuracy"]), np.float32)
            if found > best["worth"]:
                best.update(worth=found, learnables=now.learnables, kept=np.asarray(step, np.int32))
                if checkpoint is not None:
                    checkpoint.save(step, best)
        if theirs is not None and (step % theirs.every == 0 or step == steps):
            out["evaluation"] = theirs.call(step, now)
        return out

    def ends(out: dict[str, Any]) -> bool:
        mine = stop is not None and "accuracy" in out and stop(out["accuracy"])
        return mine or ("evaluation" in out and theirs.stop is not None and theirs.stop(out["evaluation"]))

    def pick(found: Learned) -> Learned:
        compiled = merge or jax.jit(parametrisation.merge)
        params = compiled(problem.theta0, problem.tau, best["learnables"])
        found = found._replace(params=params, learnables=best["learnables"], kept=int(best["kept"]))
        return with_table(found, parametrisation)

    both = every if theirs is None else math.gcd(every, theirs.every)
    return loop._replace(evaluate=Evaluate(both, call, ends)), pick
