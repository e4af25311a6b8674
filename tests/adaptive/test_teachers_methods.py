"""SyMerge, DivMerge and SAMerging against independent float64 loops with hand-written gradients."""

import itertools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from taskvec.adaptive import objectives, rows as rows_lib
from taskvec.adaptive.divmerge import divmerge
from taskvec.adaptive.fit import Evaluate, Loop
from taskvec.adaptive.learn import Outputs
from taskvec.adaptive.optimisers import by_task
from taskvec.adaptive.samerging import samerging
from taskvec.adaptive.symerge import OBJECTIVES, symerge
from taskvec.training.heads import task_logits
from tests.adaptive import mlp_oracle as oracle
from tests.adaptive.mlp_oracle import CLASSES, ROWS, SCALE, TASKS


def labels_of(theta0, tau, kernels, task, x):
    """The expert's logits on rows of its task."""
    expert = {k: theta0[k] + tau[k][task] for k in theta0}
    return oracle.logits_of(oracle.features(expert, x.astype(np.float64))[1], kernels[task])


def pseudo(teacher, confident):
    def objective(i, logits):
        p, q, y = oracle.softmax(logits), oracle.softmax(teacher[i]), teacher[i].argmax(1)
        keep = np.ones(len(p))
        if confident:
            keep = ((p.argmax(1) == y) | (q.max(1) >= p.max(1))).astype(float)
        number = max(keep.sum(), 1)
        value = -(keep * np.log(p[np.arange(len(p)), y])).sum() / number
        return value, keep[:, None] * (p - np.eye(p.shape[1])[y]) / number

    return objective


def shifted(objective, bias, seen):
    """The objective of biased logits; notes its gradient by the bias."""

    def biased(i, logits):
        value, d_logits = objective(i, logits + bias)
        seen.append(d_logits.sum(0))
        return value, d_logits

    return biased


def symerge_reference(theta0, tau, kernels, rows, rounds, confident, rate, bias):
    lam, adam = {"lam": np.full((4, TASKS), 0.3)}, oracle.Adam(rate)
    # As released: weights that hold the factor of the logits, an Adam for each task's.
    heads = [{"b": np.zeros(k.shape[1]), "w": SCALE * k} for k in kernels]
    adams = [oracle.Adam(rate) for _ in kernels]
    batches, dropped = rows_lib.in_turn(rows, ROWS), 0
    for step in range(rounds * TASKS):
        batch = batches(step)
        t = int(batch["tasks"][0])
        c = np.clip(lam["lam"], 0, 1)
        teacher = [labels_of(theta0, tau, kernels, t, batch["x"])]
        by_bias = []
        objective = shifted(pseudo(teacher, confident), heads[t]["b"], by_bias)
        theta = oracle.merged(theta0, tau, c)
        _, grads, (d_kernel,) = oracle.gradients(theta, batch["x"], [heads[t]["w"] / SCALE], objective)
        now = oracle.logits_of(oracle.features(theta, batch["x"])[1], heads[t]["w"] / SCALE)
        dropped += int((np.abs(objective(0, now)[1]).sum(1) == 0).sum())
        inside = (lam["lam"] >= 0) & (lam["lam"] <= 1)
        lam = adam.step(lam, {"lam": oracle.by_coefficients(grads, tau, 4) * inside})
        heads[t] = adams[t].step(heads[t], {"b": bias * by_bias[0], "w": d_kernel / SCALE})
    return np.clip(lam["lam"], 0, 1), heads, dropped


@pytest.mark.parametrize("confident, bias", [(True, True), (False, False)])
def test_symerge_trajectory(confident, bias):
    theta0, tau, kernels, rows = oracle.setting(2)
    found = symerge(
        oracle.problem(theta0, tau, kernels), rows, objective="confident" if confident else "labels", rounds=20,
        per_task=ROWS, head_learning_rate=2e-2, learning_rate=2e-2, bias=bias,
    )  # fmt: skip
    lam, heads, dropped = symerge_reference(theta0, tau, kernels, rows, 20, confident, 2e-2, bias)
    np.testing.assert_allclose(found.coefficients, lam, atol=1e-4)
    for t, head in enumerate(heads):
        kernel = np.asarray(found.heads.kernel)[t]
        np.testing.assert_allclose(SCALE * kernel[:, : CLASSES[t]], head["w"], atol=1e-3)
        assert (kernel[:, CLASSES[t] :] == 0).all() and np.abs(head["w"] - SCALE * kernels[t]).max() > 0.1
        if bias:
            np.testing.assert_allclose(found.heads.bias[t, : CLASSES[t]], head["b"], atol=1e-3)
            assert (found.heads.bias[t, CLASSES[t] :] == 0).all() and np.abs(head["b"]).max() > 0.1
            z = oracle.features(theta0, rows.take(t, np.arange(ROWS))["x"].astype(np.float64))[1]
            logits = task_logits(found.heads, t, jnp.asarray(z, jnp.float32))[:, : CLASSES[t]]
            np.testing.assert_allclose(logits, oracle.logits_of(z, head["w"] / SCALE) + head["b"], atol=1e-2)
    assert (dropped > 0) == confident  # the filter had something to do
    assert bias or found.heads.bias is None
    assert found.history["objective"].shape == (60, 1)


def test_symerge_together_and_errors():
    theta0, tau, kernels, rows = oracle.setting()
    problem = oracle.problem(theta0, tau, kernels)
    found = symerge(problem, rows, schedule="together", rounds=2, per_task=ROWS)
    assert found.history["objective"].shape == (2, TASKS)
    assert (np.asarray(found.heads.kernel) != np.asarray(problem.heads.kernel)).any((1, 2)).all()
    with pytest.raises(ValueError, match="in_turn, together"):
        symerge(problem, rows, schedule="joint")
    with pytest.raises(ValueError, match="confident, labels, soft, entropy, features"):
        symerge(problem, rows, objective="kl")


def test_other_objectives_of_symerge():
    rng = np.random.default_rng(0)
    x, y, z, target = (rng.normal(size=(1, 4, 3)).astype(np.float32) for _ in range(4))
    p, q = (oracle.softmax(each[0].astype(np.float64)) for each in (x, y))
    outputs = Outputs(jnp.asarray(x), jnp.asarray(z), {"target_features": jnp.asarray(target)}, jnp.asarray(y))
    wanted = {
        "labels": -np.log(p[np.arange(4), y[0].argmax(1)]).mean(),
        "soft": (q * np.log(q / p)).sum(1).mean(),
        "entropy": -(p * np.log(p)).sum(1).mean(),
        "features": np.abs(z - target).mean(),
    }
    assert {*wanted, "confident"} == set(OBJECTIVES)
    for name, value in wanted.items():
        np.testing.assert_allclose(OBJECTIVES[name](outputs), [value], rtol=1e-5)


def test_a_batch_of_which_nothing_is_kept_changes_nothing():
    sure, unsure = jnp.array([[[9.0, 0.0]]]), jnp.array([[[0.0, 0.1]]])
    assert objectives.confident_pseudo_label(sure, unsure) == 0
    optimiser = by_task(optax.adam(0.1))
    params = jnp.ones((2, 3))
    state = optimiser.init(params)
    updates, state = optimiser.update(jnp.array([[1.0, 2.0, -1.0], [0, 0, 0]]), state, params)
    np.testing.assert_allclose(updates, [[-0.1, -0.1, 0.1], [0, 0, 0]], rtol=1e-5)
    updates, state = optimiser.update(jnp.array([[0.0, 0, 0], [3, 3, 3]]), state, params)
    np.testing.assert_allclose(updates, [[0, 0, 0], [-0.1, -0.1, -0.1]], rtol=1e-5)  # its own first step
    assert state[0].count.tolist() == [1, 1]
    # Teachers that say the first class and are sure of nothing: kept are rows that the merged model gives that class.
    theta0, tau, kernels, rows = oracle.setting()
    problem, given = oracle.problem(theta0, tau, kernels), rows.take(0, np.arange(1))["x"]
    width = problem.apply_fn(problem.theta0, {"x": given})["features"].shape[1]
    rows = rows._replace(targets=[{"features": np.zeros((count, width), np.float32)} for count in rows.counts])
    loop = Loop(evaluate=Evaluate(1, lambda step, now: now.coefficients))
    found = symerge(problem, rows, rounds=10, per_task=1, learning_rate=1e-3, loop=loop)
    at = [np.full((4, TASKS), 0.3, np.float32), *found.evaluations.values()]
    rested = [np.array_equal(before, after) for before, after in itertools.pairwise(at)]
    np.testing.assert_array_equal(rested, found.history["objective"][:, 0] == 0)
    assert 0 < sum(rested) < len(rested)


def jensen_shannon(teacher):
    def objective(i, logits):
        p, q = oracle.softmax(logits), oracle.softmax(teacher[i])
        m = (p + q) / 2
        value = 0.5 * (p * np.log(p / m) + q * np.log(q / m)).sum(1).mean()
        g = 0.5 * np.log(p / m)
        return value, p * (g - (p * g).sum(1, keepdims=True)) / len(p)

    return objective


def softened_kl(teacher, temperature=2.0):
    def objective(i, logits):
        p, q = oracle.softmax(logits / temperature), oracle.softmax(teacher[i] / temperature)
        return (q * np.log(q / p)).sum(1).mean(), (p - q) / temperature / len(p)

    return objective


def mean_logit(teacher):
    def objective(i, logits):
        p, q, m = (oracle.softmax(x) for x in (logits, teacher[i], (logits + teacher[i]) / 2))
        value = (p * np.log(p / m) + q * np.log(q / m)).sum(1).mean()
        g = np.log(p / m)
        return value, (p * (g - (p * g).sum(1, keepdims=True)) + m - (p + q) / 2) / len(p)

    return objective


def test_divmerge_trajectory():
    theta0, tau, kernels, rows = oracle.setting()
    problem = oracle.problem(theta0, tau, kernels)
    found = divmerge(problem, rows, steps=60, per_task=ROWS, learning_rate=1e-2)
    lam, adam, batches, losses = {"lam": np.full((4, TASKS), 0.3)}, oracle.Adam(1e-2), rows_lib.together(rows, ROWS), []
    for step in range(60):
        x = batches(step)["x"]
        objective = jensen_shannon(oracle.teacher_logits(theta0, tau, kernels, x))
        loss, grads, _ = oracle.gradients(oracle.merged(theta0, tau, lam["lam"]), x, kernels, objective)
        lam = adam.step(lam, {"lam": oracle.by_coefficients(grads, tau, 4)})
        losses.append(loss)
    np.testing.assert_allclose(found.coefficients, lam["lam"], atol=1e-4)
    np.testing.assert_allclose(found.history["loss"], losses, rtol=1e-3)
    assert np.abs(lam["lam"] - 0.3).max() > 0.1
    with pytest.raises(ValueError, match="js, kl"):
        divmerge(problem, rows, divergence="jsd")


@pytest.mark.parametrize("adaptive, name", [(False, "kl"), (True, "jsd")])
def test_samerging_trajectory(adaptive, name):
    theta0, tau, kernels, rows = oracle.setting()
    problem = oracle.problem(theta0, tau, kernels)
    settings = {"rho": 0.3, "weight_decay": 0.1, "learning_rate": 1e-2}
    found = samerging(problem, rows, steps=60, per_task=ROWS, adaptive=adaptive, objective=name, **settings)
    lam, adam, batches, losses = {"lam": np.zeros((4, TASKS))}, oracle.Adam(1e-2), rows_lib.cyclic(rows, ROWS), []
    for step in range(60):
        x = batches(step)["x"]
        objective = {"kl": softened_kl, "jsd": mean_logit}[name](oracle.teacher_logits(theta0, tau, kernels, x))

        def gradient(c):
            theta = oracle.merged(theta0, tau, c)
            loss, grads, _ = oracle.gradients(theta, x, kernels, objective)  # noqa: B023
            return loss, oracle.by_coefficients(grads, tau, 4)

        loss, g = gradient(lam["lam"])
        size = np.abs(lam["lam"]) if adaptive else 1.0
        ahead = lam["lam"] + 0.3 * size**2 * g / (np.linalg.norm(size * g) + 1e-12)
        lam = adam.step(lam, {"lam": gradient(ahead)[1] + 0.1 * lam["lam"]})
        losses.append(loss)
    np.testing.assert_allclose(found.coefficients, lam["lam"], atol=1e-4)
    np.testing.assert_allclose(found.history["loss"], losses, rtol=1e-3)
    assert np.abs(lam["lam"]).max() > 0.15
    with pytest.raises(ValueError, match="kl, jsd, cross_entropy, entropy"):
        samerging(problem, rows, objective="js")


@pytest.mark.parametrize("method", [symerge, divmerge, samerging])
def test_what_is_wrong_is_said_before_the_experts_run(method):
    theta0, tau, kernels, rows = oracle.setting()
    rows = rows._replace(take=lambda t, numbers: pytest.fail("rows were read"))
    for wrong, match in (({"mode": "layers"}, "layers"), ({"constraint": "clamp"}, "clip, identity"),
                         ({"init": np.zeros((2, TASKS))}, "init has shape")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            method(oracle.problem(theta0, tau, kernels), rows, **wrong)
