"""T5 and Flan-T5 against what transformers computed in float64 (tests/parity/record_language.py)."""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec import models
from taskvec.io import safetensors
from taskvec.models import relative, t5

RECORDED = pathlib.Path(__file__).parent / "recorded"
TINY = ("t5_relu", "t5_gated")


def recorded(name):
    with np.load(RECORDED / name / "outputs.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_equal_transformers(name):
    out = recorded(name)
    mask = out["mask"]
    model, params = models.load(RECORDED / name)
    mine = jax.jit(model.apply)(params, {key: out[key] for key in ("ids", "mask", "decoder_ids")})
    np.testing.assert_allclose(mine["features"], out["features"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(mine["tokens"][mask], out["tokens"][mask], atol=1e-5, rtol=0)
    np.testing.assert_allclose(mine["logits"], out["logits"], atol=1e-5, rtol=0)
    assert mine["features"].shape == (len(mask), model.feature_dim)


def test_layer_params_hooks_capture_and_padding():
    out = recorded("t5_gated")
    batch = {key: out[key][:2] for key in ("ids", "mask", "decoder_ids")}
    model, params = models.load(RECORDED / "t5_gated")
    halved = {
        stack: {**params[stack], "blocks": jax.tree.map(lambda x: x / 2, params[stack]["blocks"])}
        for stack in ("encoder", "decoder")
    }
    longer = {**batch, **{k: np.pad(batch[k], ((0, 0), (0, 5)), constant_values=k == "ids") for k in ("ids", "mask")}}
    how = {"layer_params": lambda w: jax.tree.map(lambda x: 2 * x, w), "capture": ("block", "cross_attention")}
    mine = jax.jit(functools.partial(model.apply, **how))({**params, **halved}, longer)
    np.testing.assert_allclose(mine["features"], out["features"][:2], atol=1e-5)
    np.testing.assert_allclose(mine["logits"], out["logits"][:2], atol=1e-5)
    assert mine["encoder_block"].shape == (model.config.num_layers, *longer["ids"].shape, model.feature_dim)
    assert mine["decoder_cross_attention"].shape == (2, *batch["decoder_ids"].shape, model.feature_dim)
    assert "encoder_cross_attention" not in mine
    # A decoder that sees nothing of the encoder says the same to other texts.
    blind = jax.jit(functools.partial(model.apply, hooks={"cross_attention": lambda run, weights, x: 0 * x}))
    here, there = (blind(params, {**batch, "ids": ids})["logits"] for ids in (batch["ids"], batch["ids"][::-1]))
    np.testing.assert_array_equal(here, there)
    assert np.abs(here - mine["logits"]).max() > 0.01


def test_bfloat16_and_no_decoder():
    out = recorded("t5_relu")
    model, params = models.load(RECORDED / "t5_relu")
    apply = jax.jit(functools.partial(model.apply, dtype=jnp.bfloat16))
    mine = apply(params, {"ids": out["ids"], "mask": out["mask"]})
    assert mine.keys() == {"features", "tokens"}
    assert mine["tokens"].dtype == jnp.bfloat16
    np.testing.assert_allclose(mine["features"], out["features"], atol=0.1)


@pytest.mark.parametrize("name", TINY)
def test_a_folder_without_source_is_the_same_model(name, tmp_path):
    model, params = models.load(RECORDED / name)
    models.save(tmp_path, model, params)
    again, reread = models.load(tmp_path)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, reread, params)
    assert safetensors.load(tmp_path).keys() == safetensors.load(RECORDED / name).keys()


def test_files_with_the_embeddings_three_times(tmp_path):
    """As the published ones have them; the copies follow what is merged."""
    shutil.copytree(RECORDED / "t5_gated", tmp_path / "old")
    tensors = dict(safetensors.load(tmp_path / "old"))
    tensors |= {f"{stack}.embed_tokens.weight": tensors["shared.weight"] for stack in ("encoder", "decoder")}
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.ones((8, 3), np.float32)
    safetensors.save(tmp_path / "old", tensors)
    model, params = models.load(tmp_path / "old")
    changed = {**params, "embeddings": {"word": params["embeddings"]["word"] + 1}}
    models.save(tmp_path / "new", model, changed, source=tmp_path / "old")
    saved = safetensors.load(tmp_path / "new")
    assert saved.keys() == tensors.keys()
    for stack in ("encoder", "decoder"):
        np.testing.assert_array_equal(saved[f"{stack}.embed_tokens.weight"], tensors["shared.weight"] + 1)


def test_buckets():
    """With 32 buckets up to 128, one way: 16 single distances, then 16 that grow by a factor 8 ** (1 / 16)."""
    table = jnp.arange(32.0)[:, None]
    values = relative.bias(table, jnp.array([200]), 201, 128, both_ways=False)[0, 0, 0][::-1]
    expected = [d if d < 16 else min(16 + int(np.log(d / 16) / np.log(8) * 16 + 1e-6), 31) for d in range(201)]
    np.testing.assert_array_equal(values, expected)
    two = relative.bias(table, jnp.array([100]), 201, 128, both_ways=True)[0, 0, 0]
    assert (two[:101] < 16).all()
    np.testing.assert_array_equal(two[101:], 16 + two[:100][::-1])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj='gated-silu'; supported are relu, gated-gelu"),
        ({"architectures": ["T5EncoderModel"]}, "of a T5EncoderModel"),
    ],
)
def test_configs_that_mean_another_computation(change, says):
    fields = json.loads((RECORDED / "t5_relu" / "config.json").read_text())
    with pytest.raises(ValueError, match=says):
        t5.Config.from_json({**fields, **change})
