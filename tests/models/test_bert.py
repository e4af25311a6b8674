"""BERT and RoBERTa against the numbers that transformers computed in float64 (record.py, record_language.py)."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec import models, tree as trees
from taskvec.models import bert

RECORDED = pathlib.Path(__file__).parent / "recorded"
TINY = ("bert_even", "bert_odd", "roberta_tiny")


def recorded(name):
    with np.load(RECORDED / name / "outputs.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_equal_transformers(name):
    out = recorded(name)
    model, params = models.load(RECORDED / name)
    mine = jax.jit(model.apply)(params, {"ids": out["ids"], "mask": out["mask"]})
    np.testing.assert_allclose(mine["features"], out["features"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(mine["tokens"][out["mask"]], out["tokens"][out["mask"]], atol=1e-5, rtol=0)
    assert mine["features"].shape == (len(out["ids"]), model.feature_dim)


def test_types_of_tokens_equal_transformers():
    out = recorded("bert_even")
    model, params = models.load(RECORDED / "bert_even")
    mine = jax.jit(model.apply)(params, {"ids": out["ids"], "mask": out["mask"], "type_ids": out["types"]})
    np.testing.assert_allclose(mine["features"], out["typed_features"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(mine["tokens"][out["mask"]], out["typed_tokens"][out["mask"]], atol=1e-5, rtol=0)
    assert np.abs(out["typed_features"] - out["features"]).max() > 0.1


@pytest.mark.parametrize("name", ["bert_odd", "roberta_tiny"])
def test_a_model_with_one_type_does_not_look_at_types(name):
    out = recorded(name)
    model, params = models.load(RECORDED / name)
    batch = {"ids": out["ids"], "mask": out["mask"]}
    mine = model.apply(params, {**batch, "type_ids": np.ones_like(out["ids"])})
    np.testing.assert_allclose(mine["features"], out["features"], atol=1e-5, rtol=0)


def test_minilm_equals_transformers(minilm_folder):
    with np.load(RECORDED / "minilm.npz") as file:
        out = dict(file)
    model, params = models.load(minilm_folder)
    mine = jax.jit(model.apply)(params, {"ids": out["ids"], "mask": out["mask"]})
    np.testing.assert_allclose(mine["features"], out["features"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(mine["tokens"][0, : len(out["first"])], out["first"], atol=1e-5, rtol=0)
    assert len(trees.tensors(params)) == 101


@pytest.mark.parametrize(("name", "length"), [("bert_even", 20), ("roberta_tiny", 12)])
def test_padding_changes_nothing(name, length):
    out = recorded(name)
    model, params = models.load(RECORDED / name)
    ids, mask = out["ids"][:, :length], out["mask"][:, :length]
    pad = ((0, 0), (0, 6))
    longer = {"ids": np.pad(ids, pad, constant_values=7), "mask": np.pad(mask, pad)}
    a = model.apply(params, {"ids": ids, "mask": mask})["features"]
    b = model.apply(params, longer)["features"]
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_layer_params_makes_each_layers_weights():
    """A layer merged inside the scan gives what a merged tree gives, in value and in gradient."""
    out = recorded("bert_even")
    model, params = models.load(RECORDED / "bert_even")
    batch = {"ids": out["ids"], "mask": out["mask"]}
    change = jax.tree.map(lambda x: 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params["blocks"])
    layers = model.config.num_hidden_layers

    def inside(coefficient_L):
        slices = {"theta0": params["blocks"], "tau": change, "coef": coefficient_L}
        merge = jax.checkpoint(lambda s: jax.tree.map(lambda w, t: w + s["coef"] * t, s["theta0"], s["tau"]))
        return model.apply({**params, "blocks": slices}, batch, layer_params=merge)["features"]

    def outside(coefficient_L):
        merged = jax.tree.map(lambda w, t: w + jnp.einsum("l,l...->l...", coefficient_L, t), params["blocks"], change)
        return model.apply({**params, "blocks": merged}, batch)["features"]

    coefficient_L = jnp.linspace(0.2, 0.8, layers)
    a, b = (jax.value_and_grad(lambda c, f=f: jnp.square(f(c)).sum())(coefficient_L) for f in (inside, outside))
    np.testing.assert_allclose(a[0], b[0], rtol=1e-5)
    np.testing.assert_allclose(a[1], b[1], rtol=1e-3)


@pytest.mark.parametrize("remat", [None, "weights", "all"])
def test_unrolled_layers_give_the_same(remat):
    """Two of three layers in one turn, and all of them: numbers of transformers, and the gradient of the loop."""
    out = recorded("bert_even")
    model, params = models.load(RECORDED / "bert_even")
    batch = {"ids": out["ids"], "mask": out["mask"]}

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, unroll):
        def loss(params):
            y = model.apply(params, batch, unroll=unroll, remat=remat, capture=("mlp",))
            return jnp.square(y["features"]).sum(), y

        return jax.grad(loss, has_aux=True)(params)

    loop, plain = gradient(params, 1)
    for unroll in (2, 8):
        grads, y = gradient(params, unroll)
        np.testing.assert_allclose(y["features"], out["features"], atol=1e-5, rtol=0)
        np.testing.assert_allclose(y["mlp"], plain["mlp"], atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads, loop)


def test_a_lazy_embedding_table_is_enough():
    class Table:
        def __init__(self, array):
            self.array = array

        def take(self, ids, axis):
            return self.array[ids] if axis == 0 else None

    out = recorded("bert_odd")
    model, params = models.load(RECORDED / "bert_odd")
    lazy = {**params["embeddings"], "word": Table(params["embeddings"]["word"])}
    batch = {"ids": out["ids"], "mask": out["mask"]}
    a, b = (model.apply({**params, "embeddings": e}, batch)["features"] for e in (params["embeddings"], lazy))
    np.testing.assert_array_equal(a, b)


def test_bfloat16_params_give_float32_features_close_by():
    out = recorded("bert_even")
    model, params = models.load(RECORDED / "bert_even", dtype=jnp.bfloat16)
    mine = model.apply(params, {"ids": out["ids"], "mask": out["mask"]})
    assert mine["features"].dtype == jnp.float32
    assert mine["tokens"].dtype == jnp.bfloat16
    np.testing.assert_allclose(mine["features"], out["features"], atol=0.1)
    assert all(x.dtype == y.dtype for x, y in zip(*map(jax.tree.leaves, (params, model.abstract)), strict=True))


def test_too_long_a_text():
    model, params = models.load(RECORDED / "bert_odd")
    with pytest.raises(ValueError, match="texts of 20 tokens, but the model has 19 positions"):
        model.apply(params, {"ids": jnp.zeros((1, 20), jnp.int32), "mask": jnp.ones((1, 20), bool)})


def test_positions_of_roberta():
    """They count what is no padding, wherever it stands, so that fewer tokens fit than there are positions."""
    out = recorded("roberta_tiny")
    model, params = models.load(RECORDED / "roberta_tiny")
    order = np.argsort(out["mask"], axis=1, kind="stable")
    left = {key: np.take_along_axis(out[key], order, 1) for key in ("ids", "mask")}
    np.testing.assert_allclose(jax.jit(model.apply)(params, left)["features"], out["features"], atol=1e-5)
    assert model.name == "roberta"
    with pytest.raises(ValueError, match="texts of 19 tokens, but the model has 18 positions"):
        model.apply(params, {"ids": jnp.zeros((1, 19), jnp.int32), "mask": jnp.ones((1, 19), bool)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_act": "relu"}, "hidden_act='relu'.*only 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"num_attention_heads": 5}, "not a multiple of 5 heads"),
        ({"model_type": "electra"}, "model_type 'electra' is not one of bert, roberta"),
    ],
)
def test_configs_that_mean_another_computation(change, says):
    fields = json.loads((RECORDED / "bert_even" / "config.json").read_text())
    with pytest.raises(ValueError, match=says):
        bert.Config.from_json({**fields, **change})
