"""aTLAS against an independent float64 loop with hand-written gradients, and its parts one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec import tree as trees
from taskvec.adaptive import rows as rows_lib
from taskvec.adaptive.atlas import atlas, atlas_negation
from taskvec.adaptive.atlas_few_shot import atlas_few_shot, few_of, few_shots
from taskvec.adaptive.atlas_parts import cross_entropies, free_coefficients, lp_penalty
from taskvec.adaptive.coefficients import coefficients, elementwise
from taskvec.adaptive.fit import Evaluate, Loop
from taskvec.adaptive.learn import make_loss
from taskvec.adaptive.parametrisation import LowRank
from taskvec.adaptive.teachers import features_of
from tests.adaptive.toy_mlp import (
    D_IN,
    HIDDEN,
    NAMES,
    ROWS,
    TASKS,
    loss_and_gradient,
    predictions,
    problem,
    setting,
)


def oracle(theta0, tau, kernels, batches, steps, rate, signs, length=1.0):
    tasks = len(tau["w1"])
    lam, m, v, losses = np.zeros((4, tasks)), 0.0, 0.0, []
    for step in range(steps):
        theta = {k: theta0[k] + np.tensordot(lam[i], tau[k], 1) for i, k in enumerate(NAMES)}
        loss, grads = loss_and_gradient(theta, batches(step), kernels, signs)
        g = np.array([[np.sum(grads[k] * tau[k][t]) for t in range(tasks)] for k in NAMES])
        g = g if length is None else length * g / (np.linalg.norm(g) + 1e-6)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        move = (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        lam = lam - rate(step) * (move + 0.1 * lam)
        losses.append(loss)
    return lam, losses


def test_addition():
    theta0, tau, kernels, rows = setting()
    batches, length = rows_lib.zipped(rows, ROWS)
    assert length == 2
    for norm in (1.0, None):
        found = atlas(
            problem(theta0, tau, kernels), rows, epochs=50, learning_rate=3e-3, per_task=ROWS, gradient_norm=norm
        )
        lam, losses = oracle(theta0, tau, kernels, batches, 100, lambda step: 3e-3, (1, 1, 1), norm)
        np.testing.assert_allclose(found.coefficients, lam, atol=1e-4)
        np.testing.assert_allclose(found.history["loss"], losses, rtol=1e-3)
        assert np.abs(lam).max() > 0.1 and lam.min() < 0
    assert found.groups == NAMES and found.kept is None
    for i, k in enumerate(NAMES):
        np.testing.assert_allclose(found.params[k], theta0[k] + np.tensordot(lam[i], tau[k], 1), atol=1e-3)


def test_nothing_learned_is_theta0_and_the_best_epoch_is_kept():
    theta0, tau, kernels, rows = setting()
    what = problem(theta0, tau, kernels)
    for partitions in (1, 3):
        found = atlas(what, rows, epochs=0, per_task=ROWS, partitions=partitions)
        jax.tree.map(np.testing.assert_array_equal, found.params, what.theta0)
    seen = []

    watch = Loop(evaluate=Evaluate(3, lambda step, now: seen.append(step)))
    found = atlas(what, rows, epochs=8, learning_rate=0.1, per_task=ROWS, keep="best", loop=watch)
    inputs = [rows.take(t, np.arange(n))["x"] for t, n in enumerate(rows.counts)]
    right = lambda theta, t: np.mean(predictions(theta, inputs[t], kernels[t]) == rows.labels[t])
    own = [right({k: theta0[k] + tau[k][t] for k in NAMES}, t) for t in range(TASKS)]
    assert min(own) > 0 and len(set(own)) == TASKS
    normalised = {0: np.mean([right(theta0, t) / own[t] for t in range(TASKS)])}
    normalised |= {s: np.mean(e["accuracy"] / own) for s, e in found.evaluations.items() if "accuracy" in e}
    assert list(normalised) == [0, 2, 4, 6, 8, 10, 12, 14, 16] and seen == [3, 6, 9, 12, 15, 16]
    assert found.kept == max(normalised, key=normalised.get)
    assert normalised[found.kept] > max(normalised[0], normalised[2])
    for i, k in enumerate(NAMES):
        merged = theta0[k] + np.tensordot(found.coefficients[i], tau[k], 1)
        np.testing.assert_allclose(found.params[k], merged, atol=1e-5)


def test_negation_keeps_the_control_task():
    theta0, tau, kernels, rows = setting((3, 4), 1, (40, 48))
    # Labels that theta0 mostly gets right.
    labels = [predictions(theta0, rows.take(t, np.arange(n))["x"], kernels[t]) for t, n in enumerate(rows.counts)]
    rows = rows._replace(labels=[np.where(np.arange(len(y)) % 8 == 0, 0, y) for y in labels])
    what, settings = problem(theta0, tau, kernels), {"learning_rate": 2e-2, "per_task": 10}
    free = atlas_negation(what, rows, epochs=10, control=0.0, **settings)
    batches, length = rows_lib.zipped(rows, 10)
    assert length == 4
    lam, losses = oracle(theta0, tau, kernels, batches, 40, lambda step: 2e-2, (-1, 1))
    np.testing.assert_allclose(free.history["loss"], losses, rtol=1e-3, atol=1e-3)

    def accuracies(c):
        theta = {k: theta0[k] + np.tensordot(c[i], tau[k], 1) for i, k in enumerate(NAMES)}
        pairs = [(rows.take(t, np.arange(n))["x"], kernels[t], rows.labels[t]) for t, n in enumerate(rows.counts)]
        return [np.mean(predictions(theta, x, kernel) == y) for x, kernel, y in pairs]

    path = {s: e["accuracy"] for s, e in free.evaluations.items()}
    np.testing.assert_allclose(path[40], accuracies(lam))
    start = accuracies(np.zeros((4, 1)))
    assert path[40][0] < start[0]  # it forgets
    held = atlas_negation(what, rows, epochs=10, **settings)
    allowed = {s: a for s, a in path.items() if a[1] >= 0.95 * start[1]}
    first_bad = min(s for s in path if s not in allowed)
    assert len(held.history["loss"]) == first_bad and max(held.evaluations) == first_bad  # it ended there
    before = {s: a[0] for s, a in allowed.items() if s < first_bad and a[0] < start[0]}
    assert held.kept == (min(before, key=before.get) if before else 0)
    assert accuracies(held.coefficients)[1] >= 0.95 * start[1]
    with pytest.raises(ValueError, match="1 task vector, 2 heads, 2 sets"):
        atlas_negation(what, rows.only([0]))


def test_few_shot():
    theta0, tau, kernels, rows = setting((3,), 3, (9,))
    found = atlas_few_shot(problem(theta0, tau, kernels), rows, epochs=10, batch_size=6, least_batches=2)
    # 12 rows are wanted and 9 are there: twice over they make 3 batches per epoch.
    again = rows_lib.repeated(rows, 2)
    rate = lambda step: 0.05 * (1 + np.cos(np.pi * step / 30))
    lam, losses = oracle(theta0, tau, kernels, rows_lib.cyclic(again, 6), 30, rate, (1,))
    np.testing.assert_allclose(found.coefficients, lam, atol=1e-3)
    np.testing.assert_allclose(found.history["loss"], losses, rtol=5e-3, atol=1e-3)
    assert losses[-1] < losses[0]


def test_a_share_of_the_rows():
    rows = setting((3,), 3, (40,))[3]
    part = few_of(rows, 0.35, seed=1)
    assert part.counts == (14,) and few_of(rows, 1.0) is rows and few_of(rows, 0.001).counts == (1,)
    batch, everything = part.batch([np.arange(14)]), rows.batch([np.arange(40)])
    at = [np.flatnonzero((everything["x"] == x).all(1)).item() for x in batch["x"]]
    assert len(set(at)) == 14 and at != sorted(at)
    np.testing.assert_array_equal(batch["label"], everything["label"][at])


def test_few_shots_are_of_every_class():
    rows = setting((3,), 3, (40,))[3]
    few = few_shots(rows, 2, seed=1)
    assert few.counts == (6,) and sorted(few.labels[0]) == [0, 0, 1, 1, 2, 2]
    batch = few.batch([np.arange(6)])
    everything = rows.batch([np.arange(40)])
    for x, y in zip(batch["x"], batch["label"], strict=True):
        at = np.flatnonzero((everything["x"] == x).all(1))
        assert everything["label"][at] == [y]


def test_partitions_share_the_gradient_of_the_tensor():
    theta0, tau, kernels, rows = setting()
    what = problem(theta0, tau, kernels)
    batch = rows_lib.zipped(rows, ROWS)[0](0)
    _, grads = loss_and_gradient(theta0, batch, kernels, (1, 1, 1))
    whole = np.array([[np.sum(grads[k] * tau[k][t]) for t in range(TASKS)] for k in NAMES])

    frozen = (what.theta0, what.tau, what.heads)
    for partitioned in ("all", "matrices"):
        parametrisation = free_coefficients(what, "tensor", 3, partitioned)
        loss = make_loss(what, parametrisation, cross_entropies)
        start = {"merge": parametrisation.init()}
        found = jax.jit(jax.grad(loss, has_aux=True))(start, frozen, batch, None)[0]["merge"]["lam"]
        assert found.shape == (4, TASKS, 3)
        kept = np.ones(4) if partitioned == "all" else np.array([0, 0, 1, 1])
        np.testing.assert_allclose(found.sum(-1), whole * kept[:, None], rtol=1e-3, atol=1e-4)
    assert np.abs(np.asarray(found[2:])).min() > 0
    with pytest.raises(ValueError, match="all, matrices"):
        atlas(what, rows, partitions=2, partitioned="some")


def test_low_rank_task_vectors_are_their_products():
    """LoRA as task vectors, in every parametrisation, plain and stacked, and through a whole run."""
    rng = np.random.default_rng(0)
    low = lambda *lead: LowRank(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((*lead, 4, 2), (*lead, 2, 5))))
    theta0 = {"blocks": {"w": jnp.zeros((3, 4, 5))}, "out": jnp.zeros((4, 5))}
    tau = {"blocks": {"w": low(3, 2)}, "out": low(2)}
    dense = jax.tree.map(lambda t: t.up @ t.down, tau, is_leaf=lambda x: isinstance(x, LowRank))
    groups = trees.groups(theta0, "tensor")
    learned = lambda p: jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), p.init())
    for made in (coefficients(groups, 2), coefficients(groups, 2, partitions=3), elementwise(theta0, 2)):
        lam = learned(made)
        a, b = (jax.jit(made.merge)(theta0, vectors, lam) for vectors in (tau, dense))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)
    theta0, tau, kernels, rows = setting()
    what = problem(theta0, tau, kernels)
    factors = LowRank(
        *(jnp.asarray(rng.normal(0, 0.5, s), jnp.float32) for s in ((TASKS, D_IN, 2), (TASKS, 2, HIDDEN)))
    )
    results = []
    for w1 in (factors, factors.up @ factors.down):
        changed = what._replace(tau=what.tau | {"w1": w1})
        results.append(atlas(changed, rows, epochs=10, learning_rate=1e-2, per_task=ROWS).coefficients)
    np.testing.assert_allclose(*results, atol=1e-4)
    assert np.abs(results[0]).min() > 1e-3


def test_linearised_models():
    """Features are ``f(theta0) + J sum lam tau``; the derivative by hand."""
    theta0, tau, kernels, rows = setting()
    what = problem(theta0, tau, kernels, linear=True)
    parametrisation = free_coefficients(what, "tensor")
    batch = {"x": rows.take(0, np.arange(5))["x"]}
    lam = np.random.default_rng(1).normal(size=(4, TASKS))
    d = {k: np.tensordot(lam[i], tau[k], 1) for i, k in enumerate(NAMES)}
    h = np.tanh(batch["x"] @ theta0["w1"] + theta0["b1"])
    slope = ((1 - h**2) * (batch["x"] @ d["w1"] + d["b1"])) @ theta0["w2"] + h @ d["w2"] + d["b2"]
    expected = h @ theta0["w2"] + theta0["b2"] + slope

    params = parametrisation.merge(what.theta0, what.tau, {"lam": jnp.asarray(lam, jnp.float32)})
    found = features_of(what, params, rows_lib.arrays([batch]), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    run = atlas(what, rows, epochs=10, learning_rate=1e-2, per_task=ROWS)
    assert run.history["loss"][-4:].mean() < run.history["loss"][:4].mean()
    first = atlas(what._replace(linear=False), rows, epochs=1, learning_rate=1e-2, per_task=ROWS)
    np.testing.assert_allclose(run.history["loss"][0], first.history["loss"][0], rtol=1e-5)  # they agree at theta0
    assert abs(run.history["loss"][1] - first.history["loss"][1]) > 1e-5


def test_penalty():
    lam = np.random.default_rng(0).normal(size=(4, 3))
    for order in (1, 2):
        expected = 0.5 * np.linalg.norm(lam, order, axis=1).mean()
        np.testing.assert_allclose(lp_penalty(order)({"lam": jnp.asarray(lam)}), expected, rtol=1e-5)
    assert (jax.grad(lp_penalty(2))({"lam": jnp.zeros((4, 3))})["lam"] == 0).all()
    with pytest.raises(ValueError, match="None, 1, 2"):
        lp_penalty(3)


def test_what_does_not_fit_is_refused():
    theta0, tau, kernels, rows = setting()
    what = problem(theta0, tau, kernels)
    with pytest.raises(ValueError, match="labelled rows"):
        atlas(what, rows._replace(labels=None))
    with pytest.raises(ValueError, match="allowed: last, best"):
        atlas(what, rows, keep="first")
    with pytest.raises(ValueError, match="one head and one set"):
        atlas_few_shot(what, rows)
    with pytest.raises(ValueError, match="needs validation rows"):
        atlas_few_shot(problem(theta0, tau, kernels[:1]), rows.only([0]), keep="best")
    with pytest.raises(ValueError, match="a share is in"):
        atlas_few_shot(problem(theta0, tau, kernels[:1]), rows.only([0]), share=0.5, shots=2)
