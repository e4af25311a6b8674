"""Eight devices give what one gives."""

import jax
import numpy as np
import optax

from taskvec import tree as trees
from taskvec.adaptive import rows as rows_lib
from taskvec.adaptive.coefficients import elementwise
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.learn import learn
from taskvec.adaptive.mesh import make_mesh, placement, sharded
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
