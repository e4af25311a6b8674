"""Heads of published classifiers against their formulas in float64."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from taskvec import models
from taskvec.io import safetensors
from taskvec.models import classifiers

RECORDED = pathlib.Path(__file__).parent / "recorded"
RNG = np.random.default_rng(0)


def random(*shape):
    return RNG.normal(size=shape).astype(np.float32)


TWO = {
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "bert": ("bert.pooler.dense", "classifier"),
}


@pytest.mark.parametrize("name", TWO)
def test_two_layers(tmp_path, name):
    first, second = TWO[name]
    w1, b1, w2, b2 = random(5, 5), random(5), random(3, 5), random(3)
    safetensors.save(
        tmp_path, {f"{first}.weight": w1, f"{first}.bias": b1, f"{second}.weight": w2, f"{second}.bias": b2}
    )
    z = random(7, 5)
    expected = np.tanh(z.astype(np.float64) @ w1.T + b1) @ w2.T + b2
    np.testing.assert_allclose(classifiers.load(tmp_path, name)(z), expected, rtol=1e-5, atol=1e-5)


def test_one_matrix(tmp_path):
    w, z = random(3, 5), random(7, 5)
    safetensors.save(tmp_path, {"score.weight": w})
    np.testing.assert_allclose(classifiers.load(tmp_path, "gpt2")(z), z.astype(np.float64) @ w.T, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"has no classifier.dense.weight, .*: it is no roberta"):
        classifiers.load(tmp_path, "roberta")
    with pytest.raises(ValueError, match=r"are read of roberta, bert.*the model is t5"):
        classifiers.load(tmp_path, "t5")


def test_bert_heads_read_the_first_token():
    model, params = models.load(RECORDED / "roberta_tiny")
    batch = {"ids": jnp.array([[0, 5, 6, 2]]), "mask": jnp.ones((1, 4), bool)}
    found = classifiers.with_features_for(model).apply(params, batch)
    np.testing.assert_array_equal(found["features"], found["tokens"][:, 0])
    assert not np.array_equal(found["features"], model.apply(params, batch)["features"])
    decoder = models.describe(RECORDED / "gpt2_tiny")
    assert classifiers.with_features_for(decoder) is decoder
