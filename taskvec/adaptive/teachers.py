"""What the experts give, computed once: targets that go with the rows."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from taskvec import tree as trees
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.learn import Problem
from taskvec.adaptive.parametrisation import weighted_sum
from taskvec.adaptive.rows import Rows, whole
from taskvec.training.trainable import linearised
from taskvec.tree import Tree


def expert(problem: Problem, task: int) -> Tree:
    """``theta0 + tau_t``, one compiled program for all tasks."""
    coef = np.eye(problem.num_tasks, dtype=np.float32)[task]
    return _merged(problem.theta0, problem.tau, coef)


@jax.jit
def _merged(theta0: Tree, tau: Tree, coef: jax.Array) -> Tree:
    def leaf(path, base, vectors_):
        if not trees.is_float(base):
            return base
        one = lambda b, v: weighted_sum(b, v, coef).astype(b.dtype)
        return (jax.vmap(one) if trees.is_stacked(path) else one)(base, vectors_)

    return trees.map_with_path(leaf, theta0, tau)


def features(apply_fn: Callable, params: Tree, batch: dict) -> dict[str, jax.Array]:
    """What `with_targets` takes from the experts by default."""
    return {"features": apply_fn(params, batch)["features"]}


def with_targets(
    problem: Problem, rows: Rows, batch_size: int = 64, give: Callable = features, loop: Loop = Loop()
) -> Rows:
    """Rows with what each task's own expert gives, by default its features: ``target_features`` of a batch.

    Every row passes the expert of its task once; a step then costs no teacher. Logits are made from the features by
    the frozen heads. Rows that have features already are given back as they are.

    Args:
      problem: whose experts.
      rows: of its tasks.
      batch_size: rows at once.
      give: ``(apply_fn, params, batch) -> {name: [rows, ...]}``, a function of a module (it is compiled once).
      loop: of `on_phase`.

    Raises:
      ValueError: more than features of linearised experts.
    """
    if give is features and rows.targets and "features" in rows.targets[0]:
        return rows
    if give is not features:
        problem.check_not_linear("what gives more than features")
    given = lambda t: (
        {"features": features_of(problem, expert(problem, t), rows, t, batch_size, loop)}
        if give is features
        else through(problem.apply_fn, expert(problem, t), rows, t, batch_size, give, loop)
    )
    return rows._replace(targets=[given(t) for t in range(len(rows.counts))])


def features_of(
    problem: Problem, params: Tree, rows: Rows, task: int, batch_size: int = 64, loop: Loop = Loop()
) -> np.ndarray:
    """Features of all rows of a task under other weights of the problem's model: ``[N_t, d]`` on the host."""
    if not problem.linear:
        return through(problem.apply_fn, params, rows, task, batch_size, loop=loop)["features"]
    pair = {"theta0": problem.theta0, "params": params}
    return through(problem.apply_fn, pair, rows, task, batch_size, _features_linear, loop)["features"]


def _features_linear(apply_fn: Callable, pair: Tree, batch: dict) -> dict[str, jax.Array]:
    return {"features": linearised(apply_fn, pair["theta0"])(pair["params"], batch)["features"]}


def through(
    apply_fn: Callable,
    params: Tree,
    rows: Rows,
    task: int,
    batch_size: int = 64,
    give: Callable = features,
    loop: Loop = Loop(),
) -> dict[str, np.ndarray]:
    """What a model gives for all rows of a task: ``{name: [N_t, ...]}`` on the host; arguments as `with_targets`."""
    count, name = -(-rows.counts[task] // batch_size), f"features of task {task + 1} of {len(rows.counts)}"
    batches = loop.phase(name, whole(rows, batch_size, task), count)
    parts = [jax.device_get(_given(give, apply_fn, params, batch)) for batch in batches]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {name: x[: rows.counts[task]] for name, x in joined.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _given(give: Callable, apply_fn: Callable, params: Tree, inputs: dict) -> dict[str, jax.Array]:
    return give(apply_fn, params, inputs)
