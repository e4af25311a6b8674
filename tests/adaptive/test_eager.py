"""Jitted = eager: merging in the scan, trained heads, a gradient of its own. Eager steps compile every operation."""

import jax
import numpy as np
import pytest

from taskvec.adaptive import registry
from tests.adaptive import mlp_oracle as oracle, test_learn


@pytest.mark.parametrize(
    "name, settings",
    [
        ("adamerging", {"steps": 1}),
        ("symerge", {"rounds": 1, "schedule": "together"}),
        ("samerging", {"steps": 1, "init": 0.3}),
    ],
)
def test_jitted_is_eager(name, settings):
    theta0, tau, kernels, rows = oracle.setting()
    problem = oracle.problem(theta0, tau, kernels)
    if name == "adamerging":
        problem, rows = test_learn.problem(scanned=True), test_learn.rows()
    run = lambda: registry.get(name)(problem, rows, seed=1, per_task=oracle.ROWS, learning_rate=1e-2, **settings)
    jitted = run()
    with jax.disable_jit():
        eager = run()
    for found, expected in ((jitted.params, eager.params), (jitted.learnables, eager.learnables)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    np.testing.assert_allclose(jitted.history["loss"], eager.history["loss"], rtol=1e-4)
    assert np.abs(eager.learnables["lam"] - 0.3).max() > 0.005
