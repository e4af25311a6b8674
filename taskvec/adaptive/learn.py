"""Adaptive merging in one function: parametrisation x objective x rows x optimiser.

The rows of all tasks pass the encoder as one batch, on weights that are merged once a step; only the heads are the
tasks' own. A published method is a short file that chooses the parts and calls `learn`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taskvec import vectors
from taskvec.adaptive.fit import Gradient, Loop, LossFn, make_fit, plain_gradient
from taskvec.adaptive.merged import merged_apply
from taskvec.adaptive.parametrisation import LowRank, Parametrisation
from taskvec.adaptive.rows import Batch, Rows, split_tasks
from taskvec.training.heads import Heads, all_logits
from taskvec.tree import Tree

Array = jax.Array


class Problem(NamedTuple):
    """What is merged.

    Attributes:
      apply_fn: ``(params, batch, **options) -> {"features": [rows, d], ...}``; batches may hold more than its inputs.
      theta0: pretrained parameters.
      tau: task vectors, ``[T, ...]``, of stacked leaves ``[L, T, ...]``; of any float dtype, also
        `parametrisation.LowRank`.
      heads: frozen heads of S tasks: the same T, unless a method says otherwise.
      scanned: whether `apply_fn` merges layer by layer (see `merged.merged_apply`).
      linear: whether the model is linearised at `theta0`; the merged model is then to be used so as well.
    """

    apply_fn: Callable[..., dict[str, Array]]
    theta0: Tree
    tau: Tree
    heads: Heads
    scanned: bool
    linear: bool = False

    @property
    def num_tasks(self) -> int:
        return vectors.num_tasks(self.tau)

    def check(self, rows: Rows | None = None) -> None:
        """Raises `ValueError` unless every task vector has its head and, if they are given, its rows."""
        if self.heads.kernel.shape[0] != self.num_tasks:
            raise ValueError(f"{self.num_tasks} task vectors but heads of {self.heads.kernel.shape[0]} tasks")
        if rows is not None and len(rows.counts) != self.num_tasks:
            raise ValueError(f"{self.num_tasks} task vectors but rows of {len(rows.counts)} tasks")

    def check_dense(self, name: str) -> None:
        """Raises `ValueError` for `LowRank` task vectors, which method `name` cannot look into."""
        leaves = jax.tree.leaves(self.tau, is_leaf=lambda x: isinstance(x, LowRank))
        if any(isinstance(x, LowRank) for x in leaves):
            raise ValueError(f"{name} needs dense task vectors: multiply the low-rank ones out")

    def check_not_linear(self, name: str) -> None:
        """Raises `ValueError` if the model is linearised, which method `name` does not allow for."""
        if self.linear:
            raise ValueError(f"{name} runs the model itself: it does not take a linearised one (Problem.linear)")


def heads_of(heads: Heads, tasks: Sequence[int]) -> Heads:
    """The heads of some tasks, in that order."""
    own = jnp.array(tasks)
    return heads._replace(kernel=heads.kernel[own], class_mask=heads.class_mask[own])


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
      coefficients: ``[G, T]`` float32 that multiply task vectors, where that is what was learned; ``None`` with
        partitions (``learnables["lam"]`` ``[G, T, K]``).
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
    problem: Problem,
    parametrisation: Parametrisation,
    objective: Objective,
    *,
    penalty: Callable[[Tree], Array] | None = None,
    **options: Any,
) -> LossFn:
    """The loss of `fit`: ``(learnables, (theta0, tau, heads), batch, key) -> (sum over tasks, metrics)``.

    Args:
      problem: only its functions are used; weights and heads come as arguments.
      parametrisation: of ``learnables["merge"]``; ``learnables["heads"]`` ``[S, d, C]`` stand for the frozen kernels.
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


def in_pieces(gradient: Gradient, pieces: int, num_tasks: int) -> Gradient:
    """The mean of the gradients of `pieces` parts of a batch, taken one after the other.

    Args:
      gradient: of batches of any number of rows a task.
      pieces: n, which divides every task's rows.
      num_tasks: S, of batches without ``tasks``.

    Raises:
      ValueError: rows do not divide, or arrays of the batch differ in their number of rows (packed texts).
    """

    def cut(batch: Batch) -> tuple[Batch, Batch]:
        of_rows = {name: x for name, x in batch.items() if name != "tasks"}
        sizes = {x.shape[0] for x in jax.tree.leaves(of_rows)}
        tasks = len(batch["tasks"]) if "tasks" in batch else num_tasks
        if len(sizes) != 1 or min(sizes) % (tasks * pieces):
            raise ValueError(f"arrays of {sorted(sizes)} rows of {tasks} tasks cannot be cut into {pieces} pieces")
        split = lambda x: jnp.moveaxis(x.reshape(tasks, pieces, -1, *x.shape[1:]), 1, 0)
        parts = jax.tree.map(lambda x: split(x).reshape(pieces, -1, *x.shape[1:]), of_rows)
        return parts, {name: x for name, x in batch.items() if name == "tasks"}

    def apply(state: Tree, learnables: Tree, frozen: Any, batch: Batch, key: Array) -> tuple:
        parts, whole = cut(batch)
        one = lambda state, part: gradient.apply(state, learnables, frozen, {**part, **whole}, key)

        def step(carry, part):
            state, total = carry
            *found, state = one(state, part)
            return (state, jax.tree.map(lambda a, b: a + b / pieces, total, tuple(found))), None

        shapes = jax.eval_shape(one, state, jax.tree.map(lambda x: x[0], parts))[:-1]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (state, (loss, metrics, grads)), _ = jax.lax.scan(step, (state, zeros), parts)
        return loss, metrics, grads, state

    return Gradient(gradient.init, apply)


def outputs_of(heads: Heads, kernels: Array | None, features: Array, batch: Batch) -> Outputs:
    """Logits by task; a batch with ``tasks`` ``[S]`` holds rows of those tasks only.

    Args:
      heads: frozen, those of the targets as well.
      kernels: trained ones in their place, or ``None``.
      features: ``[S * B, d]``.
      batch: with ``label``, ``target_*`` and ``tasks`` where there are any.
    """
    if "tasks" in batch:
        own = lambda x: x[batch["tasks"]]
        heads = heads._replace(kernel=own(heads.kernel), class_mask=own(heads.class_mask))
        kernels = None if kernels is None else own(kernels)
    num_tasks = heads.kernel.shape[0]
    known = {name: x for name, x in batch.items() if name == "label" or name.startswith("target_")}
    known = {name: split_tasks(x, num_tasks) for name, x in known.items()}
    features = split_tasks(features, num_tasks)
    mine = heads if kernels is None else heads._replace(kernel=kernels)
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
      optimiser: of optax, over ``{"merge": learnables}`` and, if they are trained, ``{"heads": [S, d, C]}``.
      steps: number of batches.
      train_heads: whether the kernels of the heads are learned too, from the frozen ones on.
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
    if gradient is not plain_gradient:
        loop.refuse("a method with a gradient of its own", pieces="it takes a batch as a whole")
    loss_fn = make_loss(problem, parametrisation, objective, penalty=penalty, **options)
    project = lambda learnables: learnables | {"merge": parametrisation.project(learnables["merge"])}
    gradient_ = gradient(loss_fn)
    if loop.pieces > 1:
        gradient_ = in_pieces(gradient_, loop.pieces, problem.heads.kernel.shape[0])
    run = make_fit(gradient_, optimiser, chunk=loop.chunk, project=project, accumulate=accumulate)
    heads = problem.heads._replace(scale=jnp.float32(problem.heads.scale))
    frozen = problem.theta0, problem.tau, heads
    merge = jax.jit((final or parametrisation).merge)

    def result(learnables: Tree, history: dict[str, np.ndarray]) -> Learned:
        params = merge(*frozen[:2], learnables["merge"], jax.random.key(seed))
        # A copy, since the next step is given the state's arrays to overwrite.
        trained = heads._replace(kernel=jnp.array(learnables["heads"])) if train_heads else None
        found = Learned(params, jax.tree.map(np.asarray, learnables["merge"]), history, heads=trained)
        return with_table(found, parametrisation)

    watch = loop.watch()
    if loop.evaluate is not None:
        call = loop.evaluate.call
        watch["evaluate"] = loop.evaluate._replace(call=lambda step, now: call(step, result(now, {})))
    start = {"merge": parametrisation.init()} | ({"heads": heads.kernel} if train_heads else {})
    done = run(start, batches, steps, frozen=frozen, seed=seed, **watch)
    return result(done.learnables, done.history)._replace(evaluations=done.evaluations)
