"""SuperMerge, Self Positioning and Sens-Merging against float64 loops with hand-written gradients."""

import jax.numpy as jnp
import numpy as np
import pytest

from taskvec.adaptive import rows as rows_lib
from taskvec.adaptive.self_positioning import self_positioning
from taskvec.adaptive.sens_merging import sens_merging
from taskvec.adaptive.supermerge import supermerge, tasks_of
from tests.adaptive.toy_mlp import D_IN, NAMES, ROWS, SCALE, loss_and_gradient, problem, setting

STEPS = 30


def search(theta0, tau, kernels, rows, steps=STEPS, rate=1e-2):
    """Adam on w, coefficients tanh(w) from w = 0.3 on: ``[4, T]`` coefficients, the merged model, losses."""
    batches, tasks = rows_lib.together(rows, ROWS), len(tau["w1"])
    w, m, v, losses = np.full((4, tasks), 0.3), 0.0, 0.0, []
    merged = lambda c: {k: theta0[k] + np.tensordot(c[i], tau[k], 1) for i, k in enumerate(NAMES)}
    for step in range(steps):
        loss, grads = loss_and_gradient(merged(np.tanh(w)), batches(step), kernels, [1] * len(kernels))
        g = np.array([[np.sum(grads[k] * tau[k][t]) for t in range(tasks)] for k in NAMES]) * (1 - np.tanh(w) ** 2)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - rate * (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        losses.append(loss)
    return np.tanh(w), merged(np.tanh(w)), losses


def test_supermerge():
    theta0, tau, kernels, rows = setting()
    found = supermerge(problem(theta0, tau, kernels), rows, steps=STEPS, learning_rate=1e-2, per_task=ROWS)
    coef, merged, losses = search(theta0, tau, kernels, rows)
    np.testing.assert_allclose(found.coefficients, coef, atol=1e-4)
    np.testing.assert_allclose(found.history["loss"], losses, rtol=1e-3)
    for k in NAMES:
        np.testing.assert_allclose(found.params[k], merged[k], atol=1e-3)


def test_hierarchical_supermerge():
    theta0, tau, kernels, rows = setting()
    tree = ((2, 0), (1,))
    assert tasks_of(tree) == [2, 0, 1]
    found = supermerge(problem(theta0, tau, kernels), rows, groups=tree, steps=STEPS, learning_rate=1e-2, per_task=ROWS)
    parts = []
    for group in tree:
        own = {k: tau[k][list(group)] for k in NAMES}
        parts.append(search(theta0, own, [kernels[t] for t in group], rows.only(group)))
    upper = {k: np.stack([merged[k] - theta0[k] for _, merged, _ in parts]) for k in NAMES}
    coef, _, losses = search(theta0, upper, [kernels[t] for t in (2, 0, 1)], rows.only((2, 0, 1)))
    expected = np.zeros((4, 3))
    for n, group in enumerate(tree):
        expected[:, list(group)] = coef[:, n : n + 1] * parts[n][0]
    np.testing.assert_allclose(found.coefficients, expected, atol=2e-4)
    np.testing.assert_allclose(found.history["loss"], losses, rtol=2e-3)
    for i, k in enumerate(NAMES):  # linear in the task vectors still
        np.testing.assert_allclose(found.params[k], theta0[k] + np.tensordot(expected[i], tau[k], 1), atol=1e-3)


def test_groups_hold_every_task_once():
    theta0, tau, kernels, rows = setting()
    what = problem(theta0, tau, kernels)
    with pytest.raises(ValueError, match=r"tasks 0..2 once"):
        supermerge(what, rows, groups=((0, 1), (1,)))
    with pytest.raises(ValueError, match="all tasks or all groups"):
        supermerge(what, rows, groups=((0, 1), 2))


def pairs(counts=(10, 12)):
    rng = np.random.default_rng(3)
    first = [rng.normal(size=(n, D_IN)).astype(np.float32) for n in counts]
    second = [(x + 0.5 * rng.normal(size=x.shape)).astype(np.float32) for x in first]
    return rows_lib.arrays([{"x": x, "second_x": y} for x, y in zip(first, second, strict=True)])


def contrast(theta, first, second, temperature):
    """The contrastive loss of pairs and its gradient by every weight, by hand."""
    forward = lambda x: np.tanh(x @ theta["w1"] + theta["b1"])
    h = [forward(x.astype(np.float64)) for x in (first, second)]
    z = [a @ theta["w2"] + theta["b2"] for a in h]
    norm = [np.linalg.norm(a, axis=1, keepdims=True) for a in z]
    u = [a / n for a, n in zip(z, norm, strict=True)]
    s = u[0] @ u[1].T / temperature
    p = np.exp(s - s.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    size = len(first)
    ds = (p - np.eye(size)) / size / temperature
    total = dict.fromkeys(NAMES, 0.0)
    for x, a, unit, n, du in zip((first, second), h, u, norm, (ds @ u[1], ds.T @ u[0]), strict=True):
        dz = (du - unit * (unit * du).sum(1, keepdims=True)) / n
        dh = (dz @ theta["w2"].T) * (1 - a**2)
        grads = {"b1": dh.sum(0), "b2": dz.sum(0), "w1": x.T @ dh, "w2": a.T @ dz}
        total = {k: total[k] + grads[k] for k in NAMES}
    return -np.log(np.diag(p)).mean(), total


def test_self_positioning():
    theta0, tau, kernels, _ = setting()
    rows, steps, rate = pairs(), 20, 0.05
    found = self_positioning(
        problem(theta0, tau, kernels), rows, steps=steps, learning_rate=rate, per_set=5, temperature=0.2
    )
    batches = rows_lib.together(rows_lib.views(rows), 5)
    w, scale, losses = np.zeros(3), 1.0, []
    for step in range(steps):
        share = np.exp(w) / np.exp(w).sum()
        theta = {k: theta0[k] + scale * np.tensordot(share, tau[k], 1) for k in NAMES}
        x = batches(step)["x"].reshape(2, 2, 5, D_IN)  # set, view, pair
        each = [contrast(theta, x[s, 0], x[s, 1], 0.2) for s in (0, 1)]
        losses.append(sum(loss for loss, _ in each))
        along = np.array([sum(np.sum(g[k] * tau[k][t]) for _, g in each for k in NAMES) for t in range(3)])
        w, scale = w - rate * scale * share * (along - share @ along), scale - rate * share @ along
    np.testing.assert_allclose(found.history["loss"], losses, rtol=1e-3)
    np.testing.assert_allclose(found.coefficients[0], scale * np.exp(w) / np.exp(w).sum(), atol=1e-4)
    assert abs(scale - 1) > 0.01 and np.ptp(w) > 0.05
    for k in NAMES:
        merged = theta0[k] + np.tensordot(found.coefficients[0], tau[k], 1)
        np.testing.assert_allclose(found.params[k], merged, atol=1e-5)
    free = self_positioning(
        problem(theta0, tau, kernels), rows, steps=20, constraint="simplex", train_scale=False, per_set=5, scale=0.5
    )
    np.testing.assert_allclose(free.coefficients.sum(), 0.5, rtol=1e-5)
    assert free.coefficients.min() >= 0 and np.ptp(free.coefficients) > 0.01
    with pytest.raises(ValueError, match="two views need"):
        self_positioning(problem(theta0, tau, kernels), setting()[3])
    with pytest.raises(ValueError, match="softmax, simplex, identity"):
        self_positioning(problem(theta0, tau, kernels), rows, constraint="tanh")


@pytest.mark.parametrize("cross_task", ["distance", None])
def test_sens_merging(cross_task):
    theta0, tau, kernels, rows = setting(counts=(4, 3, 5))
    found = sens_merging(problem(theta0, tau, kernels), rows, mode="tensor", cross_task=cross_task, temperature=0.5)
    experts = [{k: theta0[k] + tau[k][t] for k in NAMES} for t in range(3)]
    inputs = [rows.take(t, np.arange(n))["x"].astype(np.float64) for t, n in enumerate(rows.counts)]
    s = np.zeros((3, 4))
    for t, n in enumerate(rows.counts):
        for i in range(n):
            one = {"x": inputs[t][i : i + 1], "label": rows.labels[t][i : i + 1]}
            _, grads = loss_and_gradient(experts[t], one, [kernels[t]], (1,))
            s[t] += [np.abs(experts[t][k] * grads[k]).sum() / n for k in NAMES]
    alpha = s / np.linalg.norm(s, axis=1, keepdims=True)

    def logits(t, u):
        z = np.tanh(inputs[u] @ experts[t]["w1"] + experts[t]["b1"]) @ experts[t]["w2"] + experts[t]["b2"]
        return SCALE * z / np.linalg.norm(z, axis=1, keepdims=True) @ kernels[u]

    d = np.array([sum(np.linalg.norm(logits(t, u) - logits(u, u), axis=1).mean() for u in range(3)) for t in range(3)])
    rho = d / d.sum() if cross_task else np.ones(3)
    e = np.exp(alpha * rho[:, None] / 0.5)
    expected = (3 * e / e.sum(0)).T
    np.testing.assert_allclose(found.coefficients, expected, rtol=1e-4)
    assert np.ptp(expected) > 0.1
    for i, k in enumerate(NAMES):
        np.testing.assert_allclose(found.params[k], theta0[k] + np.tensordot(expected[i], tau[k], 1), atol=1e-4)
    with pytest.raises(ValueError, match="distance, None"):
        sens_merging(problem(theta0, tau, kernels), rows, cross_task="agreement")
    assert jnp.isfinite(found.params["w1"]).all()
