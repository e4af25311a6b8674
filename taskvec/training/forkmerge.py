"""ForkMerge (arXiv 2301.12618): auxiliary tasks for a target, taken as far as they help on its validation data.

Three stages:

* *rank*: for each auxiliary task, train on it and the targets for a while; its score is the best validation score.
* *fork*: branch k trains on the targets and the k best auxiliaries, one task drawn a step, with probabilities in
  proportion to ``1 / |targets|`` for a target and ``1 / k`` for an auxiliary.
* *merge*, at intervals: the best weights each branch has had are averaged with coefficients found greedily
  (`greedy_merge`), and all branches go on from the average, with the states of their optimisers.

The search runs on the host; what takes time, training and evaluation, is compiled. How to train and to evaluate are any
functions; `branches.make_branches` gives the first for frozen heads (the paper trains heads with the rest, and averages
them). All that the search knows is a tree of arrays, so that a killed run goes on from a checkpoint with the same bits.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from taskvec import tree as trees
from taskvec.training.branches import OnChunk, Trainer
from taskvec.tree import Tree

ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)

Evaluate = Callable[[Tree], float]


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


class _Leg(NamedTuple):
    """A stretch of training with an evaluation at its end."""

    auxiliary: int | None  # the number of the auxiliary task that is ranked; None for a branch
    branch: int
    interval: int
    first: int  # steps of the branch before its interval,
    at: int  # before the leg
    steps: int
    closes: bool  # the interval: a merge follows


def _legs(auxiliaries: int, branches: int, steps: int, interval: int, every: int, rank_steps: int) -> Iterator[_Leg]:
    for a in range(auxiliaries):
        for at in range(0, rank_steps, every):
            yield _Leg(a, 0, 0, 0, at, min(every, rank_steps - at), False)
    for i, first in enumerate(range(0, steps, interval)):
        last = min(first + interval, steps)
        for b in range(branches):
            for at in range(first, last, every):
                closes = b == branches - 1 and at + every >= last
                yield _Leg(None, b, i, first, at, min(every, last - at), closes)


class _Search(NamedTuple):
    """What does not change in a search; see `forkmerge`."""

    trainer: Trainer
    evaluate: Evaluate
    num_tasks: int
    targets: Sequence[int]
    branches: Sequence[int]
    alphas: Sequence[float]
    on_chunk: OnChunk | None

    @property
    def auxiliaries(self) -> list[int]:
        return [t for t in range(self.num_tasks) if t not in self.targets]

    def ranked(self, state: "_State") -> list[tuple[int, float]]:
        """Auxiliary tasks with their scores, the most helpful first."""
        return sorted(zip(self.auxiliaries, state.ranking.tolist(), strict=True), key=lambda pair: -pair[1])


class _State(NamedTuple):
    """All that the search knows after a leg."""

    start: Tree  # where the branches of the interval set out from
    params: Tree  # of the branch in training
    optimisers: list[Tree]  # one a branch; the first serves the ranking before
    best: list[Tree]  # weights, one a branch
    scores: np.ndarray  # [B] float32, theirs
    ranking: np.ndarray  # [A] float32, best score with each auxiliary task
    intervals: dict[str, np.ndarray]  # `Interval` by its fields, [I, ...]


def forkmerge(
    trainer: Trainer,
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
    checkpoint: Any = None,
    on_chunk: OnChunk | None = None,
) -> ForkMerged:
    """Ranks, forks and merges.

    Published for images: epochs of 2500 steps, 20 of them, an interval of 5, ranking for 1, evaluation after each.

    Args:
      trainer: such as from `branches.make_branches`.
      evaluate: ``params -> score`` on validation data of the targets (their mean), to be maximised; taken in float32.
      params: where to start.
      num_tasks: T; tasks that are no targets are auxiliaries.
      targets: numbers of the target tasks.
      steps: of every branch.
      interval: steps between merges.
      evaluate_every: steps between evaluations of a branch.
      rank_steps: for each auxiliary task.
      branches: numbers k of auxiliary tasks, one branch each (scenes: 0, 1, 2).
      alphas: see `greedy_merge`.
      checkpoint: see `adaptive.fit.Loop`; saved after an evaluation.
      on_chunk: called with (steps done, of `total_steps`, and metrics of the last ones).

    Raises:
      ValueError: no target, or a branch with more auxiliaries than there are.
    """
    search = _Search(trainer, lambda theta: np.float32(evaluate(theta)), num_tasks, targets, branches, alphas, on_chunk)
    others = len(search.auxiliaries)
    if not targets or not branches or max(branches) > others or min(steps, interval, evaluate_every) < 1:
        raise ValueError(
            f"want targets, positive numbers of steps, and branches of at most {others} auxiliary tasks; got "
            f"targets={targets}, branches={branches}, steps {steps}, {interval}, {evaluate_every}"
        )
    state, done, seen = _start(search, params, -(-steps // interval)), 0, 0
    if checkpoint is not None and (saved := checkpoint.restore(state)):
        seen, state = saved[0], _on_host(saved[1])
    for leg in _legs(others, len(branches), steps, interval, evaluate_every, rank_steps):
        if done >= seen:
            state = _forward(search, state, leg, done)
            if checkpoint is not None and checkpoint.should_save(done + leg.steps):
                checkpoint.save(done + leg.steps, state)
        done += leg.steps
    rows = zip(*(state.intervals[name].tolist() for name in Interval._fields), strict=True)
    intervals = [Interval(tuple(scores), tuple(lam), score) for scores, lam, score in rows]
    return ForkMerged(state.start, search.ranked(state), intervals)


def total_steps(auxiliaries: int, branches: int, steps: int, rank_steps: int) -> int:
    """Steps of a whole run."""
    return auxiliaries * rank_steps + branches * steps


def _start(search: _Search, params: Tree, intervals: int) -> _State:
    branches, lowest = len(search.branches), lambda *shape: np.full(shape, -np.inf, np.float32)
    kept = {"scores": lowest(intervals, branches), "coefficients": lowest(intervals, branches)}
    optimisers, best = [search.trainer.init(params)] * branches, [params] * branches
    ranking, kept = lowest(len(search.auxiliaries)), kept | {"score": lowest(intervals)}
    return _State(params, params, optimisers, best, lowest(branches), ranking, kept)


def _on_host(state: _State) -> _State:
    """The same, with numbers that are written to in numpy."""
    intervals = {name: np.array(x) for name, x in state.intervals.items()}
    return state._replace(
        optimisers=list(state.optimisers), best=list(state.best), scores=np.array(state.scores),
        ranking=np.array(state.ranking), intervals=intervals,
    )  # fmt: skip


def _with(items: Any, at: int, item: Any) -> Any:
    out = items.copy()
    out[at] = item
    return out


def _forward(search: _Search, now: _State, leg: _Leg, done: int) -> _State:
    """One leg, `done` steps of the whole run before it."""
    theta = now.start if leg.at == leg.first else now.params
    optimiser = search.trainer.init(theta) if leg.at == 0 else now.optimisers[leg.branch]
    tasks = [t for t, _ in search.ranked(now)][: search.branches[leg.branch]]
    helpers = tasks if leg.auxiliary is None else [search.auxiliaries[leg.auxiliary]]
    chances = probabilities(search.num_tasks, search.targets, helpers)
    show = search.on_chunk and (lambda step, metrics: search.on_chunk(done + step - leg.at, metrics))
    theta, optimiser = search.trainer.train(theta, optimiser, chances, leg.at, leg.steps, show)
    now = now._replace(params=theta, optimisers=_with(now.optimisers, leg.branch, optimiser))
    return _judged(search, now, leg, search.evaluate(theta))


def _judged(search: _Search, now: _State, leg: _Leg, score: np.float32) -> _State:
    """What a score changes at the end of a leg: the ranking, or the best of a branch, and a merge where one is due."""
    if leg.auxiliary is not None:
        better = max(score, now.ranking[leg.auxiliary])
        return now._replace(ranking=_with(now.ranking, leg.auxiliary, better))
    if score > now.scores[leg.branch]:
        best = _with(now.best, leg.branch, now.params)
        now = now._replace(best=best, scores=_with(now.scores, leg.branch, score))
    if not leg.closes:
        return now
    merged = greedy_merge(now.best, now.scores.tolist(), search.evaluate, search.alphas)
    found = {"scores": now.scores, "coefficients": merged.coefficients, "score": merged.score}
    intervals = {name: _with(now.intervals[name], leg.interval, x) for name, x in found.items()}
    return now._replace(start=merged.params, intervals=intervals)
