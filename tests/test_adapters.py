"""Modules of flax as functions, there and back; the programs of docs/own_model.md run as they stand."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import taskvec as tv
from taskvec import tree as trees
from taskvec.adapters import from_linen, from_nnx

pytest.importorskip("flax")
from flax import linen as nn, nnx

PAGE = pathlib.Path(__file__).parents[1].joinpath("docs/own_model.md").read_text(encoding="utf-8")
SECTIONS = {
    title: "".join(re.findall(r"```python\n(.*?)```", text, re.S))
    for title, text in re.findall(r"\n## (.*?)\n(.*?)(?=\n## |\Z)", PAGE, re.S)
}
X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


def test_nnx_program(capsys):
    found = {}
    exec(compile(SECTIONS["flax.nnx"], "own_model.md", "exec"), found)
    theta0, experts, merged = found["theta0"], found["experts"], found["merged"]
    assert set(trees.flatten(theta0)) >= {"layers/0/kernel", "layers/1/bias", "norm/scale"}
    np.testing.assert_allclose(found["features"], found["apply_fn"](merged, {"x": found["probes"][0]["x"]})["features"])
    far = lambda a, b: np.abs(a - b).max() > 1e-3
    changed = lambda params: any(jax.tree.leaves(jax.tree.map(far, params, theta0)))
    assert changed(merged) and changed(experts[0]) and changed(found["found"].params)
    np.testing.assert_array_equal(found["model"].layers[1].kernel[...], merged["layers"]["1"]["kernel"])
    assert found["found"].coefficients.shape == (6, 2) and "layers/0/kernel" in capsys.readouterr().out
    assert np.abs(found["found"].coefficients - 0.3).max() > 1e-3
    np.testing.assert_array_equal(found["pretrained"].layers[0].kernel[...], theta0["layers"]["0"]["kernel"])


def test_linen_program():
    found = {}
    exec(compile(SECTIONS["flax.linen"], "own_model.md", "exec"), found)
    assert set(found["theta0"]) == {"blocks"}
    same = found["apply_fn"](found["merged"], {"x": found["x"]})["features"]
    np.testing.assert_allclose(found["outputs"], same, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, found["back"](found["theta0"]), found["variables"])
    # Layers are seen one by one: an SVD method treats each [8, 8], not the stack.
    whole = tv.merge("tsv_m", found["theta0"], found["experts"])
    alone = lambda params: trees.unstack_layers(params)
    by_layer = tv.merge("tsv_m", alone(found["theta0"]), [alone(p) for p in found["experts"]])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone(whole), by_layer)


class Noisy(nnx.Module):
    """Everything that is state but no parameter."""

    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(8, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.dense(x)))


def test_a_training_module_can_be_traced_and_keeps_its_state():
    module = Noisy(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))
    apply_fn, params, back = from_nnx(module, lambda module, batch: {"features": module(batch), "more": batch})
    assert set(trees.flatten(params)) == {"dense/kernel", "dense/bias", "norm/scale", "norm/bias"}
    grads = jax.jit(jax.grad(lambda p: jnp.square(apply_fn(p, X)["features"]).sum()))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    after = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    doubled = back(jax.tree.map(lambda x: 2 * x, params))
    np.testing.assert_array_equal(doubled.dense.kernel[...], 2 * module.dense.kernel[...])


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))


def test_linen_collections_stay_apart():
    module = Normed()
    variables = module.init(jax.random.key(0), X, train=False)
    apply_fn, params, back = from_linen(module, variables, lambda module, batch: module(batch, train=False))
    assert set(params) == {"Dense_0", "BatchNorm_0"}
    np.testing.assert_allclose(
        jax.jit(apply_fn)(params, X)["features"], module.apply(variables, X, train=False), atol=1e-6
    )
    assert back(params).keys() == {"params", "batch_stats"}


class Misnamed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Sequential([nn.Dense(4), nn.Dense(3)], name="body")(nn.Dense(5, name="blocks")(x))


def test_names_that_mean_something_else():
    module = Misnamed()
    variables = module.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="a submodule named 'blocks'"):
        from_linen(module, variables, lambda m, x: m(x))
    with pytest.raises(ValueError, match="no submodule 'layers'"):
        from_linen(module, variables, lambda m, x: m(x), stacked="layers")
