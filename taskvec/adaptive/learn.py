"""Adaptive merging in one function: parametrisation x objective x rows x optimiser.

The rows of all tasks pass the encoder as one batch, on weights that are merged once a step; only the heads are the
tasks' own. A published method is a short file that chooses the parts and calls `learn`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taskvec.adaptive.fit import Gradient, Loop, LossFn, make_fit, plain_gradient
from taskvec.adaptive.merged import merged_apply
from taskvec.adaptive.parametrisation import Parametrisation
from taskvec.adaptive.pieces import in_pieces
from taskvec.adaptive.problem import Kind, Problem, heads_of
from taskvec.adaptive.rows import Batch, split_tasks
from taskvec.training.heads import Heads, all_logits
from taskvec.tree import Tree

Array = jax.Array


class Outputs(NamedTuple):
    """What an objective sees of S tasks.

    Attributes:
      logits: ``[S, B, C]``, -1e9 for classes that a task lacks.
      features: ``[S, B, d]``.
      batch: arrays of the batch that objectives know: ``label`` ``[S, B]``, ``target_*`` ``[S, B, ...]``.
      target_logits: ``[S, B, C]``, of ``target_features`` under the frozen heads; ``None`` if there are none.
    """

    logits: Array
    features: Array
    batch: dict[str, Array]
    target_logits: Array | None = None


Objective = Callable[[Outputs], Array]  # one number a task, [S]


class Learned(NamedTuple):
    """What adaptive merging gives.

    Attributes:
      params: the merged model, of the last step.
      learnables: those of the last step.
      history: ``loss`` ``[steps]`` and ``objective`` ``[steps, S]``, before each step's update.
      coefficients: ``[G, T]`` float32 that multiply task vectors, where that is what was learned; ``[G, T, K]`` with
        partitions.
      groups: G names, in order of the rows.
      heads: where heads were trained, all S of them.
      evaluations: see `fit.FitResult`.
      merged: where `params` alone are not the result, the `taskvec.modular.results.Merged` that `evaluate` takes.
      kept: where the result is not that of the last step but the best on validation rows: the steps done there.
      method, settings: which method gave this, with all its settings; filled in by the registry.
    """

    params: Tree
    learnables: Tree
    history: dict[str, np.ndarray]
    coefficients: np.ndarray | None = None
    groups: tuple[str, ...] = ()
    heads: Heads | None = None
    evaluations: dict[int, Any] | None = None
    merged: Any = None
    kept: int | None = None
    method: str = ""
    settings: Mapping[str, Any] = {}


def with_table(found: Learned, parametrisation: Parametrisation) -> Learned:
    """The result with the coefficients that its learnables stand for, if they do."""
    if parametrisation.table is None:
        return found
    groups, values = parametrisation.table(jax.tree.map(jnp.asarray, found.learnables))
    return found._replace(coefficients=np.asarray(values), groups=groups)


def make_loss(
    problem: Problem | Kind,
    parametrisation: Parametrisation,
    objective: Objective,
    *,
    penalty: Callable[[Tree], Array] | None = None,
    **options: Any,
) -> LossFn:
    """The loss of `fit`: ``(learnables, (theta0, tau, heads), batch, key) -> (sum over tasks, metrics)``.

    Args:
      problem: only its functions are used; weights and heads come as arguments.
      parametrisation: of ``learnables["merge"]``; ``learnables["heads"]`` stand for the frozen ones, see `trainable`.
      objective: one number a task.
      penalty: of ``learnables["merge"]``, added to the loss.
      **options: of the model (``remat``, ``dtype``).
    """
    encode = merged_apply(problem.apply_fn, parametrisation, scanned=problem.scanned, linear=problem.linear)

    def loss_fn(learnables: Tree, frozen: tuple, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        theta0, tau, heads = frozen
        features = encode(learnables["merge"], (theta0, tau), batch, key, **options)["features"]
        outputs = outputs_of(heads, learnables.get("heads"), features, batch)
        values = objective(outputs)
        loss = values.sum() + (0.0 if penalty is None else penalty(learnables["merge"]))
        return loss, {"objective": values}

    return loss_fn


def trainable(heads: Heads) -> dict[str, Array]:
    """What is learned of heads: ``kernel`` ``[S, d, C]`` and, where there is one, ``bias`` ``[S, C]``."""
    return {name: x for name, x in (("kernel", heads.kernel), ("bias", heads.bias)) if x is not None}


def outputs_of(heads: Heads, trained: dict[str, Array] | None, features: Array, batch: Batch) -> Outputs:
    """Logits by task; a batch with ``tasks`` ``[S]`` holds rows of those tasks only.

    Args:
      heads: frozen, those of the targets as well.
      trained: what is learned in place of their `trainable` arrays, or ``None``.
      features: ``[S * B, d]``.
      batch: with ``label``, ``target_*`` and ``tasks`` where there are any.
    """
    mine = heads._replace(**(trained or {}))
    if "tasks" in batch:
        heads, mine = (heads_of(each, batch["tasks"]) for each in (heads, mine))
    num_tasks = heads.kernel.shape[0]
    known = {name: x for name, x in batch.items() if name == "label" or name.startswith("target_")}
    known = {name: split_tasks(x, num_tasks) for name, x in known.items()}
    features = split_tasks(features, num_tasks)
    target = all_logits(heads, known["target_features"]) if "target_features" in known else None
    return Outputs(all_logits(mine, features), features, known, target)


def learn(
    problem: Problem,
    parametrisation: Parametrisation,
    objective: Objective,
    batches: Callable[[int], Batch],
    optimiser: optax.GradientTransformation,
    steps: int,
    *,
    train_heads: bool = False,
    penalty: Callable[[Tree], Array] | None = None,
    final: Parametrisation | None = None,
    gradient: Callable[[LossFn], Gradient] = plain_gradient,
    accumulate: int = 1,
    seed: int = 0,
    loop: Loop = Loop(),
    **options: Any,
) -> Learned:
    """Minimises the sum of an objective over tasks.

    Args:
      problem: what is merged.
      parametrisation: how learnables make weights.
      objective: see `Outputs`.
      batches: ``step -> batch``, of `taskvec.adaptive.rows`.
      optimiser: of optax, over ``{"merge": learnables}`` and, if they are trained, ``{"heads": `trainable`}``.
      steps: number of batches.
      train_heads: whether the heads are learned too (their `trainable` arrays), from the frozen ones on.
      penalty: of the parametrisation's learnables.
      final: how learnables make the resulting model, if not by `parametrisation` (a mask's mean in place of a draw).
      gradient: how the loss is differentiated.
      accumulate: see `fit.make_fit`.
      seed: of keys (parametrisations that draw).
      loop: see `fit.Loop`; its evaluation is called with (steps done, a `Learned` without history).
      **options: of the model (``remat``, ``dtype``).

    Raises:
      ValueError: rows do not divide among the tasks; task vectors have other shapes than the parameters; pieces with
        a `gradient` that is not the plain one.
      FitDiverged: see `fit.fit`.
    """
    learner = make_learner(
        problem.kind, parametrisation, objective, optimiser, train_heads=train_heads, penalty=penalty, final=final,
        gradient=gradient, accumulate=accumulate, loop=loop, **options,
    )  # fmt: skip
    return learner.run(problem, batches, steps, seed=seed, loop=loop)


class Learner(NamedTuple):
    """`learn` in compiled parts, for several problems of one kind.

    Attributes:
      parametrisation: how learnables make weights.
      merge: ``(theta0, tau, learnables, key) -> params``.
      run: ``(problem, batches, steps, *, seed=0, loop=Loop()) -> Learned``, see `learn`.
    """

    parametrisation: Parametrisation
    merge: Callable[..., Tree]
    run: Callable[..., Learned]


def make_learner(
    kind: Kind,
    parametrisation: Parametrisation,
    objective: Objective,
    optimiser: optax.GradientTransformation,
    *,
    train_heads: bool = False,
    penalty: Callable[[Tree], Array] | None = None,
    final: Parametrisation | None = None,
    gradient: Callable[[LossFn], Gradient] = plain_gradient,
    accumulate: int = 1,
    loop: Loop = Loop(),
    **options: Any,
) -> Learner:
    """Everything of `learn` that is compiled: make it once, run it for task after task.

    Heads, rows, steps and task vectors are arguments of its programs, which are compiled again for other shapes alone:
    heads of one width (`training.heads.make_heads`) share them whatever their classes.

    Args:
      kind: of the problems, ``problem.kind``. Nothing here holds their arrays.
      loop: only `chunk` and `pieces` are used.
      parametrisation, objective, optimiser, train_heads, penalty, final, gradient, accumulate, **options: see `learn`.
    """
    if gradient is not plain_gradient:
        loop.refuse("a method with a gradient of its own", pieces="it takes a batch as a whole")
    loss_fn = make_loss(kind, parametrisation, objective, penalty=penalty, **options)
    project = lambda learnables: learnables | {"merge": parametrisation.project(learnables["merge"])}
    gradient_ = gradient(loss_fn)
    if loop.pieces > 1:
        gradient_ = in_pieces(gradient_, loop.pieces)
    fit = make_fit(gradient_, optimiser, chunk=loop.chunk, project=project, accumulate=accumulate)
    merge = jax.jit((final or parametrisation).merge)

    def run(
        problem: Problem, batches: Callable[[int], Batch], steps: int, *, seed: int = 0, loop: Loop = Loop()
    ) -> Learned:
        heads = problem.heads._replace(scale=jnp.float32(problem.heads.scale))
        frozen = problem.theta0, problem.tau, heads

        def result(learnables: Tree, history: dict[str, np.ndarray]) -> Learned:
            params = merge(*frozen[:2], learnables["merge"], jax.random.key(seed))
            # A copy, since the next step is given the state's arrays to overwrite.
            trained = heads._replace(**jax.tree.map(jnp.array, learnables["heads"])) if train_heads else None
            found = Learned(params, jax.tree.map(np.asarray, learnables["merge"]), history, heads=trained)
            return with_table(found, parametrisation)

        if loop.evaluate is not None:
            call = loop.evaluate.call
            loop = loop._replace(evaluate=loop.evaluate._replace(call=lambda step, now: call(step, result(now, {}))))
        start = {"merge": parametrisation.init()} | ({"heads": trainable(heads)} if train_heads else {})
        done = fit(start, batches, steps, frozen=frozen, seed=seed, loop=loop)
        return result(done.learnables, done.history)._replace(evaluations=done.evaluations)

    return Learner(parametrisation, merge, run)
