"""Which model of a pool a gradient asks for: the linear oracle of Frank-Wolfe merging (arXiv 2503.12649)."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from taskvec import tree as trees, vectors
from taskvec.adaptive import objectives
from taskvec.adaptive.fit import FitDiverged, Loop
from taskvec.adaptive.learn import Problem, heads_of
from taskvec.adaptive.rows import Rows
from taskvec.training import heads as heads_lib
from taskvec.training.heads import Heads
from taskvec.tree import Tree

Array = jax.Array

POINTS = ("weights", "vectors")
MEASURES = ("cosine", "inner")
GRANULARITIES = ("model", "tensor")


def aligned(grads: Tree, theta0: Tree, vector: Tree, point: str, measure: str) -> Array:
    """How a gradient lies to a model, tensor by tensor: ``[G]`` in the order of ``groups(theta0, "tensor")``.

    Args:
      grads: of the loss.
      theta0: pretrained weights.
      vector: a task vector, without task axis.
      point: ``weights`` measures against ``theta0 + vector``, ``vectors`` against the vector.
      measure: ``cosine`` (0 where a norm is 0; NaN stays NaN), or ``inner``.
    """

    def tensor(g: Array, base: Array, own: Array) -> Array:
        s = base.astype(jnp.float32) + own if point == "weights" else own.astype(jnp.float32)
        inner, norms = jnp.vdot(g, s), jnp.linalg.norm(g.reshape(-1)) * jnp.linalg.norm(s.reshape(-1))
        return inner if measure == "inner" else jnp.where(norms == 0, 0.0, inner / jnp.where(norms == 0, 1.0, norms))

    def leaf(path: str, g: Array, base: Array, own: Array) -> Array:
        if not trees.is_float(base):
            return jnp.zeros(base.shape[:1] if trees.is_stacked(path) else ())
        return (jax.vmap(tensor) if trees.is_stacked(path) else tensor)(g.astype(jnp.float32), base, own)

    flat = trees.flatten(trees.map_with_path(leaf, grads, theta0, vector))
    return jnp.concatenate([jnp.atleast_1d(x) for x in flat.values()])


_aligned = jax.jit(aligned, static_argnames=("point", "measure"))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add_gradient(apply_fn: Callable, total: Tree, params: Tree, batch: Tree, head: Heads, weight_B: Array):
    """Adds one batch's loss, ``sum_b weight_b CE_b``, and its gradient to (loss, gradients)."""

    def loss_of(params: Tree) -> Array:
        (logits_BxC,) = heads_lib.all_logits(head, apply_fn(params, batch)["features"][None])
        return (weight_B * objectives.cross_entropy(logits_BxC[:, None], batch["label"][:, None])).sum()

    loss, grads = jax.value_and_grad(loss_of, allow_int=True)(params)
    add = lambda a, g, p: a + g.astype(jnp.float32) if trees.is_float(p) else a
    return total[0] + loss, jax.tree.map(add, total[1], grads, params)


def proxy(
    problem: Problem,
    rows: Rows,
    shots: int,
    batch_size: int,
    seed: int,
    params: Tree,
    tasks: Sequence[int],
    round_: int,
    loop: Loop = Loop(),
) -> tuple[float, Tree]:
    """The mean over tasks of mean cross-entropies at `params`, and its gradient, float32.

    Args:
      problem: only its model and heads are used.
      rows: labelled.
      shots: rows of a task, drawn from (seed, round, task); all, where there are fewer.
      batch_size: rows at once, all batches of one shape.
      seed: of the rows drawn.
      params: where.
      tasks: whose losses.
      round_: number of the round.
      loop: of `on_phase`.
    """
    size = min(batch_size, shots)
    total = (jnp.zeros(()), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
    for task in loop.phase(f"gradients of round {round_ + 1}", tasks):
        numbers = np.random.default_rng([seed, round_, task]).permutation(rows.counts[task])[:shots]
        head = heads_of(problem.heads, [task])
        for at in range(0, len(numbers), size):
            part = numbers[at : at + size]
            weight = np.where(np.arange(size) < len(part), 1 / (len(numbers) * len(tasks)), 0).astype(np.float32)
            part = np.concatenate([part, np.full(size - len(part), part[0])])
            batch = rows._replace(targets=None).batch([part], [task])
            total = _add_gradient(problem.apply_fn, total, params, batch, head, weight)
        jax.block_until_ready(total)
    return float(total[0]), total[1]


def scores(problem: Problem, grads: Tree, point: str, measure: str, *more: Tree) -> np.ndarray:
    """`aligned` for every model of the pool, and for more vectors: ``[T + n, G]``; one vector at a time."""
    pool = (vectors.select(problem.tau, k) for k in range(problem.num_tasks))
    own = [_aligned(grads, problem.theta0, vector, point=point, measure=measure) for vector in (*pool, *more)]
    return np.stack([np.asarray(each, np.float64) for each in own])


def asked(
    problem: Problem,
    rows: Rows,
    shots: int,
    batch_size: int,
    seed: int,
    point: str,
    measure: str,
    steps: int,
    loop: Loop,
    params: Tree,
    tasks: Sequence[int],
    round_: int,
    *more: Tree,
) -> tuple[float, np.ndarray]:
    """What a round asks the pool: the loss of `proxy`, and the `scores` of its gradient.

    Args:
      problem, rows, shots, batch_size, seed, params, tasks, round_: see `proxy`.
      point, measure, more: see `scores`.
      steps: of a round, for the error.
      loop: of `on_phase`, told after every task.

    Raises:
      FitDiverged: the loss or a tensor's score is not finite; NaN would choose a vertex, and go on from there.
    """
    loss, grads = proxy(problem, rows, shots, batch_size, seed, params, tasks, round_, loop)
    found = scores(problem, grads, point, measure, *more)
    bad = np.flatnonzero(~np.isfinite(found).all(0))
    if len(bad) or not np.isfinite(loss):
        names = trees.groups(problem.theta0, "tensor").names
        raise FitDiverged(round_ * steps, [] if np.isfinite(loss) else ["loss"], [names[g] for g in bad])
    return loss, found


def lowest(scores_VxG: np.ndarray, granularity: str) -> np.ndarray:
    """The vertex for every tensor, ``[G]``: one for all, or each its own."""
    if granularity == "model":
        return np.full(scores_VxG.shape[1], scores_VxG.sum(1).argmin())
    return scores_VxG.argmin(0)


def one_a_task(
    ask: Callable, params: Tree, count: int, round_: int, granularity: str, loop: Loop
) -> tuple[np.ndarray, np.ndarray]:
    """Losses ``[n]`` of the first n tasks, and the vertices ``[n, G]`` that they choose, none twice for a tensor.

    Args:
      ask: ``(params, tasks, round) -> (loss, scores)``, see `asked`.
      params, count, round_: weights, n, number of the round.
      granularity: see `lowest`.
      loop: of `on_phase`.
    """
    losses, chosen, used = [], [], None
    for task in loop.phase(f"gradients of round {round_ + 1}", range(count)):
        loss, found = ask(params, [task], round_)
        used = np.zeros(found.shape, bool) if used is None else used
        best = lowest(np.where(used, np.inf, found), granularity)
        used[best, np.arange(len(best))] = True
        losses.append(np.float32(loss))
        chosen.append(best)
    return np.array(losses), np.array(chosen)
