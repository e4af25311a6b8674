"""ForkMerge (arXiv 2301.12618): auxiliary tasks for a target, taken as far as they help on its validation data.

Three stages:

* *rank*: for each auxiliary task, train on it and the targets for a while; its score is the best validation score.
* *fork*: branch k trains on the targets and the k best auxiliaries, one task drawn a step, with probabilities in
  proportion to ``1 / |targets|`` for a target and ``1 / k`` for an auxiliary.
* *merge*, at intervals: the best weights each branch has had are averaged with coefficients found greedily
  (`greedy_merge`), and all branches go on from the average, with the states of their optimisers.

The search runs on the host; what takes time, training and evaluation, is compiled. `train` and `evaluate` are any
functions; `make_branches` gives `train` for frozen heads (the paper trains heads with the rest, and averages them).
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taskvec import tree as trees
from taskvec.adaptive.fit import make_fit
from taskvec.training.finetune import classify
from taskvec.training.heads import Heads
from taskvec.tree import Tree

ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)

Evaluate = Callable[[Tree], float]
# (params, probabilities of the tasks, name of the branch, its steps so far, steps) -> params
Train = Callable[[Tree, np.ndarray, Hashable, int, int], Tree]


class Merged(NamedTuple):
    """A greedy merge.

    Attributes:
      params: ``sum_b lam_b theta_b / sum_b lam_b``.
      coefficients: lam, in the order of the models; that of the best model is 1.
      score: of params, on validation data.
    """

    params: Tree
    coefficients: tuple[float, ...]
    score: float


class Interval(NamedTuple):
    """One interval of training: the best score of each branch so far, and the merge at its end."""

    scores: tuple[float, ...]
    coefficients: tuple[float, ...]
    score: float


class ForkMerged(NamedTuple):
    """The end of a run.

    Attributes:
      params: after the last merge.
      ranking: auxiliary tasks, the most helpful first, as (task, score).
      intervals: what happened at each merge.
    """

    params: Tree
    ranking: list[tuple[int, float]]
    intervals: list[Interval]


def greedy_merge(
    models: Sequence[Tree], scores: Sequence[float], evaluate: Evaluate, alphas: Sequence[float] = ALPHAS
) -> Merged:
    """Averages models, from the best to the worst, each with the coefficient that scores best.

    The best has 1. Model i of the order tries ``alpha * (mean of the i coefficients before it)`` for all alpha, and
    keeps the first that is strictly better than what there was, or 0. Integers come from the best model.

    Args:
      models: parameter trees.
      scores: of the models, to be maximised.
      evaluate: ``params -> score``.
      alphas: 0 is not evaluated again: it is the average so far.
    """
    order = sorted(range(len(models)), key=lambda b: -scores[b])
    lam = dict.fromkeys(order, 0.0)
    lam[order[0]], best = 1.0, scores[order[0]]
    ranked = [models[b] for b in order]
    weigh = lambda: _average(ranked, jnp.asarray([lam[b] for b in order], jnp.float32))
    for i, b in enumerate(order[1:], 1):
        bound, kept = sum(lam.values()) / i, 0.0
        for alpha in alphas:
            if alpha:
                lam[b] = alpha * bound
                score = evaluate(weigh())
                if score > best:
                    best, kept = score, lam[b]
        lam[b] = kept
    return Merged(weigh(), tuple(lam[b] for b in range(len(models))), best)


@jax.jit
def _average(models: list[Tree], lam: jax.Array) -> Tree:
    share = lam / lam.sum()

    def leaf(*each):
        if not trees.is_float(each[0]):
            return each[0]
        return sum(share[b] * x.astype(jnp.float32) for b, x in enumerate(each)).astype(each[0].dtype)

    return jax.tree.map(leaf, *models)


def probabilities(num_tasks: int, targets: Sequence[int], auxiliaries: Sequence[int]) -> np.ndarray:
    """Chances ``[T]`` of a task to be drawn in a branch."""
    chances = np.zeros(num_tasks)
    chances[list(targets)] = 1 / len(targets)
    if len(auxiliaries):
        chances[list(auxiliaries)] = 1 / len(auxiliaries)
    return chances / chances.sum()


def forkmerge(
    train: Train,
    evaluate: Evaluate,
    params: Tree,
    *,
    num_tasks: int,
    targets: Sequence[int],
    steps: int,
    interval: int,
    evaluate_every: int,
    rank_steps: int,
    branches: Sequence[int] = (0, 3, 5),
    alphas: Sequence[float] = ALPHAS,
) -> ForkMerged:
    """Ranks, forks and merges.

    Published for images: epochs of 2500 steps, 20 of them, an interval of 5, ranking for 1, evaluation after each.

    Args:
      train: trains a branch and keeps its optimiser by the name of the branch, such as from `make_branches`.
      evaluate: ``params -> score`` on validation data of the targets (their mean), to be maximised.
      params: where to start.
      num_tasks: T; tasks that are no targets are auxiliaries.
      targets: numbers of the target tasks.
      steps: of every branch.
      interval: steps between merges.
      evaluate_every: steps between evaluations of a branch.
      rank_steps: for each auxiliary task.
      branches: numbers k of auxiliary tasks, one branch each (scenes: 0, 1, 2).
      alphas: see `greedy_merge`.

    Raises:
      ValueError: no target, or a branch with more auxiliaries than there are.
    """
    others = [t for t in range(num_tasks) if t not in targets]
    if not targets or not branches or max(branches) > len(others) or min(steps, interval, evaluate_every) < 1:
        raise ValueError(
            f"want targets, positive numbers of steps, and branches of at most {len(others)} auxiliary tasks; got "
            f"targets={targets}, branches={branches}, steps {steps}, {interval}, {evaluate_every}"
        )

    def follow(theta: Tree, chances: np.ndarray, name: Hashable, first: int, last: int, best: tuple) -> tuple:
        """Trains with evaluations in between: (last weights, (best score, its weights))."""
        for at in range(first, last, evaluate_every):
            theta = train(theta, chances, name, at, min(evaluate_every, last - at))
            score = float(evaluate(theta))
            if score > best[0]:
                best = (score, theta)
        return theta, best

    nothing = (-np.inf, params)
    score_of = lambda t: follow(params, probabilities(num_tasks, targets, [t]), ("rank", t), 0, rank_steps, nothing)
    ranking = sorted([(t, score_of(t)[1][0]) for t in others], key=lambda pair: -pair[1])
    ranked = [t for t, _ in ranking]
    chances = {k: probabilities(num_tasks, targets, ranked[:k]) for k in branches}
    best, intervals = dict.fromkeys(branches, nothing), []
    for first in range(0, steps, interval):
        last = min(first + interval, steps)
        for k in branches:
            _, best[k] = follow(params, chances[k], ("branch", k), first, last, best[k])
        scores = [best[k][0] for k in branches]
        merged = greedy_merge([best[k][1] for k in branches], scores, evaluate, alphas)
        params = merged.params
        intervals.append(Interval(tuple(scores), merged.coefficients, merged.score))
    return ForkMerged(params, ranking, intervals)


class _Pause:
    """A checkpoint in memory, for `fit`: gives a branch its optimiser back, at new weights."""

    def __init__(self):
        self.step, self.opt_state = 0, None

    def should_save(self, step: int) -> bool:
        return False

    def save(self, step: int, state: Any) -> None:
        self.step, self.opt_state = step, state["state"].opt_state

    def restore(self, state: Any) -> tuple[int, Any] | None:
        if self.opt_state is None:
            return None
        return self.step, state | {"state": state["state"]._replace(opt_state=self.opt_state)}


def make_branches(
    apply_fn: Callable[..., dict],
    optimiser: optax.GradientTransformation,
    heads: Heads,
    batches: Sequence[Callable[[int], dict[str, np.ndarray]]],
    *,
    seed: int = 0,
    chunk: int | None = None,
) -> Train:
    """`forkmerge`'s `train` for frozen heads; all branches share a compiled step.

    Args:
      apply_fn: ``(params, batch) -> {"features": [B, d], ...}``.
      optimiser: of optax; its schedule runs over all steps of a branch.
      heads: frozen heads of T tasks.
      batches: T functions ``step -> inputs`` and ``label`` int32 ``[B]``, of one shape (others compile once more).
      seed: of the tasks drawn and of the step's keys. The draw depends on the step alone, as in the released code.
      chunk: see `adaptive.fit.make_fit`.
    """

    def loss_fn(params, heads, batch, key):
        task, batch = batch["task"], {name: x for name, x in batch.items() if name != "task"}
        head = (heads.kernel[task], heads.class_mask[task], heads.scale)
        return classify(apply_fn(params, batch), head, batch)

    run = make_fit(loss_fn, optimiser, chunk=chunk)
    frozen = heads._replace(scale=np.float32(heads.scale))
    pauses: dict[Hashable, _Pause] = {}

    def train(params: Tree, chances: np.ndarray, name: Hashable, first: int, steps: int) -> Tree:
        def batch(step: int) -> dict[str, np.ndarray]:
            task = int(np.random.default_rng([seed, step]).choice(len(batches), p=chances))
            return batches[task](step) | {"task": np.int32(task)}

        pause = pauses.setdefault(name, _Pause())
        if pause.step != first:
            raise ValueError(f"branch {name} has done {pause.step} steps, asked to go on from {first}")
        return run(params, batch, first + steps, frozen=frozen, seed=seed, checkpoint=pause).learnables

    return train
