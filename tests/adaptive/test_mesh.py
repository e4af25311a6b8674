"""Eight devices give what one gives."""

import jax
import numpy as np
import optax
import pytest

from taskvec import tree as trees
from taskvec.adaptive import rows as rows_lib
from taskvec.adaptive.coefficients import elementwise
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.learn import learn
from taskvec.adaptive.mesh import make_mesh, placement, sharded
from taskvec.adaptive.parametrisation import LayerOf, weighted_sum
from tests.adaptive import test_learn
from tests.adaptive.test_learn import TASKS, entropy


def test_a_mesh_changes_nothing(monkeypatch):
    monkeypatch.setattr("taskvec.adaptive.mesh.SMALL", 32)
    problem, rows = test_learn.problem(), test_learn.rows()
    mesh = make_mesh(4, 2)
    placed = problem._replace(theta0=sharded(problem.theta0, mesh), tau=sharded(problem.tau, mesh))
    split = [x for x in jax.tree.leaves(placed.tau) if not x.is_fully_replicated]
    assert len(split) >= 5 and all(len(x.sharding.device_set) == 8 for x in split)
    for path, x in trees.flatten(placed.theta0).items():  # weight and task vector are divided alike
        axis = int(trees.is_stacked(path))
        spec = list(trees.flatten(placed.tau)[path].sharding.spec)
        del spec[axis : axis + 1]
        assert list(x.sharding.spec) == spec
    parametrisation = elementwise(problem.theta0, TASKS)
    run = lambda p, **loop: learn(
        p, parametrisation, entropy, rows_lib.together(rows, 4), optax.adam(1e-2), 6, loop=Loop(chunk=2, **loop)
    )
    one, many = run(problem), run(placed, place=placement(mesh))
    np.testing.assert_allclose(many.history["loss"], one.history["loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), many.params, one.params)


@pytest.mark.parametrize("tasks", [2, 3])
@pytest.mark.parametrize("stacked", [True, False])
def test_no_task_vector_is_gathered(tasks, stacked, monkeypatch):
    """What accelerators send each other for the gradient of coefficients are sums of T numbers, not weights."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    mesh = make_mesh(1, 8)
    over = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    theta0 = jax.device_put(np.ones((4, 16), np.float32), over(None, "model"))
    stack = np.ones((3, tasks, 4, 16), np.float32)
    tau = jax.device_put(stack if stacked else stack[0], over(*[None] * (2 + stacked), "model"))

    def loss(coef, theta0, tau):
        return jax.numpy.square(weighted_sum(theta0, LayerOf(tau, 1) if stacked else tau, coef)).sum()

    program = jax.jit(jax.grad(loss)).lower(np.ones(tasks, np.float32), theta0, tau).compile().as_text()
    assert "all-reduce" in program and "all-gather" not in program
