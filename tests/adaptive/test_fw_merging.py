"""Frank-Wolfe merging against a float64 loop on a small network, with gradients by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec.adaptive import rows as rows_lib
from taskvec.adaptive.fit import FitDiverged, Loop
from taskvec.adaptive.fw_merging import fw_hard, fw_soft
from taskvec.adaptive.learn import Problem
from taskvec.adaptive.masks import tensor_seeds, uniform
from taskvec.training.heads import make_heads
from tests.adaptive.test_adamerging import entropy_and_gradient
from tests.modular import blocks_for_tests as toy

POOL, D_IN, HIDDEN, D, SCALE, SHOTS, ROWS = 5, 5, 7, 6, 20.0, 9, 4
NAMES = ("b1", "b2", "w1", "w2")
SHAPES = {"b1": (HIDDEN,), "b2": (D,), "w1": (D_IN, HIDDEN), "w2": (HIDDEN, D)}
CLASSES = (4, 2, 3)


def apply_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w1"] + params["b1"][None])
    return {"features": hidden @ params["w2"] + params["b2"][None]}


def setting(seed=0):
    rng = np.random.default_rng(seed)
    theta0 = {k: rng.normal(0, 0.7, SHAPES[k]) for k in NAMES}
    tau = {k: rng.normal(0, 0.5, (POOL, *SHAPES[k])) for k in NAMES}
    kernels = [rng.normal(size=(D, c)) for c in CLASSES]
    kernels = [k / np.linalg.norm(k, axis=0) for k in kernels]
    counts = (11, 9, 30)
    inputs = [{"x": rng.normal(size=(n, D_IN)).astype(np.float32)} for n in counts]
    labels = [rng.integers(0, c, n) for c, n in zip(CLASSES, counts, strict=True)]
    as_jax = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    problem = Problem(apply_fn, as_jax(theta0), as_jax(tau), make_heads(kernels, SCALE), scanned=False)
    return theta0, tau, kernels, rows_lib.arrays(inputs, labels), problem


def cross_entropy(theta, x, labels, kernel):
    """Mean loss of one task, and its gradient by every weight."""
    h = np.tanh(x @ theta["w1"] + theta["b1"])
    z = h @ theta["w2"] + theta["b2"]
    norm = np.linalg.norm(z, axis=1, keepdims=True)
    unit = z / norm
    logits = SCALE * unit @ kernel
    e = np.exp(logits - logits.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    loss = -np.log(p[np.arange(len(x)), labels]).mean()
    p[np.arange(len(x)), labels] -= 1
    d_unit = SCALE * (p / len(x)) @ kernel.T
    dz = (d_unit - unit * (unit * d_unit).sum(1, keepdims=True)) / norm
    dh = (dz @ theta["w2"].T) * (1 - h**2)
    return loss, {"b1": dh.sum(0), "b2": dz.sum(0), "w1": x.T @ dh, "w2": h.T @ dz}


def proxy(theta, rows, kernels, task, seed, i):
    numbers = np.random.default_rng([seed, i, task]).permutation(rows.counts[task])[:SHOTS]
    x = rows.take(task, numbers)["x"].astype(np.float64)
    return cross_entropy(theta, x, rows.labels[task][numbers], kernels[task])


def score(g, s, measure):
    inner = (g * s).sum()
    return inner if measure == "inner" else inner / np.linalg.norm(g) / np.linalg.norm(s)


@pytest.mark.parametrize(
    "granularity, point, measure",
    [("model", "weights", "cosine"), ("tensor", "vectors", "cosine"), ("model", "vectors", "inner")],
)
def test_hard_trajectory(granularity, point, measure):
    theta0, tau, kernels, rows, problem = setting()
    run = lambda **how: fw_hard(
        problem, rows, rounds=8, scale=0.7, step_size=1.0, shots=SHOTS, batch_size=4, seed=1, **how
    )
    found = run(granularity=granularity, point=point, measure=measure)
    theta = {k: theta0[k] + 0.3 * tau[k].sum(0) for k in NAMES}
    pool = [{k: theta0[k] + tau[k][t] for k in NAMES} for t in range(POOL)] + [dict(theta), theta0]
    losses, picks = [], []
    for i in range(8):
        each = [proxy(theta, rows, kernels, t, 1, i) for t in range(3)]
        losses.append(np.mean([loss for loss, _ in each]))
        g = {k: sum(grads[k] for _, grads in each) / 3 for k in NAMES}
        shift = {k: theta0[k] if point == "vectors" else 0 for k in NAMES}
        table = np.array([[score(g[k], s[k] - shift[k], measure) for k in NAMES] for s in pool[:-1]])
        if granularity == "model":
            chosen = [int(table.sum(1).argmin())] * len(NAMES)
        else:
            chosen = [int(c.argmin()) if c.min() < 0 else POOL + 1 for c in table.T]
        eta = 0.7 * 2 / (i + 2)
        theta = {k: theta[k] + eta * (pool[c][k] - theta[k]) for k, c in zip(NAMES, chosen, strict=True)}
        picks.append(chosen)
    np.testing.assert_array_equal(found.history["chosen"], picks)
    assert len(np.unique(picks)) > 1
    np.testing.assert_allclose(found.history["loss"], losses, rtol=1e-4)
    for k in NAMES:
        np.testing.assert_allclose(found.params[k], theta[k], atol=1e-5)
    for row, k in zip(found.coefficients, NAMES, strict=True):
        np.testing.assert_allclose(theta0[k] + np.tensordot(row, tau[k], 1), theta[k], atol=1e-5)


@pytest.mark.parametrize("merge", ["ties", "dare_ties"])
def test_hard_steps_by_ties(merge):
    theta0, tau, kernels, rows, problem = setting()
    how = {"merge": merge, "density": 0.3, "scale": 0.9, "step_size": 1.0, "start": 0.6, "granularity": "tensor"}
    seen = []
    watch = Loop(on_start=seen.append, on_chunk=lambda step, metrics: seen.append(step))
    found = fw_hard(problem, rows, rounds=8, shots=SHOTS, batch_size=4, seed=1, point="vectors", loop=watch, **how)
    flat = lambda tree: np.concatenate([tree[k].reshape(-1) for k in NAMES])
    n = flat(theta0).size

    def trimmed(vector):
        least = np.sort(np.abs(vector))[n - int(0.3 * n) - 1]  # the released code's: one entry more
        return np.where(np.abs(vector) >= least, vector, 0)

    def moved(theta, vector, eta):
        at = np.cumsum([0, *(theta[k].size for k in NAMES)])
        return {k: theta[k] + eta * vector[i:j].reshape(theta[k].shape) for k, i, j in zip(NAMES, at, at[1:])}  # noqa: B905

    def thinned(tau, i):
        """The draws are the library's own; test_concrete.py says that they are uniform."""
        if merge == "ties":
            return tau
        seeds = tensor_seeds(tau, jax.random.fold_in(jax.random.key(1), i))
        keep = {k: np.asarray(uniform(seeds[k], tau[k].shape)) < 0.3 for k in NAMES}
        return {k: np.where(keep[k], tau[k] / 0.3, 0) for k in NAMES}

    few = thinned(tau, 0)
    kept = np.stack([trimmed(flat({k: few[k][t] for k in NAMES})) for t in range(POOL)])
    agreeing = np.where(np.sign(kept) == np.sign(kept.sum(0)), kept, 0)
    theta = moved(theta0, agreeing.sum(0) / np.maximum((agreeing != 0).sum(0), 1), 0.6)
    pool = [{k: theta0[k] + tau[k][t] for k in NAMES} for t in range(POOL)] + [theta, theta0]
    picks = []
    for i in range(8):
        each = [proxy(theta, rows, kernels, t, 1, i)[1] for t in range(3)]
        g = {k: sum(grads[k] for grads in each) / 3 for k in NAMES}
        table = np.array([[score(g[k], s[k] - theta0[k], "cosine") for k in NAMES] for s in pool[:-1]])
        chosen = [int(c.argmin()) if c.min() < 0 else POOL + 1 for c in table.T]
        vertex = {k: pool[c][k] for k, c in zip(NAMES, chosen, strict=True)}
        few = thinned({k: (vertex[k] - theta[k])[None] for k in NAMES}, i + 1)
        theta = moved(theta, trimmed(flat(few)), 0.9 * 2 / (i + 2))
        picks.append(chosen)
    np.testing.assert_array_equal(found.history["chosen"], picks)
    assert POOL in np.array(picks) and len(np.unique(picks)) > 2
    for k in NAMES:
        np.testing.assert_allclose(found.params[k], theta[k], atol=1e-5)
    assert found.coefficients is None and seen == [8, *range(1, 9)]


def soft_oracle(theta0, tau, kernels, rows, granularity, rounds, steps, rate, seed):
    theta, batches, losses, picks = dict(theta0), rows_lib.together(rows, ROWS, seed), [], []
    for i in range(rounds):
        used, chosen = {k: [] for k in NAMES}, []
        for task in range(3):
            _, g = proxy(theta, rows, kernels, task, seed, i)
            table = np.array([[score(g[k], theta0[k] + tau[k][t], "cosine") for k in NAMES] for t in range(POOL)])
            if granularity == "model":
                table = np.repeat(table.sum(1, keepdims=True), len(NAMES), 1)
            for j, k in enumerate(NAMES):
                table[used[k], j] = np.inf
            chosen.append(table.argmin(0))
            [used[k].append(c) for k, c in zip(NAMES, chosen[-1], strict=True)]
        points = {k: np.stack([theta0[k] + tau[k][c[j]] - theta[k] for c in chosen]) for j, k in enumerate(NAMES)}
        lam = np.full((len(NAMES), 3), 1e-8 if i else 0.3)
        m, v = np.zeros_like(lam), np.zeros_like(lam)
        for step in range(steps):
            now = {k: theta[k] + np.tensordot(lam[j], points[k], 1) for j, k in enumerate(NAMES)}
            x = batches(i * steps + step)["x"].astype(np.float64)
            loss, grads = entropy_and_gradient(now, x, kernels, SCALE)
            g = np.array([[np.sum(grads[k] * s) for s in points[k]] for k in NAMES])
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            lam = lam - rate * (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
            losses.append(loss)
        theta = {k: theta[k] + np.tensordot(lam[j], points[k], 1) for j, k in enumerate(NAMES)}
        picks.append(chosen)
    return theta, losses, np.array(picks)


@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_soft_trajectory_by_one_program(granularity, caplog):
    theta0, tau, kernels, rows, problem = setting()
    compiled = lambda: sum(record.message.startswith("Compiling") for record in caplog.records)
    seen = []
    watch = Loop(chunk=12, on_chunk=lambda step, metrics: seen.append((step, compiled())))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        found = fw_soft(
            problem, rows, rounds=3, steps=12, shots=SHOTS, learning_rate=5e-3, per_task=ROWS,
            granularity=granularity, seed=1, loop=watch,
        )  # fmt: skip
    theta, losses, picks = soft_oracle(theta0, tau, kernels, rows, granularity, 3, 12, 5e-3, 1)
    assert [step for step, _ in seen] == [12, 24, 36] and seen[0][1] == seen[1][1] == seen[2][1] > 0
    np.testing.assert_array_equal(found.history["chosen"], picks)
    assert len({tuple(sorted(p[:, 0])) for p in picks}) > 1 or granularity == "tensor"
    np.testing.assert_allclose(found.history["loss"], losses, rtol=1e-3)
    for j, k in enumerate(NAMES):
        np.testing.assert_allclose(found.params[k], theta[k], atol=2e-4)
        np.testing.assert_allclose(theta0[k] + np.tensordot(found.coefficients[j], tau[k], 1), theta[k], atol=2e-4)


def test_merging_layer_by_layer_gives_the_same():
    _, _, rows, problem = toy.setting()
    run = lambda scanned, **how: fw_soft(
        problem._replace(scanned=scanned), rows, rounds=2, steps=4, per_task=4, learning_rate=1e-2, shots=4, **how
    )
    whole, layered = (run(scanned, granularity="tensor", objective="cross_entropy") for scanned in (False, True))
    np.testing.assert_allclose(whole.coefficients, layered.coefficients, atol=1e-5)
    np.testing.assert_array_equal(whole.history["chosen"], layered.history["chosen"])
    assert whole.coefficients.shape == (2 + 2 * toy.LAYERS, 2) and len(np.unique(whole.history["chosen"])) == 2
    assert np.abs(whole.coefficients - 0.3).max() > 0.02


def test_without_rounds_it_is_the_start():
    theta0, tau, _, rows, problem = setting()
    for found, share in ((fw_hard(problem, rows, rounds=0), 0.3), (fw_soft(problem, rows, rounds=0), 0.0)):
        for k in NAMES:
            np.testing.assert_allclose(found.params[k], theta0[k] + share * tau[k].sum(0), atol=1e-6)
        np.testing.assert_allclose(found.coefficients, share, rtol=1e-6)


def test_what_is_not_finite_chooses_no_model():
    """In weights, by a loss alone, and in a gradient alone, which the cosine of a NaN must not hide."""
    _, _, _, rows, problem = setting()
    poisoned = problem._replace(theta0={**problem.theta0, "b2": problem.theta0["b2"].at[1].set(np.nan)})

    def steep(params, batch):
        out = apply_fn(params, batch)["features"]
        return {
            "features": out + jnp.sqrt(jnp.square(params["b1"] - params["b1"]).sum())
        }  # a slope of 0 times infinity

    for method in (fw_hard, fw_soft):
        with pytest.raises(FitDiverged, match="step 0: metrics loss") as caught:
            method(poisoned, rows, rounds=2, shots=4)
        assert caught.value.step == 0
    with pytest.raises(FitDiverged, match="step 0: gradients of b1"):
        fw_hard(problem._replace(apply_fn=steep), rows, rounds=2, shots=4)


def test_errors():
    _, _, _, rows, problem = setting()
    with pytest.raises(ValueError, match="need labels"):
        fw_hard(problem, rows._replace(labels=None))
    with pytest.raises(ValueError, match="rows of 2 tasks but heads of 3"):
        fw_soft(problem, rows.only([0, 1]))
    with pytest.raises(ValueError, match="model, tensor"):
        fw_hard(problem, rows, granularity="layer")
    with pytest.raises(ValueError, match="task_arithmetic, ties, dare_ties"):
        fw_hard(problem, rows, merge="dare")
    for method in (fw_hard, fw_soft):
        for field, value in {"evaluate": object(), "pieces": 2}.items():
            with pytest.raises(ValueError, match=f"takes no Loop.{field}=....: it goes round by round"):
                method(problem, rows, loop=Loop(**{field: value}))
    with pytest.raises(ValueError, match=r"fw_hard takes no Loop.place="):
        fw_hard(problem, rows, loop=Loop(place=object()))
    with pytest.raises(ValueError, match="entropy, cross_entropy"):
        fw_soft(problem, rows, objective="kl")
