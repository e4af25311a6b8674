"""Concrete masks, and both methods against independent float64 loops with hand-written gradients and the same draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec import tree as trees
from taskvec.adaptive import rows as rows_lib
from taskvec.adaptive.coefficients import coefficients
from taskvec.adaptive.concrete import concrete_adamerging, concrete_task_arithmetic
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.masks import concrete, tensor_seeds, uniform
from taskvec.adaptive.merged import merged_apply
from taskvec.io.checkpoints import Checkpoint
from tests.adaptive import mlp_oracle as oracle, toy_models as toy
from tests.adaptive.mlp_oracle import NAMES, ROWS, TASKS

TEMPERATURE = 0.5


@jax.jit
def drawn(key):
    seeds = tensor_seeds({k: jnp.zeros(oracle.SHAPES[k]) for k in NAMES}, key)
    return {k: uniform(seeds[k], oracle.SHAPES[k]) for k in NAMES}


def noises(key):
    """``log u - log(1 - u)`` of the draws that the library makes with this key."""
    u = {k: np.asarray(x, np.float64) for k, x in drawn(key).items()}
    return {k: np.log(x) - np.log1p(-x) for k, x in u.items()}


def draw(a, noise):
    return {k: 1 / (1 + np.exp(-(a[k] + noise[k]) / TEMPERATURE)) for k in NAMES}


def masked(theta0, tau, lam, m):
    """Merged weights, and task vectors under the mask."""
    under = {k: tau[k] * (m[k] / m[k].mean()) for k in NAMES}
    return oracle.merged(theta0, under, lam), under


def by_logits(grads, tau, lam, m):
    out = {}
    for i, k in enumerate(NAMES):
        g = grads[k] * np.tensordot(lam[i % len(lam)], tau[k], 1)
        mean = m[k].mean()
        by_m = g / mean - np.sum(g * m[k]) / (m[k].size * mean**2)
        out[k] = by_m * m[k] * (1 - m[k]) / TEMPERATURE
    return out


def as_tree(values):
    return {k: np.asarray(values[k], np.float64) for k in NAMES}


def close(found, expected, atol=1e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), found, expected)


def test_task_arithmetic_trajectory():
    theta0, tau, kernels, rows = oracle.setting()
    steps, rate, seed = 100, 2e-2, 3
    found = concrete_task_arithmetic(
        oracle.problem(theta0, tau, kernels), rows, steps=steps, learning_rate=rate, per_task=ROWS, seed=seed
    )
    lam, adam = np.full((1, TASKS), 0.3), oracle.Adam(rate)
    a, losses = {k: np.zeros_like(theta0[k]) for k in NAMES}, []
    batches = rows_lib.cyclic(rows, ROWS, seed)
    for step in range(steps):
        m = draw(a, noises(jax.random.fold_in(jax.random.key(seed), step)))
        theta, _ = masked(theta0, tau, lam, m)
        loss, grads, _ = oracle.gradients(theta, batches(step)["x"], kernels, oracle.entropy)
        a = adam.step(a, by_logits(grads, tau, lam, m))
        losses.append(loss)
    close(as_tree(found.learnables["mask"]), a)
    np.testing.assert_allclose(found.history["loss"], losses, rtol=1e-3)
    assert max(np.abs(x).max() for x in a.values()) > 0.5  # it went somewhere
    theta, _ = masked(theta0, tau, lam, draw(a, noises(jax.random.key(seed))))
    close(as_tree(found.params), theta, 1e-3)  # the published result: one draw


def adamerging_oracle(theta0, tau, kernels, rows, groups, steps, second, rate, seed, second_rate, fresh, keep):
    start = {"lam": np.full((groups, TASKS), 0.3)}
    a = {k: np.zeros_like(theta0[k]) for k in NAMES}
    inner, outer, batches, losses = oracle.Adam(1.0), oracle.Adam(rate), rows_lib.cyclic(rows, ROWS, seed), []

    def gradient_by_lam(lam, m, batch):
        theta, under = masked(theta0, tau, np.clip(lam, 0, 1), m)
        loss, grads, _ = oracle.gradients(theta, batch["x"], kernels, oracle.entropy)
        return loss, {"lam": oracle.by_coefficients(grads, under, groups) * ((lam >= 0) & (lam <= 1))}

    for step in range(steps):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
        m = draw(a, noises(keys[0]))
        inner = inner if keep else oracle.Adam(1.0)
        now = inner.step(start, gradient_by_lam(start["lam"], m, batches(2 * step))[1])
        c, m = np.clip(now["lam"], 0, 1), draw(a, noises(keys[int(fresh)]))
        theta, _ = masked(theta0, tau, c, m)
        loss, grads, _ = oracle.gradients(theta, batches(2 * step + 1)["x"], kernels, oracle.entropy)
        a = outer.step(a, by_logits(grads, tau, c, m))
        losses.append(loss)
    fixed = draw(a, noises(jax.random.key(seed)))
    now, adam = (start if second else now), oracle.Adam(second_rate)
    for step in range(second):
        loss, g = gradient_by_lam(now["lam"], fixed, batches(2 * steps + step))
        now = adam.step(now, g)
        losses.append(loss)
    return np.clip(now["lam"], 0, 1), a, losses, masked(theta0, tau, np.clip(now["lam"], 0, 1), fixed)[0]


@pytest.mark.parametrize(
    "mode, second, fresh, keep", [("tensor", 100, True, True), ("task", 0, False, True), ("task", 0, True, False)]
)
def test_adamerging_trajectory(mode, second, fresh, keep):
    theta0, tau, kernels, rows = oracle.setting()
    steps, rate, second_rate, seed = 100, 2e-3, 5e-3, 1
    found = concrete_adamerging(
        oracle.problem(theta0, tau, kernels),
        rows,
        mode=mode,
        fresh_mask=fresh,
        keep_moments=keep,
        steps=steps,
        learning_rate=rate,
        coefficient_steps=second,
        coefficient_learning_rate=second_rate,
        per_task=ROWS,
        seed=seed,
    )
    groups = 4 if mode == "tensor" else 1
    lam, a, losses, theta = adamerging_oracle(
        theta0, tau, kernels, rows, groups, steps, second, rate, seed, second_rate, fresh, keep
    )
    close(as_tree(found.learnables["mask"]), a)
    np.testing.assert_allclose(found.coefficients, lam, atol=1e-4)
    assert keep or set(lam.ravel()) <= {0.0, 1.0}  # 0.3 +- 1, clamped
    np.testing.assert_allclose(found.history["loss"], losses, rtol=2e-3)
    close(as_tree(found.params), theta, 1e-3)
    assert max(np.abs(x).max() for x in a.values()) > 0.05 and np.abs(lam - 0.3).max() > 0.05
    assert found.groups == (NAMES if mode == "tensor" else ("all",))


def test_the_second_stage_is_under_the_mask_of_the_result():
    theta0, tau, kernels, rows = oracle.setting()
    found = concrete_adamerging(
        oracle.problem(theta0, tau, kernels), rows, eval_mask="mean", steps=0, coefficient_steps=10,
        coefficient_learning_rate=1e-2, per_task=ROWS, seed=2,
    )  # fmt: skip
    ones = {k: np.ones_like(theta0[k]) for k in NAMES}  # all logits are alike, and so are all probabilities
    now, adam, batches = {"lam": np.full((4, TASKS), 0.3)}, oracle.Adam(1e-2), rows_lib.cyclic(rows, ROWS, 2)
    for step in range(10):
        theta, under = masked(theta0, tau, now["lam"], ones)
        grads = oracle.gradients(theta, batches(step)["x"], kernels, oracle.entropy)[1]
        now = adam.step(now, {"lam": oracle.by_coefficients(grads, under, 4)})
    np.testing.assert_allclose(found.coefficients, now["lam"], atol=1e-4)


def test_a_killed_run_resumes_in_the_second_stage(tmp_path):
    theta0, tau, kernels, rows = oracle.setting()

    class Killed(Exception):
        pass

    def kill(done, metrics):
        if done >= 9:
            raise Killed

    def run(**watch):
        loop = Loop(chunk=1, **watch)
        problem = oracle.problem(theta0, tau, kernels)
        return concrete_adamerging(problem, rows, steps=4, coefficient_steps=8, per_task=ROWS, loop=loop)

    with Checkpoint(tmp_path, every=3) as checkpoint, pytest.raises(Killed):
        run(checkpoint=checkpoint, on_chunk=kill)
    with Checkpoint(tmp_path, every=3) as checkpoint:
        resumed = run(checkpoint=checkpoint)
    jax.tree.map(np.testing.assert_array_equal, resumed, run())


def test_certain_masks_are_task_arithmetic():
    theta0, tau, kernels, rows = oracle.setting()
    expected = oracle.merged(theta0, tau, np.full((1, TASKS), 0.4))
    base = coefficients(trees.groups(theta0, "task"), TASKS, 0.4, "identity")
    parametrisation = concrete(base, oracle.as_jax(theta0), init=40.0)
    merge = jax.jit(parametrisation.merge)
    merged = merge(oracle.as_jax(theta0), oracle.as_jax(tau), parametrisation.init(), jax.random.key(0))
    close(as_tree(merged), expected, 1e-5)
    problem = oracle.problem(theta0, tau, kernels)
    found = concrete_task_arithmetic(problem, rows, scale=0.4, eval_mask="mean", steps=0)  # all logits are alike
    close(as_tree(found.params), expected, 1e-5)


def test_mean_and_hard_masks_by_formula():
    theta0, tau = {"w": jnp.zeros((2, 2)), "n": jnp.arange(3)}, {"w": jnp.ones((1, 2, 2)), "n": jnp.zeros((1, 3))}
    base = coefficients(trees.groups(theta0, "task"), 1, 0.5, "identity")
    a = np.array([[2.0, -1.0], [-3.0, 0.5]])
    for mask, m in (("mean", 1 / (1 + np.exp(-a))), ("hard", a >= 0)):
        parametrisation = concrete(base, theta0, mask=mask)
        learnables = parametrisation.init() | {"mask": {"w": jnp.asarray(a, jnp.float32), "n": jnp.zeros(())}}
        merged = parametrisation.merge(theta0, tau, learnables)
        np.testing.assert_allclose(merged["w"], 0.5 * m / m.mean(), rtol=1e-6)
        assert (merged["n"] == jnp.arange(3)).all()
    nothing = parametrisation.init() | {"mask": {"w": jnp.full((2, 2), -1.0), "n": jnp.zeros(())}}
    assert (parametrisation.merge(theta0, tau, nothing)["w"] == 0).all()


def test_scanned_equals_whole_and_layouts_draw_alike():
    weights, batch, key = toy.model(0, 2), toy.batch(1, 4), jax.random.key(5)
    base = coefficients(trees.groups(weights[0], "tensor"), 2)
    parametrisation = concrete(base, weights[0])
    rng = np.random.default_rng(2)
    logits = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), weights[0])
    learnables = parametrisation.init() | {"mask": logits}

    def loss(scanned):
        encode = merged_apply(toy.apply, parametrisation, scanned=scanned)
        return lambda learned: jnp.sin(encode(learned, weights, batch, key)["features"]).sum()

    values = [jax.jit(jax.value_and_grad(loss(scanned)))(learnables) for scanned in (True, False)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *values)
    assert max(jnp.abs(g).max() for g in jax.tree.leaves(values[0][1]["mask"])) > 1e-3
    seeds = jax.jit(tensor_seeds)
    a, b = trees.unstack_layers(seeds(weights[0], key)), seeds(trees.unstack_layers(weights[0]), key)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_draws_are_uniform_and_independent_of_other_tensors_keys_and_neighbours():
    theta0, n = {"a": jnp.zeros(1), "b": jnp.zeros(1)}, 200_000
    draws = jax.jit(lambda key: jax.tree.map(lambda s: uniform(s, (n,)), tensor_seeds(theta0, key)))
    first, second = (draws(jax.random.key(i)) for i in (0, 1))
    u = np.stack([np.asarray(x, np.float64) for x in (first["a"], first["b"], second["a"], second["b"])])
    assert u.min() > 0 and u.max() < 1
    np.testing.assert_allclose(np.mean(u, 1), 0.5, atol=4 / np.sqrt(12 * n))
    counts = np.stack([np.histogram(x, 50, (0, 1))[0] for x in u])
    assert (np.square(counts - n / 50).sum(1) / (n / 50) < 49 + 5 * np.sqrt(98)).all()  # chi squared, 49 degrees
    z = (u - 0.5) * np.sqrt(12)
    for lag in (0, 1, 2, 64, 768):
        c = z[:, : n - lag] @ z[:, lag:].T / (n - lag)
        assert np.abs(c - np.eye(4) * (lag == 0)).max() < 5 / np.sqrt(n - lag)


def test_errors():
    theta0, tau, kernels, rows = oracle.setting()
    with pytest.raises(ValueError, match="sample, mean, hard"):
        concrete_task_arithmetic(oracle.problem(theta0, tau, kernels), rows, eval_mask="soft", steps=0)
    with pytest.raises(ValueError, match="inner moves leave the simplex"):
        concrete_adamerging(oracle.problem(theta0, tau, kernels), rows, constraint="simplex", steps=0)
    base = coefficients(trees.groups(theta0, "task"), TASKS)
    parametrisation = concrete(base, oracle.as_jax(theta0))
    with pytest.raises(ValueError, match="needs a key"):
        parametrisation.merge(oracle.as_jax(theta0), oracle.as_jax(tau), parametrisation.init())
