"""SurgeryV2 against a float64 loop, one task after the other, with gradients by hand; on a CLIP tower by identities."""

import pathlib

import jax
import numpy as np
import pytest

import taskvec as tv
from taskvec import models
from taskvec.adaptive import registry, rows as rows_lib
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.learn import Problem
from taskvec.evaluation.evaluate import evaluate
from taskvec.modular.results import per_task, static
from taskvec.training.heads import make_heads
from tests.modular import blocks_for_tests as toy

RANK, ROWS, STEPS = 3, 4, 25
CLIP = pathlib.Path(__file__).parent.parent / "models" / "recorded" / "clip_tower"


def surgery_v2(problem, rows, **settings):
    return registry.get("surgery_v2")(problem, rows, rank=RANK, per_task=ROWS, **settings)


def forward(theta, adapters, x, mask):
    """Block by block: (tokens before, after tanh, before the correction, hidden units, corrected); then features."""
    x, trace = x @ theta["embed"], []
    weight = (mask / mask.sum(1, keepdims=True))[..., None]
    for layer in range(toy.LAYERS):
        h = np.tanh(x @ theta["blocks"]["w"][layer] + theta["blocks"]["b"][layer])
        y = x + h
        down, up = adapters["down"][layer], adapters["up"][layer]
        a = np.maximum(y @ down.T, 0)
        trace.append((x, h, y, a, weight))
        x = y - a @ up.T
        trace[-1] += ((x * weight).sum(1),)
    z = trace[-1][-1] @ theta["project"]
    hidden = np.maximum(z @ adapters["feature_down"].T, 0)
    return trace, z, hidden, z - hidden @ adapters["feature_up"].T


def gradients(theta, adapters, x, mask, target_means, target_z):
    trace, z, hidden, out = forward(theta, adapters, x, mask)
    grads = {k: np.zeros_like(v) for k, v in adapters.items()}
    loss = np.abs(out - target_z).mean()
    g = np.sign(out - target_z) / out.size
    grads["feature_up"] = -g.T @ hidden
    g_pre = -(g @ adapters["feature_up"]) * (hidden > 0)
    grads["feature_down"] = g_pre.T @ z
    g_mean = (g + g_pre @ adapters["feature_down"]) @ theta["project"].T
    g_x = g_mean[:, None] * trace[-1][4]
    for layer in reversed(range(toy.LAYERS)):
        x, h, y, a, weight, mean = trace[layer]
        loss += np.abs(mean - target_means[layer]).mean()
        g = g_x + (np.sign(mean - target_means[layer]) / mean.size)[:, None] * weight
        grads["up"][layer] = -np.einsum("bnd,bnr->dr", g, a)
        g_pre = -(g @ adapters["up"][layer]) * (a > 0)
        grads["down"][layer] = np.einsum("bnr,bnd->rd", g_pre, y)
        g_y = g + g_pre @ adapters["down"][layer]
        g_x = g_y + (g_y * (1 - h**2)) @ theta["blocks"]["w"][layer].T
    return loss, grads


def oracle(start, theta0, tau, rows, steps, seed, rate):
    merged = toy.add(theta0, jax.tree.map(np.add, *[toy.select(tau, t) for t in range(toy.TASKS)]), 0.3)
    batches, found, losses = rows_lib.together(rows, ROWS, seed), [], np.zeros(steps)
    zero = {"down": np.zeros((toy.LAYERS, 1, toy.WIDTH)), "up": np.zeros((toy.LAYERS, toy.WIDTH, 1))}
    zero |= {"feature_down": np.zeros((1, toy.FEATURES)), "feature_up": np.zeros((toy.FEATURES, 1))}
    for t in range(toy.TASKS):
        own = toy.add(theta0, toy.select(tau, t))
        adapters = {k: np.array(v[:, t], np.float64) for k, v in start["blocks"].items()}
        adapters |= {f"feature_{k}": np.array(v[t], np.float64) for k, v in start["features"].items()}
        m, v = ({k: np.zeros_like(x) for k, x in adapters.items()} for _ in range(2))
        for step in range(steps):
            here = slice(t * ROWS, (t + 1) * ROWS)
            x, mask = (batches(step)[k][here].astype(np.float64) for k in ("x", "mask"))
            trace, _, _, target = forward(own, zero, x, mask)
            loss, grads = gradients(merged, adapters, x, mask, [each[-1] for each in trace], target)
            losses[step] += loss
            for k, g in grads.items():
                m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g**2
                adapters[k] -= (
                    rate * (m[k] / (1 - 0.9 ** (step + 1))) / (np.sqrt(v[k] / (1 - 0.999 ** (step + 1))) + 1e-8)
                )
        found.append(adapters)
    return found, losses


def test_trajectory():
    theta0, tau, rows, problem = toy.setting()
    begin = surgery_v2(problem, rows, steps=0, seed=3)
    start = begin.learnables
    found = surgery_v2(problem, rows, steps=STEPS, seed=3, learning_rate=1e-2)
    expected, losses = oracle(start, theta0, tau, rows, STEPS, 3, 1e-2)
    np.testing.assert_allclose(found.history["loss"], losses, rtol=1e-4)
    assert losses[-1] < 0.9 * losses[0]
    for t, adapters in enumerate(expected):
        for name in ("down", "up"):
            np.testing.assert_allclose(found.learnables["blocks"][name][:, t], adapters[name], atol=1e-4)
            np.testing.assert_allclose(found.learnables["features"][name][t], adapters[f"feature_{name}"], atol=1e-4)
    x, mask = rows.take(1, np.arange(3)).values()
    mine = jax.jit(found.merged.apply_fn)(found.merged.params_for(1), {"x": x, "mask": mask})["features"]
    merged = toy.add(theta0, jax.tree.map(np.add, *[toy.select(tau, t) for t in range(toy.TASKS)]), 0.3)
    np.testing.assert_allclose(mine, forward(merged, expected[1], x, mask)[-1], atol=1e-4)
    # At the start nothing is corrected.
    mine = jax.jit(begin.merged.apply_fn)(begin.merged.params_for(1), {"x": x, "mask": mask})["features"]
    np.testing.assert_allclose(mine, toy.apply_fn(toy.as_jax(merged), {"x": x, "mask": mask})["features"], atol=1e-6)


def test_a_tower_comes_closer_to_its_experts_by_evaluation():
    model, theta0 = models.load(CLIP)
    rng = np.random.default_rng(0)
    noisy = lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32)
    experts = [jax.tree.map(noisy, theta0) for _ in range(2)]
    average = jax.tree.map(lambda a, b: (a + b) / 2, *experts)
    images = rng.normal(size=(2, ROWS, 24, 24, 3)).astype(np.float32)
    heads = make_heads([np.eye(32, 4)] * 2)
    problem = Problem(model.apply, theta0, tv.task_vectors(theta0, experts), heads, scanned=True)
    found = surgery_v2(
        problem, rows_lib.arrays([{"image": x} for x in images]), on=average, steps=20, learning_rate=1e-2
    )
    assert found.learnables["blocks"]["down"].shape == (3, 2, RANK, 32) and found.params is average
    batches = [[{"image": x, "label": np.zeros(ROWS, int), "index": np.arange(ROWS)}] for x in images]
    scores = {
        name: np.stack(evaluate(model.apply, merged, batches, heads).outputs)
        for name, merged in {"experts": per_task(experts), "average": static(average), "found": found.merged}.items()
    }
    distance = {name: np.abs(z - scores["experts"]).mean() for name, z in scores.items()}
    assert 0 < distance["found"] < 0.8 * distance["average"]


def test_errors():
    _, _, rows, problem = toy.setting()
    with pytest.raises(ValueError, match="scanned=True"):
        surgery_v2(problem._replace(scanned=False), rows)
    for field, value in {"evaluate": object(), "pieces": 2}.items():
        with pytest.raises(ValueError, match=f"surgery_v2 takes no Loop.{field}="):
            surgery_v2(problem, rows, loop=Loop(**{field: value}))
    with pytest.raises(ValueError, match="emr gives one model per task"):
        surgery_v2(problem, rows, on="emr")
    towers = {"text": problem.theta0, "vision": problem.theta0}
    with pytest.raises(ValueError, match=r"text/blocks, vision/blocks .*load a tower"):
        surgery_v2(problem._replace(theta0=towers), rows)
