"""Adaptive methods step by step against FusionBench's own loops (recorded by tests/parity/record_adaptive.py).

Its numbers are float64; ours are computed in float32.
"""

import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec import models, tree as trees, vectors
from taskvec.adaptive import masks, rows as rows_lib
from taskvec.adaptive.adamerging import adamerging
from taskvec.adaptive.concrete import concrete_adamerging, concrete_task_arithmetic
from taskvec.adaptive.fit import Evaluate, Loop
from taskvec.adaptive.learn import Problem
from taskvec.io import names, safetensors
from taskvec.modular.surgery import Adapters, surgery
from taskvec.training.heads import make_heads
from tests.adaptive import fusionbench_setting as setting

STEPS, MASK_STEPS, TASKS = setting.STEPS, setting.MASK_STEPS, len(setting.TASKS)
SHAPES = setting.shapes()
ENTROPY = {"entropy_eps": 1e-8}
# A bias of all keys shifts a query's scores alike and softmax takes it out: its gradient is rounding error, which Adam
# makes a step of.
MOVED = np.array(["k_proj.bias" not in name for name in SHAPES])


@functools.cache
def recorded():
    with np.load(pathlib.Path(__file__).parent / "recorded" / "fusionbench.npz") as file:
        out = dict(file)
    assert list(out["names"]) == list(SHAPES)
    np.testing.assert_allclose(setting.checksum(), out["checksum"], rtol=1e-9, err_msg="numpy draws other numbers")
    return out


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The model's table of names, and what is merged."""
    folder = tmp_path_factory.mktemp("tower")
    config = {**setting.CONFIG, "model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.save(folder / "model.safetensors", setting.weights())
    model, theta0 = models.load(folder)
    tau = vectors.task_vectors(theta0, [as_tree(model.table, setting.weights(t)) for t in range(TASKS)])
    heads = make_heads([setting.text(t).T for t in range(TASKS)], setting.SCALE)

    def apply_fn(params, batch, **options):
        return {"features": model.apply(params, batch, **options)["features"] @ setting.projection().T}

    return model.table, Problem(apply_fn, theta0, tau, heads, scanned=True)


def as_tree(table, tensors):
    return trees.stack_layers(names.to_paths(table, tensors))


def batch(step):
    images = np.concatenate([setting.images(t, step) for t in range(TASKS)])
    return {"image": images.transpose(0, 2, 3, 1)}


ROWS = rows_lib.arrays([{"image": np.zeros((1, 1))}] * TASKS)  # never looked at: the recorded batches stand in


@pytest.fixture
def same_batches(monkeypatch):
    monkeypatch.setitem(sys.modules["taskvec.adaptive.adamerging"].ORDERS, "anew", lambda *_: batch)
    monkeypatch.setattr(sys.modules["taskvec.adaptive.concrete"], "cyclic", lambda *_: batch)


def by_tensor(given, coefficients):
    """``[G, T] -> [T, P]`` in the order of FusionBench, ``[T]`` for one group."""
    table, problem = given
    if len(coefficients) == 1:
        return coefficients[0]
    groups = trees.groups(problem.theta0, "tensor")
    spread = lambda x, ids: np.broadcast_to(np.reshape(ids, np.shape(ids) + (1,) * (x.ndim - np.ndim(ids))), x.shape)
    number = names.to_names(table, jax.tree.map(spread, problem.theta0, groups.ids))
    return coefficients[np.array([number[name].flat[0] for name in SHAPES])].swapaxes(0, 1)


def trajectory(method, given, **settings):
    """What was learned; after every step, coefficients ``[STEPS, T, P]`` and probed logits ``[STEPS, P, PROBES]``."""
    loop = Loop(chunk=1, evaluate=Evaluate(1, lambda _, found: (found.coefficients, found.learnables.get("mask"))))
    found = method(given[1], ROWS, **settings, loop=loop)
    coefficients, logits = zip(*(found.evaluations[i + 1] for i in range(STEPS)), strict=True)
    if coefficients[0] is not None:
        coefficients = np.moveaxis(by_tensor(given, np.stack(coefficients, -1)), -1, 0)
    if logits[0] is not None:
        logits = np.stack([setting.probed(names.to_names(given[0], x)) for x in logits])
    return found, coefficients, logits


def close(found, expected, atol, what):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol, err_msg=what)


def same_model(table, found, expected, atol):
    close(setting.probed(names.to_names(table, found.params))[MOVED], expected[MOVED], atol, "merged weights")


@pytest.mark.parametrize("mode, name", [("tensor", "layer_wise"), ("task", "task_wise")])
def test_adamerging(given, same_batches, mode, name):
    how = {"mode": mode, "constraint": "identity", "steps": STEPS, "learning_rate": setting.RATE, **ENTROPY}
    found, coefficients, _ = trajectory(adamerging, given, **how)
    expected = recorded()[f"{name}_coefficients"]
    close(found.history["objective"], recorded()[f"{name}_losses"], 1e-4, "losses")
    pick = MOVED if mode == "tensor" else slice(None)
    for step in range(STEPS):
        close(coefficients[step][..., pick], expected[step + 1][..., pick], 1e-4, f"coefficients after step {step}")
    same_model(given[0], found, recorded()[f"{name}_merged"], 1e-4)
    assert np.abs(expected[-1] - 0.3).max() > 0.05
    close(expected[..., ~MOVED] if mode == "tensor" else 0.3, 0.3, 1e-4, "keys' biases in FusionBench's float64")


@pytest.fixture
def same_draws(monkeypatch, given):
    """``keys -> None``: the i-th of the keys makes a mask from FusionBench's i-th uniforms."""

    def inject(keys):
        each = [as_tree(given[0], setting.uniforms(i)) for i in range(len(keys))]
        uniforms = jax.tree.map(lambda *x: np.stack(x), *each)
        known = np.stack([jax.random.key_data(key) for key in keys])

        def tensor_seeds(_, key):
            at = jnp.argmax((jax.random.key_data(key) == known).all(1))
            return jax.tree.map(lambda x: jnp.asarray(x)[at], uniforms)

        monkeypatch.setattr(masks, "tensor_seeds", tensor_seeds)
        monkeypatch.setattr(masks, "uniform", lambda uniforms, shape: uniforms)

    return inject


def test_concrete_task_arithmetic(given, same_batches, same_draws):
    key = jax.random.key(0)
    same_draws([*(jax.random.fold_in(key, step) for step in range(STEPS)), key])
    how = {"scale": 0.3, "steps": STEPS, "learning_rate": setting.MASK_RATE, **ENTROPY}
    found, _, logits = trajectory(concrete_task_arithmetic, given, **how)
    expected = recorded()["concrete_ta_logits"]
    close(found.history["objective"], recorded()["concrete_ta_losses"], 1e-4, "losses")
    for step in range(STEPS):
        close(logits[step][MOVED], expected[step + 1][MOVED], 1e-4, f"logits after step {step}")
    same_model(given[0], found, recorded()["concrete_ta_merged"], 1e-4)
    assert np.abs(expected[-1]).max() > 0.3


def test_concrete_adamerging(given, same_batches, same_draws):
    key = jax.random.key(0)
    same_draws([*(jax.random.split(jax.random.fold_in(key, step))[0] for step in range(MASK_STEPS)), key])
    how = {"constraint": "identity", "steps": MASK_STEPS, "learning_rate": setting.MASK_RATE, "fresh_mask": False}
    how |= {"stale_gradient": True, "coefficient_steps": STEPS - MASK_STEPS, **ENTROPY}
    how |= {"coefficient_learning_rate": setting.RATE, "inner_learning_rate": setting.INNER_RATE}
    whole = given[0], given[1]._replace(scanned=False)  # compiles in two thirds of the time
    found, coefficients, logits = trajectory(concrete_adamerging, whole, **how)
    out = recorded()
    # FusionBench's rounds over the tasks: two in a step of the first stage, one in the second.
    second = [*range(1, 2 * MASK_STEPS, 2), *range(2 * MASK_STEPS, MASK_STEPS + STEPS)]
    after = [i + (i >= 2 * MASK_STEPS) for i in second]
    close(found.history["objective"], out["concrete_ada_losses"][second], 1e-4, "losses")
    for step in range(STEPS):
        mine, theirs = coefficients[step], out["concrete_ada_coefficients"][after[step]]
        close(mine[:, MOVED], theirs[:, MOVED], 1e-4, f"coefficients after step {step}")
        mine, theirs = logits[step], out["concrete_ada_logits"][min(step + 1, MASK_STEPS)]
        close(mine[MOVED], theirs[MOVED], 5e-4, f"logits after step {step}")
    same_model(given[0], found, out["concrete_ada_merged"], 1e-4)


class Kept:
    """In place of a checkpoint: remembers the learnables of every step."""

    def __init__(self):
        self.learnables = []

    def restore(self, state):
        return None

    def should_save(self, step):
        return True

    def save(self, step, state):
        self.learnables.append(jax.tree.map(np.array, state["state"].learnables))


def test_surgery(given, monkeypatch):
    module = sys.modules["taskvec.modular.surgery"]
    steps = [np.concatenate([setting.images(t, s) for s in range(STEPS)]).transpose(0, 2, 3, 1) for t in range(TASKS)]
    rows = rows_lib.arrays([{"image": images} for images in steps])
    numbers = lambda step: np.tile(step * setting.ROWS + np.arange(setting.ROWS), (TASKS, 1)).astype(np.int32)
    make_fit = module.make_fit

    def with_batches(*args, **how):
        run = make_fit(*args, **how)
        return lambda start, _, count, **more: run(start, numbers, count, **more)

    def start(merged, rank, center, seed):
        up = jnp.zeros((TASKS, setting.CONFIG["projection_dim"], rank))
        return Adapters(jnp.asarray(setting.down()), up, jnp.zeros_like(up[..., 0]), jnp.ones(TASKS))

    monkeypatch.setattr(module, "make_fit", with_batches)
    monkeypatch.setattr(module, "init_adapters", start)
    kept = Kept()
    how = {"rank": setting.RANK, "normalise": True, "steps": STEPS, "loop": Loop(chunk=1, checkpoint=kept)}
    found = surgery(given[1], rows, **how)
    close(found.history["l1"], recorded()["surgery_losses"], 1e-6, "losses")
    for step, learnables in enumerate(kept.learnables):
        for part in ("down", "up"):
            close(learnables[part], recorded()[f"surgery_{part}"][step + 1], 1e-4, f"{part} after step {step}")
    assert len(kept.learnables) == STEPS and np.abs(found.learnables["up"]).max() > 0.01
    z = np.random.default_rng(0).normal(size=(5, setting.CONFIG["projection_dim"]))
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    down, up = (recorded()[f"surgery_{part}"][-1][1] for part in ("down", "up"))
    close(found.merged.features_for(1, z), unit - np.maximum(unit @ down.T, 0) @ up.T, 1e-4, "corrected features")
