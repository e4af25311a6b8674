"""Linearised models and low-rank factors, on a scanned model of the library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec import models, tree as trees
from taskvec.io import peft
from taskvec.io.folders import open_model
from taskvec.training import heads, lora
from taskvec.training.finetune import make_finetune, weights_of
from taskvec.training.recipes import Recipe
from taskvec.training.trainable import attention_only, linearised, tangent
from tests.adaptive import toy_models

FOLDER = "tests/models/recorded"
PICTURES = np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def test_a_linearised_model_is_affine_and_touches_the_model(x64):
    params, tau = toy_models.model(0, 2, jnp.float64)
    tau = jax.tree.map(lambda x: 0.01 * x, tau)

    def of_task(t):
        return {k: jax.tree.map(lambda x: x[:, t] if k == "blocks" else x[t], tau[k]) for k in tau}  # noqa: B023

    first, second = of_task(0), of_task(1)
    batch = toy_models.batch(1, 4)
    moved = lambda *steps: jax.tree.map(lambda x, *s: x + sum(s), params, *steps)
    linear = jax.jit(lambda params0, p: linearised(toy_models.apply, params0)(p, batch)["features"])
    at_start = toy_models.apply(params, batch)["features"]
    np.testing.assert_allclose(linear(params, params), at_start, rtol=1e-14)
    sums = linear(params, moved(first)) + linear(params, moved(second)) - at_start
    np.testing.assert_allclose(linear(params, moved(first, second)), sums, atol=1e-13)
    errors = []
    for near in (moved(first), moved(jax.tree.map(lambda x: x / 2, first))):  # what is left out is of second order
        errors.append(np.abs(linear(params, near) - toy_models.apply(near, batch)["features"]).max())
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_integer_leaves_of_a_linearised_model_stay():
    """Of ``w[ids]^2 x``: ``(w0^2 + 2 w0 (w - w0))[ids] x``, and its slope by w."""

    def apply(params, batch):
        return {"features": jnp.square(params["w"][params["ids"]]) * batch, "ids": params["ids"]}

    w0, w, x, ids = np.float32([1, 2, 3]), np.float32([2, 4, 5]), np.float32([1, 10]), np.int32([2, 0])

    def loss(w):
        out = linearised(apply, {"w": w0, "ids": ids})({"w": w, "ids": ids - 1}, x)
        return out["features"].sum(), out["ids"]

    (out, ids_out), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(w)
    np.testing.assert_allclose(out, (9 + 2 * 3 * 2) * 1 + (1 + 2 * 1 * 1) * 10, rtol=1e-6)
    np.testing.assert_allclose(slope, [20, 0, 6], rtol=1e-6)
    np.testing.assert_array_equal(ids_out, ids)


def tune(trainable, model, params, steps=3, **recipe):
    made = heads.make_heads([np.eye(model.feature_dim, 2, dtype=np.float32)])
    batch = {"image": PICTURES, "label": np.array([0, 1], np.int32)}
    finetune = make_finetune(model.apply, Recipe(steps, 2, 1e-2, **recipe), trainable=trainable)
    return finetune(params, made.kernel[0], made.class_mask[0], made.scale, lambda step: batch)


def test_tangent_and_attention_only_training_of_a_scanned_model():
    model, params = models.load(f"{FOLDER}/clip_tower")
    tuned = tune(tangent(), model, params)
    assert all(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (tuned, params)), strict=True))
    attention = {f"blocks/attention/{name}/kernel" for name in ("query", "key", "value", "output")}
    tuned = weights_of(attention_only(), params, tune(attention_only(), model, params, weight_decay=0.1))
    start = trees.flatten(params)
    assert {p for p, x in trees.flatten(tuned).items() if not np.array_equal(x, start[p])} == attention
    with_biases = trees.flatten(attention_only(biases=True).init(params)[0])
    assert with_biases.keys() == attention | {p.replace("kernel", "bias") for p in attention}


@pytest.mark.parametrize("train_a", [True, False])
def test_lora_to_peft_and_back(tmp_path, train_a):
    """Training in the scan = training the whole merge; the adapter on disk gives the merged weights."""
    folder = f"{FOLDER}/clip_tower"
    model, params = models.load(folder)
    how = lora.lora(2, 6.0, scanned=True, train_a=train_a)
    inside = tune(how, model, params, weight_decay=0.1)
    if train_a:
        outside = tune(lora.lora(2, 6.0), model, params, weight_decay=0.1)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), inside, outside)
    learnables, fixed = how.init(params)
    assert all("b" in path.split("/")[-1] or train_a for path in trees.flatten(learnables))
    start = how.weights(learnables, fixed)
    jax.tree.map(np.testing.assert_array_equal, start, params)
    tuned = how.weights(inside, fixed)
    factors = lora.factors(inside, fixed)
    if not train_a:  # the frozen half is what it was
        first = trees.flatten(lora.factors(learnables, fixed))
        same = [np.array_equal(x, first[p]) for p, x in trees.flatten(factors).items() if p.endswith("/a")]
        assert same and all(same)
    dense = lora.deltas(factors, 3.0)["blocks"]["attention"]["query"]["kernel"]
    np.testing.assert_allclose(
        dense, tuned["blocks"]["attention"]["query"]["kernel"] - params["blocks"]["attention"]["query"]["kernel"],
        atol=1e-6,
    )  # fmt: skip
    peft.save_adapter(tmp_path / "adapter", model.table, factors, 6.0, base=folder)
    models.save(tmp_path / "whole", model, tuned, source=folder)
    adapter, whole = open_model(tmp_path / "adapter"), open_model(tmp_path / "whole")
    assert set(adapter.specs) == set(whole.specs)
    for name in whole.specs:
        np.testing.assert_allclose(adapter.read(name), whole.read(name), atol=1e-6)


def test_adapters_of_every_layout(tmp_path):
    """GPT-2 keeps kernels as [in, out]; T5 has two stacks of layers."""
    rng = np.random.default_rng(0)
    for name, targets in (("gpt2_tiny", lora.ATTENTION), ("t5_gated", "(attention|mlp)/(query|value|down)/kernel$")):
        model, params = models.load(f"{FOLDER}/{name}")
        how = lora.lora(2, 4.0, targets, scanned=True)
        learnables, fixed = how.init(params)
        learnables = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), learnables)
        peft.save_adapter(tmp_path / name, model.table, lora.factors(learnables, fixed), 4.0, f"{FOLDER}/{name}")
        models.save(tmp_path / "whole" / name, model, how.weights(learnables, fixed), source=f"{FOLDER}/{name}")
        adapter, whole = open_model(tmp_path / name), open_model(tmp_path / "whole" / name)
        for tensor in whole.specs:
            np.testing.assert_allclose(adapter.read(tensor), whole.read(tensor), atol=1e-5)
        batch = {"ids": np.array([[3, 4, 5]]), "mask": np.ones((1, 3), bool)}
        if name == "t5_gated":
            batch["decoder_ids"] = np.array([[0, 3]])
        inside = how.apply(model.apply, learnables, fixed, batch)
        outside = model.apply(how.weights(learnables, fixed), batch)
        np.testing.assert_allclose(inside["logits"], outside["logits"], atol=1e-4)


def test_what_can_have_no_factors(tmp_path):
    model, params = models.load(f"{FOLDER}/clip_tower")
    with pytest.raises(ValueError, match=r"patch/kernel has shape .* for matrices"):
        lora.lora(2, 2.0, "patch/kernel").init(params)
    with pytest.raises(ValueError, match="rank=0"):
        lora.lora(0, 2.0)
    factors = {"norm": {"scale": {"a": np.ones((3, 2)), "b": np.ones((2, 3))}}}
    with pytest.raises(ValueError, match=r"ranks|kernels of dense layers|no rule"):
        peft.save_adapter(tmp_path, model.table, {"embeddings": {"class": factors["norm"]["scale"]}}, 2.0)
