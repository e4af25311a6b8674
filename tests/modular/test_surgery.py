"""Surgery: identity at the start, the training loop against float64 numpy, and why it is centred."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec.adaptive import registry
from taskvec.adaptive.fit import Loop
from taskvec.modular import results, surgery
from tests.modular import blocks_for_tests as toy

D, RANK, COUNTS = 12, 4, (30, 21)


def features(seed=0, non_negative=False, units=1.0):
    """Merged and expert features of two tasks with different numbers of rows."""
    rng = np.random.default_rng(seed)
    merged, expert = [], []
    for n in COUNTS:
        z = rng.normal(1.0 if non_negative else 0.0, 1.0, (n, D))
        y = z + 0.3 * np.tanh(z @ rng.normal(size=(D, D))) + rng.normal(0, 0.2, D)
        if non_negative:
            z, y = np.maximum(z, 0), np.maximum(y, 0)
        merged.append((units * z).astype(np.float32))
        expert.append((units * y).astype(np.float32))
    return merged, expert


def mean_l1(found, merged, expert):
    return np.mean([np.abs(found(t, merged[t]) - expert[t]).mean() for t in range(len(merged))])


@pytest.mark.parametrize("center", [True, False])
def test_starts_as_the_identity(center):
    merged, expert = features()
    found = surgery.train(merged, expert, rank=RANK, center=center, steps=0)
    for t in (0, 1):
        np.testing.assert_array_equal(found(t, merged[t]), merged[t])
    with pytest.raises(ValueError, match="task 2, but there are corrections of 2 tasks"):
        found(2, merged[1])
    adapters = found.adapters
    assert adapters.down.shape == (2, RANK, D) and np.abs(adapters.down).max() <= 1 / np.sqrt(D)
    if not center:
        assert (adapters.center == 0).all() and (adapters.scale == 1).all()


def oracle(down, merged, expert, center, steps, seed, batch_size=16, rate=1e-3, once=False):
    """Float64 loop, one task after the other, each with an Adam of its own; gradients by hand."""
    out = []
    for t, (z_all, y_all) in enumerate(zip(merged, expert, strict=True)):
        z_all, y_all = z_all.astype(np.float64), y_all.astype(np.float64)
        width = z_all.shape[1]
        mu = z_all.mean(0) if center else np.zeros(width)
        s = np.sqrt(((z_all - mu) ** 2).mean()) if center else 1.0
        weights = [np.asarray(down[t], np.float64), np.zeros((width, RANK))]
        moments = [[np.zeros_like(w), np.zeros_like(w)] for w in weights]
        order = np.random.default_rng([seed, t]).permutation(len(z_all))
        for step in range(len(z_all) if once else steps):
            sizes = np.array([[len(m)] for m in merged])
            rows = np.random.default_rng([seed, step]).integers(0, sizes, (len(merged), batch_size), dtype=np.int32)[t]
            rows = order[step : step + 1] if once else rows
            z, y = z_all[rows], y_all[rows]
            d, u = weights
            x = (z - mu) / s
            hidden = np.maximum(x @ d.T, 0)
            g = np.sign(z - s * hidden @ u.T - y) / z.size
            grads = [-s * ((g @ u) * (hidden > 0)).T @ x, -s * g.T @ hidden]
            for i, grad in enumerate(grads):
                m, v = moments[i]
                m += 0.1 * (grad - m)
                v += 0.001 * (grad**2 - v)
                weights[i] = weights[i] - rate * (m / (1 - 0.9 ** (step + 1))) / (
                    np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8
                )
        out.append(lambda z, d=weights[0], u=weights[1], mu=mu, s=s: z - s * np.maximum((z - mu) / s @ d.T, 0) @ u.T)
    return out


@pytest.mark.parametrize("center, once", [(True, False), (False, False), (False, True)])
def test_training_matches_the_formula(center, once):
    merged, expert = features()
    start = surgery.train(merged, expert, rank=RANK, center=center, steps=0, seed=5)
    rate = 1e-2 if once else 1e-3
    how = {"learning_rate": rate, "once": once}
    trained = surgery.train(merged, expert, rank=RANK, center=center, steps=100, seed=5, **how)
    expected = oracle(start.adapters.down, merged, expert, center, 100, 5, rate=rate, once=once)
    for t in (0, 1):
        np.testing.assert_allclose(trained(t, merged[t]), expected[t](merged[t]), atol=1e-4)


def test_moves_features_to_the_experts():
    merged, expert = features()
    found = surgery.train(merged, expert, rank=D, steps=600, learning_rate=1e-2)
    assert mean_l1(found, merged, expert) < 0.7 * np.mean(
        [np.abs(z - y).mean() for z, y in zip(merged, expert, strict=True)]
    )


def test_units_of_features_do_not_matter_when_centred():
    trained = lambda units: surgery.train(*features(units=units), rank=RANK, center=True, steps=30, seed=1).adapters
    small, large = trained(2.0**-6), trained(1.0)
    np.testing.assert_allclose(small.up, large.up, atol=1e-4)  # not exact: the epsilon of Adam has units
    np.testing.assert_allclose(small.scale * 2**6, large.scale, rtol=1e-6)


def test_centring_keeps_the_relu_at_work_on_non_negative_features():
    """Uncentred, the common offset of features moves all pre-activations together."""
    rng = np.random.default_rng(0)
    basis, c = rng.normal(size=(8, 256)), rng.normal(size=(200, 8))
    z = np.maximum(0.3 * c @ basis + 0.5, 0).astype(np.float32)
    y = np.maximum(0.3 * (c + 0.5 * np.tanh(c @ rng.normal(size=(8, 8)))) @ basis + 0.5, 0).astype(np.float32)
    alive, distance = {}, {}
    for center in (True, False):
        found = surgery.train([z], [y], center=center, steps=300, learning_rate=1e-2)
        adapters = found.adapters
        x = (z - adapters.center[0]) / adapters.scale[0]
        alive[center] = float(((x @ adapters.down[0].T) > 0).mean())
        distance[center] = mean_l1(found, [z], [y])
    assert 0.4 < alive[True] < 0.6 and alive[False] < 0.35
    assert distance[True] < 0.9 * distance[False]


def test_of_unit_norm_as_fusion_bench_has_it():
    merged, expert = features()
    unit = [[z / np.linalg.norm(z, axis=1, keepdims=True) for z in each] for each in (merged, expert)]
    start, done = (
        surgery.train(merged, expert, rank=RANK, normalise=True, steps=steps, per_task=8, seed=5) for steps in (0, 40)
    )
    expected = oracle(start.adapters.down, *unit, False, 40, 5, batch_size=8)
    for t in (0, 1):
        np.testing.assert_allclose(done(t, merged[t]), expected[t](unit[0][t]), atol=1e-4)


def test_shapes_must_pair_up():
    merged, expert = features()
    with pytest.raises(ValueError, match="pairs"):
        surgery.train(merged, expert[::-1])


def test_results_say_how_they_are_used():
    params, other = {"w": jnp.ones(2)}, {"w": jnp.zeros(2)}
    merged, expert = features()
    one = results.static(params)
    assert one.kind == "static" and one.params_for(0) is one.params_for(1) is params
    assert results.per_task([params, other]).params_for(1) is other
    found = surgery.train(merged, expert, rank=RANK, steps=3)
    corrected = results.corrected(one, found)
    assert corrected.kind == "task-conditioned" and corrected.params_for(1) is params
    np.testing.assert_array_equal(corrected.features_for(1, merged[1]), found(1, merged[1]))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), one.features_for(0, merged[0]), merged[0]))


def test_as_a_registered_method():
    """On a merged model: the features that it corrects, and a trajectory of the paper's form."""
    theta0, tau, rows, problem = toy.setting()
    run = lambda **settings: registry.get("surgery")(problem, rows, rank=RANK, seed=5, **settings)
    start, done = run(steps=0), run(steps=100)
    inputs = [rows.take(t, np.arange(n)) for t, n in enumerate(toy.COUNTS)]
    models = [start.params, *(toy.as_jax(toy.add(theta0, toy.select(tau, t))) for t in (0, 1))]
    merged, *experts = ([np.asarray(toy.apply_fn(params, x)["features"]) for x in inputs] for params in models)
    expert = [experts[0][0], experts[1][1]]
    wanted = toy.add(theta0, jax.tree.map(np.add, toy.select(tau, 0), toy.select(tau, 1)), 0.3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), start.params, wanted)
    expected = oracle(start.learnables["down"], merged, expert, False, 100, 5)
    for t in (0, 1):
        np.testing.assert_allclose(start.merged.features_for(t, merged[t]), merged[t], atol=0)
        np.testing.assert_allclose(done.merged.features_for(t, merged[t]), expected[t](merged[t]), atol=1e-4)
    assert done.merged.kind == "task-conditioned" and done.history["l1"].shape == (100, 2)
    assert done.history["loss"][-10:].mean() < done.history["loss"][:10].mean()
    for field, value in {"evaluate": object(), "pieces": 2}.items():
        with pytest.raises(ValueError, match=f"surgery takes no Loop.{field}="):
            run(loop=Loop(**{field: value}))
    with pytest.raises(ValueError, match="rows of 1 tasks for 2 task vectors"):
        registry.get("surgery")(problem, rows.only([0]))
    with pytest.raises(ValueError, match=r"regmean needs extras .'gram'."):
        run(on="regmean")
