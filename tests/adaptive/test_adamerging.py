"""AdaMerging against an independent float64 loop with hand-written gradients and Adam."""

import jax
import numpy as np
import pytest

from taskvec import tree as trees, vectors
from taskvec.adaptive import rows as rows_lib
from taskvec.adaptive.adamerging import adamerging, keep_agreeing
from tests.adaptive.mlp_oracle import NAMES, ROWS, TASKS, as_jax, problem, setting


def entropy_and_gradient(theta, x, kernels, scale=20.0):
    """Sum over tasks of mean entropies, and its gradient by every weight; all by hand."""
    h = np.tanh(x @ theta["w1"] + theta["b1"])
    z = h @ theta["w2"] + theta["b2"]
    dz, total = np.zeros_like(z), 0.0
    for t, kernel in enumerate(kernels):
        rows = slice(t * ROWS, (t + 1) * ROWS)
        norm = np.linalg.norm(z[rows], axis=1, keepdims=True)
        unit = z[rows] / norm
        logits = scale * unit @ kernel
        e = np.exp(logits - logits.max(1, keepdims=True))
        p = e / e.sum(1, keepdims=True)
        logp = np.log(p)
        entropy = -(p * logp).sum(1, keepdims=True)
        total += entropy.mean()
        d_unit = scale * (-p * (logp + entropy) / ROWS) @ kernel.T
        dz[rows] = (d_unit - unit * (unit * d_unit).sum(1, keepdims=True)) / norm
    dh = (dz @ theta["w2"].T) * (1 - h**2)
    return total, {"b1": dh.sum(0), "b2": dz.sum(0), "w1": x.T @ dh, "w2": h.T @ dz}


def oracle(theta0, tau, kernels, rows, mode, steps, rate=1e-3):
    batches = rows_lib.together(rows, ROWS)
    lam = np.full((4 if mode == "tensor" else 1, TASKS), 0.3)
    m, v, losses = np.zeros_like(lam), np.zeros_like(lam), []
    for step in range(steps):
        row = {k: i if mode == "tensor" else 0 for i, k in enumerate(NAMES)}
        c = np.clip(lam, 0, 1)
        theta = {k: theta0[k] + np.tensordot(c[row[k]], tau[k], 1) for k in NAMES}
        loss, grads = entropy_and_gradient(theta, batches(step)["x"].astype(np.float64), kernels)
        g = np.zeros_like(lam)
        for k in NAMES:
            g[row[k]] += [np.sum(grads[k] * tau[k][t]) for t in range(TASKS)]
        g *= (lam >= 0) & (lam <= 1)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        lam = lam - rate * (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        losses.append(loss)
    return np.clip(lam, 0, 1), losses


@pytest.mark.parametrize("mode, rate", [("tensor", 1e-3), ("task", 1e-3), ("tensor", 2e-2)])
def test_trajectory(mode, rate):
    theta0, tau, kernels, rows = setting()
    found = adamerging(problem(theta0, tau, kernels), rows, mode=mode, steps=100, learning_rate=rate, per_task=ROWS)
    expected, losses = oracle(theta0, tau, kernels, rows, mode, 100, rate)
    np.testing.assert_allclose(found.coefficients, expected, atol=1e-4)
    np.testing.assert_allclose(found.history["loss"], losses, rtol=1e-3)
    np.testing.assert_allclose(found.history["objective"].sum(1), found.history["loss"], rtol=1e-5)
    assert np.abs(expected - 0.3).max() > 0.03  # it went somewhere
    if rate > 1e-3:
        assert (expected == 0).any() or (expected == 1).any()  # and met the clamp
    else:
        assert (np.diff(found.history["loss"].reshape(4, 25).mean(1)) < 0).all()  # entropy falls, on average
    assert found.groups == (NAMES if mode == "tensor" else ("all",))
    for i, k in enumerate(NAMES):
        merged = theta0[k] + np.tensordot(expected[i if mode == "tensor" else 0], tau[k], 1)
        np.testing.assert_allclose(found.params[k], merged, atol=1e-3)


@pytest.mark.parametrize("order", ["anew", "epochs"])
def test_the_order_of_rows(order):
    theta0, tau, kernels, rows = setting()
    count, seen = rows.counts[0], []

    def take(t, numbers):
        seen.extend([] if t else [tuple(numbers.tolist())])
        return rows.take(t, numbers)

    settings = {"steps": 4, "per_task": -(-count // 4), "order": order}
    adamerging(problem(theta0, tau, kernels), rows._replace(take=take), **settings)
    each = [n for batch in dict.fromkeys(seen) for n in batch]
    assert len(dict.fromkeys(seen)) == 4 and (set(each) == set(range(count))) == (order == "epochs")


def test_plus_plus_trims_globally_and_elects_signs():
    theta0, tau, kernels, rows = setting()
    tau = {k: np.asarray(x, np.float32) for k, x in tau.items()}
    tau["b1"][:, 3] = 3, -3, 0
    flat = np.concatenate([tau[k].reshape(TASKS, -1) for k in NAMES], axis=1)
    keep = round(0.2 * flat.shape[1])
    for rule, count in (("released", keep + 1), (True, keep)):
        trimmed = np.where(np.abs(flat) >= -np.sort(-np.abs(flat), axis=1)[:, count - 1 : count], flat, 0)
        elected = np.sign(trimmed.sum(0))
        if rule == "released":
            elected = np.where(elected == 0, 1 if elected.sum() > 0 else -1, elected)
        agreeing = np.where(np.sign(trimmed) == elected, trimmed, 0)
        sparse = keep_agreeing(as_jax(theta0), as_jax(tau), rule)
        found = np.concatenate([np.asarray(sparse[k]).reshape(TASKS, -1) for k in NAMES], axis=1)
        np.testing.assert_array_equal(found, agreeing)
        assert (found[:, 3] != 0).any() == (rule == "released")  # where signs cancel
    result = adamerging(problem(theta0, tau, kernels), rows, steps=5, plus_plus=True, per_task=ROWS)
    sparse = {k: np.asarray(x, np.float64) for k, x in sparse.items()}
    expected, _ = oracle(theta0, sparse, kernels, rows, "tensor", 5)
    np.testing.assert_allclose(result.coefficients, expected, atol=1e-4)


def test_task_vectors_in_half_precision():
    """Equal to a run in float64 on the rounded vectors; 0.005 from one on those that were not rounded."""
    theta0, tau, kernels, rows = setting()
    experts = [{k: theta0[k] + tau[k][t] for k in NAMES} for t in range(TASKS)]
    half = vectors.task_vectors(as_jax(theta0), [as_jax(expert) for expert in experts], "bfloat16")
    assert {x.dtype for x in half.values()} == {np.dtype("bfloat16")}
    what = problem(theta0, tau, kernels)._replace(tau=half)
    found = adamerging(what, rows, steps=100, learning_rate=2e-2, per_task=ROWS)
    rounded = {k: np.asarray(x, np.float64) for k, x in half.items()}
    for values, atol in ((rounded, 1e-4), (tau, 5e-3)):
        expected, losses = oracle(theta0, values, kernels, rows, "tensor", 100, 2e-2)
        np.testing.assert_allclose(found.coefficients, expected, atol=atol)
        np.testing.assert_allclose(found.history["loss"], losses, rtol=20 * atol)


def test_tasks_must_match():
    theta0, tau, kernels, rows = setting()
    with pytest.raises(ValueError, match="3 task vectors but heads of 2"):
        adamerging(problem(theta0, tau, kernels[:2]), rows)
    with pytest.raises(ValueError, match="3 task vectors but rows of 2 tasks"):
        adamerging(problem(theta0, tau, kernels), rows.only([0, 1]), steps=1, per_task=4)
    with pytest.raises(ValueError, match="unknown plus_plus 'yes'; allowed: True, False, released"):
        adamerging(problem(theta0, tau, kernels), rows, plus_plus="yes")
    with pytest.raises(ValueError, match=r"no setting 'step' .did you mean 'steps'"):
        adamerging(problem(theta0, tau, kernels), rows, step=1)


def test_an_expert_is_given_back_by_one_coefficient_of_one():
    theta0, tau, kernels, rows = setting()
    init = np.tile(np.array([0.0, 1.0, 0.0], np.float32), (4, 1))
    found = adamerging(problem(theta0, tau, kernels), rows, init=init, steps=0)
    jax.tree.map(
        lambda a, x, y: np.testing.assert_allclose(a, x + y[1], rtol=1e-5, atol=1e-6), found.params, theta0, tau
    )
    assert trees.flatten(found.params).keys() == set(NAMES)
