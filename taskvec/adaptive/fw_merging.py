"""Frank-Wolfe merging: which of many fine-tuned models to move to, told by a gradient. arXiv 2503.12649 (ICCV 2025).

Merged weights stay in the convex hull of a pool of models s_k = theta0 + tau_k. In a round, the gradient g of labelled
cross-entropy at the merged weights chooses the vertex that it points away from most,

    k* = argmin_k sum_l cos(g_l, s_{k,l})        (l: tensors; the classical oracle has inner products for cosines)

*Hard*: one vertex for the mean loss of all tasks, ``theta <- theta + eta_i (s_k* - theta)``, ``eta_i = scale step_size
2 / (i + 2)``; or a TIES merge in its place, after DARE or not, see `fw_ties`. *Soft*: for every task the vertex that
its own loss asks for, no vertex twice in a round; then AdaMerging over the chosen ones from the current weights,
``theta <- theta + sum_j lam_{l,j} (s_j - theta)``.

But for TIES, what is merged is always ``theta0 + sum_k c_{l,k} tau_k``: the result has a table of coefficients over
the pool.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taskvec import tree as trees
from taskvec.adaptive import fw_ties, objectives
from taskvec.adaptive.coefficients import coefficients
from taskvec.adaptive.fit import Loop, make_fit
from taskvec.adaptive.fw_oracle import GRANULARITIES, MEASURES, POINTS, asked, lowest, one_a_task
from taskvec.adaptive.learn import Learned, Outputs, Problem, make_loss
from taskvec.adaptive.registry import adaptive_method
from taskvec.adaptive.rows import Rows, together
from taskvec.merging.registry import Card
from taskvec.tree import Tree

Array = jax.Array


def _check(problem: Problem, rows: Rows, loop: Loop) -> None:
    problem.check_not_linear("Frank-Wolfe merging")
    problem.check_dense("Frank-Wolfe merging")
    if rows.labels is None:
        raise ValueError("Frank-Wolfe merging chooses by the gradient of cross-entropy: its rows need labels")
    if len(rows.counts) != (tasks := problem.heads.kernel.shape[0]):
        raise ValueError(f"rows of {len(rows.counts)} tasks but heads of {tasks}")
    why = "it goes round by round"
    loop.refuse("Frank-Wolfe merging", evaluate=why, pieces=why)


_CARD = {
    "title": "FW-Merging: Scaling Model Merging with Frank-Wolfe Optimization",
    "arxiv": "2503.12649",
    "year": 2025,
}


@adaptive_method(
    "fw_hard",
    Card(
        **_CARD,
        summary="step by step towards the one model of a pool that a labelled gradient asks for",
        data="few labelled",
        released_code=(
            "these defaults are FusionBench's for ViT. For RoBERTa: granularity='tensor', step_size=1, scale=.29, "
            "start=.29, or TIES (merge='ties', scale=.9, start=.9), also after DARE (merge='dare_ties'), which there "
            "spares tensors of one axis, and whose steps all have the length .9; it takes a step towards tensors of "
            "zeros where no vertex is good, here towards the pretrained ones and with point='vectors' alone. A tensor "
            "whose gradient is 0 gives it NaN, here 0"
        ),
    ),
)
def fw_hard(
    problem: Problem,
    rows: Rows,
    *,
    rounds: int = 10,
    merge: Literal["task_arithmetic", "ties", "dare_ties"] = "task_arithmetic",
    density: float = 0.3,
    scale: float = 0.3,
    step_size: float = 0.1,
    start: float = 0.3,
    granularity: Literal[GRANULARITIES] = "model",
    point: Literal[POINTS] = "weights",
    measure: Literal[MEASURES] = "cosine",
    shots: int = 100,
    batch_size: int = 20,
    seed: int = 0,
    loop: Loop = Loop(),
) -> Learned:
    """Frank-Wolfe with one model per round.

    The merge that it starts from is a vertex too, as in the released code.

    Args:
      problem: what is merged: T task vectors are the pool, heads are of the S tasks that the rows belong to.
      rows: labelled, of S tasks.
      rounds: number of steps.
      merge: how weights begin, and go to a vertex: ``task_arithmetic``, ``ties`` or ``dare_ties``, see `fw_ties`.
      density: fraction of the entries that TIES keeps, and DARE before it.
      scale, step_size: ``eta_i = scale * step_size * 2 / (i + 2)``.
      start: coefficient of every task vector at the start, or of their TIES merge; 0 is the pretrained model.
      granularity: one vertex for the ``model``, or one for each ``tensor``; then, with ``point="vectors"``, a tensor
        that no vertex is good for (all scores above 0) goes towards the pretrained one.
      point, measure: see `aligned`. The classical oracle is ``inner``, for which both points say the same.
      shots: rows of a task, drawn anew in every round.
      batch_size: rows at once; no result depends on it but by rounding.
      seed: of the rows drawn, and of DARE.
      loop: see `fit.Loop`; its steps are rounds. Not `evaluate`, `pieces` and `place`.

    Returns:
      `Learned` with coefficients of every tensor ``[G, T]``, but with TIES; ``loss`` ``[rounds]`` before each step, and
      ``chosen`` ``[rounds, G]``: the vertex, T for the start, T + 1 for the pretrained model.

    Raises:
      ValueError: rows without labels; numbers of tasks do not fit; unknown choice; a loop with what is not heeded.
      FitDiverged: a loss or score is not finite; its step is the round.
    """
    _check(problem, rows, loop)
    loop.refuse("fw_hard", place="its batches are not placed")
    ask = functools.partial(asked, problem, rows, shots, batch_size, seed, point, measure, 1, loop)
    num_tasks = problem.num_tasks
    groups = trees.groups(problem.theta0, "tensor")
    table = np.full((len(groups.names), num_tasks), start)
    vertices = np.concatenate([np.eye(num_tasks), table[:1], np.zeros((1, num_tasks))])
    merged = _merger(problem, groups)
    key = lambda i: jax.random.fold_in(jax.random.key(seed), i) if merge == "dare_ties" else None
    params = begin = merged(table) if merge == "task_arithmetic" else fw_ties.first(problem, start, density, key(0))
    first = jax.tree.map(lambda a, b: a - b, params, problem.theta0)
    history = {"loss": np.zeros(rounds, np.float32), "chosen": np.zeros((rounds, len(table)), np.int32)}
    saved, begun = loop.checkpoint and loop.checkpoint.restore(history), 0
    if saved:
        begun, history = saved[0], jax.tree.map(np.array, saved[1])
    if loop.on_start is not None:
        loop.on_start(rounds)
    for i in range(rounds):
        # What was chosen before is gone through again: that is quick, and gives the same bits as what is not saved.
        if i >= begun:
            history["loss"][i], found = ask(params, range(len(rows.counts)), i, first)
            if granularity == "tensor" and point == "vectors":
                found = np.concatenate([found, np.zeros_like(found[:1])])
            history["chosen"][i] = lowest(found, granularity)
        chosen, eta = history["chosen"][i], scale * step_size * 2 / (i + 2)
        if merge == "task_arithmetic":
            table += eta * (vertices[chosen] - table)
            params = merged(table) if i >= begun - 1 else params
        else:
            args = params, merged(vertices[chosen]), begin, groups.ids, chosen == num_tasks, eta, density, key(i + 1)
            params = fw_ties.stepped(*args)
        if i >= begun:
            _told(loop, i + 1, rounds, history)
    if merge != "task_arithmetic":
        return Learned(params, {}, history)
    return Learned(params, {}, history, table.astype(np.float32), groups.names)


def _told(loop: Loop, done: int, rounds: int, history: dict[str, np.ndarray]) -> None:
    """Saves a round where that is due, and says so."""
    if loop.checkpoint is not None and (done == rounds or loop.checkpoint.should_save(done)):
        loop.checkpoint.save(done, history)
    if loop.on_chunk is not None:
        loop.on_chunk(done, {"loss": history["loss"][done - 1 : done]})


def _merger(problem: Problem, groups: trees.Groups) -> Callable[[np.ndarray], Tree]:
    """``table [G, T] -> params``, compiled once."""
    merge = jax.jit(coefficients(groups, problem.num_tasks, 0.0, "identity").merge)
    return lambda table: merge(problem.theta0, problem.tau, {"lam": jnp.asarray(table, jnp.float32)})


@adaptive_method(
    "fw_soft",
    Card(
        **_CARD,
        summary="rounds of AdaMerging over the models of a pool that labelled gradients ask for, one per task",
        data="few labelled",
        released_code="as here (FusionBench's fw_soft); coefficients are not clamped, entropy_eps=1e-8",
    ),
)
def fw_soft(
    problem: Problem,
    rows: Rows,
    *,
    adapt: Rows | None = None,
    rounds: int = 10,
    granularity: Literal[GRANULARITIES] = "model",
    point: Literal[POINTS] = "weights",
    measure: Literal[MEASURES] = "cosine",
    shots: int = 100,
    batch_size: int = 20,
    objective: Literal["entropy", "cross_entropy"] = "entropy",
    steps: int = 500,
    init: float = 0.3,
    later_init: float = 1e-8,
    learning_rate: float = 1e-3,
    per_task: int = 16,
    entropy_eps: float = 0.0,
    seed: int = 0,
    loop: Loop = Loop(),
) -> Learned:
    """Frank-Wolfe with one model a task in every round, mixed by AdaMerging (arXiv 2310.02575).

    All rounds share one compiled step: the current weights and the chosen models are its arguments.

    Args:
      problem, rows, granularity, point, measure, shots, batch_size: see `fw_hard`.
      adapt: unlabelled rows of the same tasks for the entropy, published: of the test sets. The labelled ones if
        ``None``.
      rounds: number of rounds, the first from the pretrained model.
      objective: ``entropy``, or ``cross_entropy`` on the labelled rows.
      steps: of Adam, in every round.
      init: coefficients at the start of the first round.
      later_init: of the others.
      learning_rate: of Adam.
      per_task: rows of a task in a step.
      entropy_eps: see `objectives.entropy`.
      seed: of the rows drawn.
      loop: see `fit.Loop`; steps count on from round to round. Not `evaluate` and `pieces`.

    Returns:
      `Learned` with coefficients of every tensor over the pool ``[G, T]``; ``loss`` ``[rounds * steps]``, ``proxy``
      ``[rounds, n]``, the labelled losses at the start of a round, and ``chosen`` ``[rounds, n, G]``.

    Raises:
      ValueError: as `fw_hard`.
      FitDiverged: see `fit.fit`.
    """
    _check(problem, rows, loop)
    ask = functools.partial(asked, problem, rows, shots, batch_size, seed, point, measure, steps, Loop())
    seen = rows if objective == "cross_entropy" or adapt is None else adapt
    batch_of = together(seen if objective == "cross_entropy" else seen._replace(labels=None), per_task, seed)
    groups = trees.groups(problem.theta0, "tensor")
    count = min(len(rows.counts), problem.num_tasks)
    parametrisation = coefficients(groups, count, init, "identity")
    loss_fn = make_loss(problem, parametrisation, functools.partial(_task_losses, objective, entropy_eps))
    fit = make_fit(loss_fn, optax.adam(learning_rate), chunk=loop.chunk)
    heads, merge = problem.heads._replace(scale=jnp.float32(problem.heads.scale)), _merger(problem, groups)
    table = np.zeros((len(groups.names), problem.num_tasks))
    history: dict[str, list] = {"loss": [], "proxy": [], "chosen": []}
    if loop.on_start is not None:
        loop.on_start(rounds * steps)
    for i in range(rounds):
        params = merge(table)
        losses, chosen = one_a_task(ask, params, count, i, granularity, loop)
        per_leaf = jax.tree.map(lambda ids, chosen=chosen: np.moveaxis(chosen[:, np.asarray(ids)], 0, -1), groups.ids)
        frozen = params, _directions(problem.theta0, problem.tau, params, per_leaf), heads
        first = jnp.full((len(groups.names), count), later_init if i else init, jnp.float32)
        before = i * steps
        batches = lambda step, before=before: batch_of(before + step)
        own = loop.part(f"round{i}").after(before)
        done = fit({"merge": {"lam": first}}, batches, steps, frozen=frozen, loop=own)
        lam_GxN = np.asarray(done.learnables["merge"]["lam"], np.float64)
        table *= 1 - lam_GxN.sum(1, keepdims=True)
        for j, vertex in enumerate(chosen):
            table[np.arange(len(table)), vertex] += lam_GxN[:, j]
        history["loss"].append(done.history.get("loss", np.zeros(0, np.float32)))
        history["proxy"].append(losses)
        history["chosen"].append(chosen)
    found = {name: np.array(x) for name, x in history.items()}
    found["loss"] = found["loss"].reshape(-1)
    return Learned(merge(table), {}, found, table.astype(np.float32), groups.names)


def _task_losses(objective: str, eps: float, outputs: Outputs) -> Array:
    if objective == "entropy":
        return objectives.entropy(outputs.logits, eps=eps)
    return objectives.cross_entropy(outputs.logits, outputs.batch["label"])


@jax.jit
def _directions(theta0: Tree, tau: Tree, params: Tree, chosen: Tree) -> Tree:
    """``theta0 + tau[chosen] - params``: ``[n, ...]``, of stacked leaves ``[L, n, ...]``."""

    def tensor(base: Array, own: Array, now: Array, which: Array) -> Array:
        offset = base.astype(jnp.float32) - now.astype(jnp.float32)
        return offset[None] + own[which].astype(jnp.float32)

    leaf = lambda path, *args: (jax.vmap(tensor) if trees.is_stacked(path) else tensor)(*args)
    return trees.map_with_path(leaf, theta0, tau, params, chosen)
