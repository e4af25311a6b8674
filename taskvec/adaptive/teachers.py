"""What the experts give, computed once: targets that go with the rows."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from taskvec import tree as trees
from taskvec.adaptive.learn import Problem
from taskvec.adaptive.parametrisation import weighted_sum
from taskvec.adaptive.rows import Rows, whole
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


def with_targets(problem: Problem, rows: Rows, batch_size: int = 64, give: Callable = features) -> Rows:
    """Rows with what each task's own expert gives, by default its features: ``target_features`` of a batch.

    Every row passes the expert of its task once; a step then costs no teacher. Logits are made from the features by
    the frozen heads.

    Args:
      problem: whose experts.
      rows: of its tasks.
      batch_size: rows at once.
      give: ``(apply_fn, params, batch) -> {name: [rows, ...]}``, a function of a module (it is compiled once).
    """
    targets = [
        through(problem.apply_fn, expert(problem, t), rows, t, batch_size, give) for t in range(len(rows.counts))
    ]
    return rows._replace(targets=targets)


def through(
    apply_fn: Callable, params: Tree, rows: Rows, task: int, batch_size: int = 64, give: Callable = features
) -> dict[str, np.ndarray]:
    """What a model gives for all rows of a task: ``{name: [N_t, ...]}`` on the host; arguments as `with_targets`."""
    parts = [jax.device_get(_given(give, apply_fn, params, batch)) for batch in whole(rows, batch_size, task)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {name: x[: rows.counts[task]] for name, x in joined.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _given(give: Callable, apply_fn: Callable, params: Tree, inputs: dict) -> dict[str, jax.Array]:
    return give(apply_fn, params, inputs)
