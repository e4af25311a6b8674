"""Which task vectors a budget goes to: aTLAS, arXiv 2407.02880. Published for pools of 21 and budgets down to 1.

Scores are by *gradient*, ``|<dL/dtheta_l, tau_{l,t}>|`` at theta0 for a tensor l (one backward pass gives all, since it
is the gradient of the coefficients), by *feature* (how near the mean features of two tasks are under theta0), or
random. Whole task vectors are ranked by the mean over tensors; *blockwise*, every tensor has its own ``budget`` best,
which are then stacked as so many task vectors made of parts. Features tell tasks apart, not tensors: by them whole task
vectors are chosen. The paper's definition is confirmed by an early state of
the authors' code for the gradient, which sums gradients over the batches; that of the feature-based score is ours.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from taskvec import tree as trees
from taskvec.adaptive import objectives, rows as rows_lib
from taskvec.adaptive.coefficients import coefficients
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.learn import Kind, Problem, make_loss
from taskvec.adaptive.rows import Rows
from taskvec.adaptive.teachers import features_of
from taskvec.transforms.base import check_choice
from taskvec.tree import Tree

SELECTIONS = ("gradient", "feature", "random")


class Chosen(NamedTuple):
    """Task vectors within a budget b.

    Attributes:
      tau: ``[b, ...]``, of stacked leaves ``[L, b, ...]``.
      numbers: ``[G, b]``, which task vector of the pool each is, by tensor in the order of `taskvec.tree.groups`.
    """

    tau: Tree
    numbers: np.ndarray


def gradient_scores(problem: Problem, rows: Rows, batch_size: int = 64, loop: Loop = Loop()) -> np.ndarray:
    """``|sum over tasks of <d CE / d theta_l, tau_{l,t}>|`` at theta0: ``[G, T]``, G tensors.

    Args:
      problem: a pool of task vectors, and heads of the rows' tasks.
      rows: labelled rows of the target (or of several tasks, whose cross-entropies are summed).
      batch_size: rows at once. Every row counts alike.
      loop: of `on_phase`.
    """
    gradient, start = _gradient(problem.kind)
    heads = problem.heads._replace(scale=jnp.float32(problem.heads.scale))
    frozen, total = (problem.theta0, problem.tau, heads), 0.0
    parts = [(task, at) for task, count in enumerate(rows.counts) for at in range(0, count, batch_size)]
    for task, at in loop.phase("gradients of the pool", parts):
        count = rows.counts[task]
        real = np.arange(at, min(at + batch_size, count))
        numbers = np.concatenate([real, np.full(batch_size - len(real), at)])
        batch = rows._replace(targets=None).batch([numbers], [task])
        weight = (np.arange(batch_size) < len(real)).astype(np.float32) / count
        grads, _ = gradient(start, frozen, batch | {"target_weight": weight}, None)
        total = total + np.asarray(grads["merge"]["lam"], np.float64)
    return np.abs(total)


@functools.lru_cache(1)
def _gradient(kind: Kind) -> tuple[Callable, Tree]:
    """The gradient of the loss by coefficients of all tensors, and where they are 0; kept for the next target."""
    parametrisation = coefficients(trees.groups(kind.theta0, "tensor"), kind.num_tasks, 0.0, "identity")

    def objective(outputs):
        weight = outputs.batch["target_weight"]
        losses = objectives.cross_entropy(outputs.logits[..., None, :], outputs.batch["label"][..., None])
        return (weight * losses).sum(-1)

    gradient = jax.jit(jax.grad(make_loss(kind, parametrisation, objective), has_aux=True))
    return gradient, {"merge": parametrisation.init()}


def feature_scores(target: np.ndarray, pool: Sequence[np.ndarray]) -> np.ndarray:
    """Cosine of the mean unit features of a target's rows and of each task's in the pool: ``[T]``.

    Of ``[N, d]`` and T times ``[N_t, d]``. Features are those of the pretrained model (`teachers.features_of`).
    """
    mean = lambda z: (z / np.linalg.norm(z, axis=1, keepdims=True)).mean(0)
    means = [mean(np.asarray(z, np.float64)) for z in (target, *pool)]
    unit = [m / np.linalg.norm(m) for m in means]
    return np.array([unit[0] @ each for each in unit[1:]])


def best(scores: np.ndarray, budget: int) -> np.ndarray:
    """Numbers of the largest scores in falling order: ``[T] -> [b]``, ``[G, T] -> [G, b]``; the first of equals first.

    Raises:
      ValueError: the budget is not in 1..T.
    """
    if not 1 <= budget <= scores.shape[-1]:
        raise ValueError(f"budget={budget} of {scores.shape[-1]} task vectors; allowed: 1 to {scores.shape[-1]}")
    return np.argsort(-scores, axis=-1, kind="stable")[..., :budget]


def take(theta0: Tree, tau: Tree, numbers_Gxb: np.ndarray) -> Tree:
    """Task vectors in which every tensor is of a task of its own choice; low-rank ones stay so."""
    return _taken(trees.groups(theta0, "tensor").ids, tau, jnp.asarray(numbers_Gxb))


@jax.jit
def _taken(ids: Tree, tau: Tree, numbers: jax.Array) -> Tree:
    def leaf(path, own, vectors_):
        pick = lambda id_, x: jnp.take(x, numbers[id_], axis=0)
        pick = jax.vmap(pick) if trees.is_stacked(path) else pick
        return jax.tree.map(lambda x: pick(own, x), vectors_)

    return trees.map_with_path(leaf, ids, tau)


def spread_out(coef_Gxb: np.ndarray, numbers_Gxb: np.ndarray, num_tasks: int) -> np.ndarray:
    """Coefficients of chosen task vectors as those of the whole pool, 0 elsewhere: ``[G, b] -> [G, T]``."""
    out = np.zeros((len(coef_Gxb), num_tasks), coef_Gxb.dtype)
    np.put_along_axis(out, numbers_Gxb, coef_Gxb, axis=1)
    return out


def choose_within(
    problem: Problem,
    rows: Rows,
    budget: int,
    by: str = "gradient",
    blockwise: bool = True,
    seed: int = 0,
    draw: int = 0,
    pool: Sequence[np.ndarray] | None = None,
    loop: Loop = Loop(),
) -> Chosen:
    """Chooses `budget` task vectors of a pool for the task of some labelled rows.

    Args:
      problem, rows: see `gradient_scores`.
      budget: b.
      by: ``gradient``, ``feature`` or ``random``.
      blockwise: whether every tensor chooses its own; by features none does.
      seed: of random choices.
      draw: which of them; of targets with pools of one size each should have its own.
      pool: by features: those of each task's rows in the pool under theta0, T times ``[N_t, d]``
        (`teachers.features_of`), which may be computed once for many targets.
      loop: of `on_phase`.

    Raises:
      ValueError: an unknown selection, a budget not in 1..T, or features of other than T tasks.
    """
    check_choice("selection", by, SELECTIONS)
    shape = (len(trees.groups(problem.theta0, "tensor").names), problem.num_tasks)
    if by == "feature":
        if pool is None or len(pool) != problem.num_tasks:
            given = "none" if pool is None else f"those of {len(pool)}"
            raise ValueError(f"a choice by feature needs pool, features of all {problem.num_tasks} tasks; got {given}")
        target = features_of(problem, problem.theta0, rows, 0, loop=loop)
        scores = np.broadcast_to(feature_scores(target, pool), shape)
    elif by == "random":
        scores = rows_lib.generator("choice", seed, draw, problem.num_tasks).random(shape)
    else:
        scores = gradient_scores(problem, rows, loop=loop)
    if not blockwise:
        scores = np.broadcast_to(scores[0] if by == "random" else scores.mean(0), scores.shape)
    numbers = best(scores, budget)
    return Chosen(take(problem.theta0, problem.tau, numbers), numbers)
