"""Packed batches: the numbers that transformers computed for the sentences one per row, and those of such a batch."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec import models, tree as trees
from taskvec.data import packing

RECORDED = pathlib.Path(__file__).parent / "recorded"


def recorded(name):
    with np.load(RECORDED / name / "outputs.npz") as file:
        return dict(file)


def packed(batch, length, multiple=1):
    return packing.packed(batch, length, multiple=multiple)


def sentences(name, lengths, width, seed=0):
    """Random sentences for a recorded model."""
    model, params = models.load(RECORDED / name)
    mask = np.arange(width) < np.array(lengths)[:, None]
    ids = np.random.default_rng(seed).integers(2, model.config.vocab_size, mask.shape)
    return model, params, {"ids": np.where(mask, ids, model.config.pad_token_id).astype(np.int32), "mask": mask}


@pytest.mark.parametrize("name", ["bert_even", "roberta_tiny"])
def test_packed_rows_equal_transformers(name):
    out = recorded(name)
    model, params = models.load(RECORDED / name)
    length = model.config.max_position_embeddings - model.config.first_position
    batch = {"ids": out["ids"], "mask": out["mask"]}
    if "types" in out:
        batch, out = {**batch, "type_ids": out["types"]}, {k: out[f"typed_{k}"] for k in ("tokens", "features")}
    batch = packed(batch, length, multiple=2)
    assert np.bincount(batch["first"] // length).max() > 1, "no row holds two sentences"
    mine = jax.jit(model.apply)(params, batch)
    np.testing.assert_allclose(mine["features"], out["features"], atol=1e-5, rtol=0)
    first = mine["tokens"].reshape(-1, model.feature_dim)[batch["first"]]
    np.testing.assert_allclose(first, out["tokens"][:, 0], atol=1e-5, rtol=0)


LENGTHS = {
    "mixed": [3, 9, 1, 12, 5, 2],
    "one token": [1] * 6,
    "full": [12] * 6,
    "equal": [5] * 6,
    "an empty one": [5, 0, 12, 3, 4, 1],
}


@pytest.mark.parametrize("name", ["bert_even", "roberta_tiny"])
def test_features_and_gradients_equal_those_of_one_sentence_a_row(name):
    """A sentence without tokens has features of zero in both."""
    for lengths in LENGTHS.values():
        model, params, batch = sentences(name, lengths, 12)
        both = [batch, packed(batch, 12, multiple=6)]
        weight = np.random.default_rng(1).standard_normal((6, model.feature_dim))
        a, b = (_value_and_gradient(model, params, x, weight) for x in both)
        np.testing.assert_allclose(a[0], b[0], atol=1e-6, rtol=0)
        for (path, x), y in zip(trees.flatten(a[1]).items(), trees.flatten(b[1]).values(), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-6 * max(1, np.abs(y).max()), rtol=0, err_msg=path)


_PROGRAMS = {}


def _value_and_gradient(model, params, batch, weight):
    def loss(params, batch, weight):
        features = model.apply(params, batch)["features"]
        return (features * weight).sum(), features

    run = _PROGRAMS.setdefault(model.name, jax.jit(jax.grad(loss, has_aux=True)))
    grads, features = run(params, batch, weight)
    return features, grads


def test_layers_made_in_the_scan_hooks_pieces_remat_and_bfloat16():
    model, params, batch = sentences("bert_even", [3, 9, 1, 7, 5, 2], 12)
    both = [batch, packed(batch, 12)]
    double = lambda weights: jax.tree.map(lambda x: 1.5 * x, weights)
    hook = lambda run, weights, x: run(weights, x) * 2
    how = {"layer_params": double, "hooks": {"mlp": hook}, "capture": ("attention",), "remat": "all"}
    a, b = (jax.jit(lambda params, x: model.apply(params, x, **how))(params, x) for x in both)
    np.testing.assert_allclose(a["features"], b["features"], atol=1e-6)
    plain = jax.jit(model.apply)(params, batch)["features"]
    assert np.abs(plain - a["features"]).max() > 0.01
    # A captured piece lies in the packed rows: the first tokens of the sentences, one layer after the other.
    layers = model.config.num_hidden_layers
    firsts = b["attention"].reshape(layers, -1, model.feature_dim)[:, both[1]["first"]]
    np.testing.assert_allclose(firsts, a["attention"][:, :, 0], atol=1e-6)
    half = jax.jit(lambda params, x: model.apply(params, x, dtype=jnp.bfloat16))(params, both[1])["features"]
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, plain, atol=0.1)


def test_rows_longer_than_the_model():
    model, params, batch = sentences("bert_odd", [3, 2], 20)
    with pytest.raises(ValueError, match="texts of 20 tokens, but the model has 19 positions"):
        model.apply(params, packed(batch, 20))
