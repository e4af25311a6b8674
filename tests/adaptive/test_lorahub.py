"""LoraHub: its search on a known function, the sum of factors, and what it returns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from taskvec import tree as trees
from taskvec.adaptive.coefficients import coefficients
from taskvec.adaptive.fit import fit
from taskvec.adaptive.lorahub import by_evolution, composed, lorahub
from taskvec.adaptive.parametrisation import LowRank
from taskvec.merging import evolution
from tests.adaptive.toy_mlp import D_IN, HIDDEN, NAMES, loss_and_gradient, problem, setting


def test_search_finds_the_least_of_a_quadratic_in_the_box():
    """One coordinate's optimum lies outside the box; NaN in a part of it does no harm."""
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    target = np.array([0.3, -1.1, 0.8, 2.5])
    inside = target.copy()
    inside[3] = 1.5

    def loss_fn(learnables, frozen, batch, key):
        lam = learnables["merge"]["lam"][0]
        value = jnp.square(lam - frozen).sum() + 0.2 * jnp.abs(turn[0] @ lam)
        return jnp.where(lam[0] > 1.2, jnp.nan, value), {"objective": value[None]}

    start = {"merge": {"lam": jnp.zeros((1, 4))}}
    gradient = by_evolution(1.5, 0.25, at_once=2)(loss_fn)
    run = lambda steps: fit(gradient, start, optax.sgd(1.0), lambda s: {}, steps, frozen=jnp.asarray(target), seed=1)
    done = run(120)
    found = np.asarray(done.learnables["merge"]["lam"][0], np.float64)
    value = lambda x: ((x - target) ** 2).sum() + 0.2 * abs(turn[0] @ x)
    grid = inside + np.random.default_rng(1).normal(0, 0.05, (20000, 4))
    least = min(value(np.clip(x, -1.5, 1.5)) for x in grid)
    assert value(found) < least + 1e-3 and np.abs(found).max() <= 1.5 + 1e-6
    losses = done.history["loss"]
    assert losses.shape == (120,) and (np.diff(losses) <= 0).all() and losses[0] <= value(np.zeros(4)) + 1e-6
    np.testing.assert_allclose(losses[-1], value(found), rtol=1e-5)


def test_points_lie_in_the_box_and_follow_the_covariance():
    state = evolution.begin(np.full(3, 0.5), 0.1)
    state = state._replace(covariance=jnp.diag(jnp.array([1e-4, 1.0, 1.0])))
    points = np.concatenate([evolution.ask(state, jax.random.key(i)) for i in range(60)])
    assert points.shape == (60 * evolution.population(3), 3) and points.min() >= 0 and points.max() <= 1
    np.testing.assert_allclose(points.std(0), [0.001, 0.1, 0.1], rtol=0.15)


def test_factors_are_summed():
    rng = np.random.default_rng(0)
    up, down = rng.normal(size=(3, 2, 4, 2)), rng.normal(size=(3, 2, 2, 5))
    theta0 = {"blocks": {"w": jnp.ones((3, 4, 5))}, "b": jnp.ones(4)}
    tau = {
        "blocks": {"w": LowRank(jnp.asarray(up, jnp.float32), jnp.asarray(down, jnp.float32))},
        "b": jnp.ones((2, 4)),
    }
    w = np.array([0.7, -1.2])
    made = composed(coefficients(trees.groups(theta0, "task"), 2, 0.0, "identity"))
    merged = made.merge(theta0, tau, {"lam": jnp.asarray(w, jnp.float32)[None]})
    expected = [1 + np.tensordot(w, up[i], 1) @ np.tensordot(w, down[i], 1) for i in range(3)]
    np.testing.assert_allclose(merged["blocks"]["w"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(merged["b"], np.full(4, 0.5), rtol=1e-5)


def test_lorahub():
    theta0, _, kernels, rows = setting((3,), 3, (5,))
    rng = np.random.default_rng(1)
    up, down = rng.normal(0, 0.7, (4, D_IN, 2)), rng.normal(0, 0.7, (4, 2, HIDDEN))
    tau = {k: np.zeros((4, *theta0[k].shape)) for k in NAMES}
    what = problem(theta0, tau, kernels)
    factors = LowRank(jnp.asarray(up, jnp.float32), jnp.asarray(down, jnp.float32))
    what = what._replace(tau=what.tau | {"w1": factors})
    assert evolution.population(4) == 8
    found = lorahub(what, rows, budget=40)
    w = found.coefficients[0].astype(np.float64)
    assert found.coefficients.shape == (1, 4) and len(found.history["loss"]) == 5 and np.abs(w).max() <= 1.5 + 1e-6

    def loss(w):
        theta = dict(theta0) | {"w1": theta0["w1"] + np.tensordot(w, up, 1) @ np.tensordot(w, down, 1)}
        return loss_and_gradient(theta, rows.batch([np.arange(5)]), kernels, (1,))[0] + 0.05 * np.abs(w).mean(), theta

    np.testing.assert_allclose(found.history["loss"][-1], loss(w)[0], rtol=1e-4)
    assert loss(w)[0] < loss(np.zeros(4))[0]
    np.testing.assert_allclose(found.params["w1"], loss(w)[1]["w1"], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.params["w2"], what.theta0["w2"])
    with pytest.raises(ValueError, match="takes 8 evaluations"):
        lorahub(what, rows, budget=7)
    with pytest.raises(ValueError, match="labelled rows"):
        lorahub(what, rows._replace(labels=None))
