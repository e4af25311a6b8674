"""GPT-2 and Llama-like decoders against what transformers computed in float64 (tests/parity/record_language.py)."""

import dataclasses
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
from taskvec.models import gpt2, llama

RECORDED = pathlib.Path(__file__).parent / "recorded"
TINY = ("gpt2_tiny", "llama_scaled", "qwen2_tied")


def recorded(name):
    with np.load(RECORDED / name / "outputs.npz") as file:
        return dict(file)


def fields(name):
    return json.loads((RECORDED / name / "config.json").read_text())


@pytest.fixture
def folder(tmp_path):
    """A copy of a tied model that a test may change."""
    shutil.copytree(RECORDED / "gpt2_tiny", tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    tensors = safetensors.load(folder)
    safetensors.save(folder, change(dict(tensors)))


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_equal_transformers_whichever_side_is_padded(name):
    out = recorded(name)
    ids, mask = out["ids"], out["mask"]
    model, params = models.load(RECORDED / name)
    apply = jax.jit(model.apply)
    mine = apply(params, {"ids": ids, "mask": mask})
    for key in ("tokens", "logits"):
        np.testing.assert_allclose(mine[key][mask], out[key][mask], atol=1e-5, rtol=0)
    np.testing.assert_allclose(mine["features"], out["features"], atol=1e-5, rtol=0)
    assert mine["features"].shape == (len(ids), model.feature_dim)
    order = np.argsort(mask, axis=1, kind="stable")
    left = {"ids": np.take_along_axis(ids, order, 1), "mask": np.take_along_axis(mask, order, 1)}
    again = apply(params, left)
    np.testing.assert_allclose(again["features"], out["features"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(again["logits"][left["mask"]], out["logits"][mask], atol=1e-5, rtol=0)


def test_layer_params_hooks_and_capture():
    """A hook around attention sees what `layer_params` made, and doubles it; captured pieces are what blocks add."""
    out = recorded("llama_scaled")
    batch = {"ids": out["ids"][:2], "mask": out["mask"][:2]}
    model, params = models.load(RECORDED / "llama_scaled")
    halved = jax.tree.map(lambda x: x / 2, params["blocks"])

    def doubled(run, weights, x):
        return 2 * run(weights, x)

    how = {"hooks": {"attention": doubled}, "capture": ("attention", "mlp", "block")}
    how["layer_params"] = lambda w: jax.tree.map(lambda x: 2 * x, w)
    inside = jax.jit(functools.partial(model.apply, **how))({**params, "blocks": halved}, batch)
    twice = {**params["blocks"], "attention": dict(params["blocks"]["attention"])}
    twice["attention"]["output"] = jax.tree.map(lambda x: 2 * x, twice["attention"]["output"])
    plain = jax.jit(model.apply)({**params, "blocks": twice}, batch)
    np.testing.assert_allclose(inside["features"], plain["features"], atol=1e-5)
    x = params["embeddings"]["word"][batch["ids"]]
    for layer in range(model.config.num_hidden_layers):
        x = x + inside["attention"][layer] + inside["mlp"][layer]
        np.testing.assert_allclose(inside["block"][layer], x, atol=1e-5)


def test_bfloat16_computation_is_close_and_gives_float32():
    out = recorded("gpt2_tiny")
    model, params = models.load(RECORDED / "gpt2_tiny")
    apply = jax.jit(functools.partial(model.apply, dtype=jnp.bfloat16))
    mine = apply(params, {"ids": out["ids"], "mask": out["mask"]})
    assert mine["tokens"].dtype == jnp.bfloat16
    assert mine["features"].dtype == mine["logits"].dtype == jnp.float32
    np.testing.assert_allclose(mine["features"], out["features"], atol=0.15)


@pytest.mark.parametrize("name", TINY)
def test_a_folder_without_source_is_the_same_model(name, tmp_path):
    model, params = models.load(RECORDED / name)
    models.save(tmp_path, model, params)
    again, reread = models.load(tmp_path)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, reread, params)
    assert safetensors.load(tmp_path).keys() == safetensors.load(RECORDED / name).keys()


def test_tied_tensors_that_a_file_holds_twice(folder, tmp_path):
    word = safetensors.load(folder)["transformer.wte.weight"]
    rewrite(folder, lambda t: {**t, "lm_head.weight": word})
    model, params = models.load(folder)
    changed = {**params, "embeddings": jax.tree.map(lambda x: x + 1, params["embeddings"])}
    models.save(tmp_path / "saved", model, changed, source=folder)
    saved = safetensors.load(tmp_path / "saved")
    np.testing.assert_array_equal(saved["lm_head.weight"], saved["transformer.wte.weight"])
    rewrite(folder, lambda t: {**t, "lm_head.weight": word + 1})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        models.load(folder)


def test_files_without_prefix_and_with_buffers_and_another_head(folder, tmp_path):
    extra = {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32), "score.weight": np.ones((2, 24), np.float32)}
    rewrite(folder, lambda t: {k.removeprefix("transformer."): v for k, v in t.items()} | extra)
    model, params = models.load(folder)
    jax.tree.map(np.testing.assert_array_equal, params, models.load(RECORDED / "gpt2_tiny")[1])
    models.save(tmp_path / "saved", model, params, source=folder)
    assert safetensors.load(tmp_path / "saved").keys() == safetensors.load(folder).keys()


def test_both_spellings_of_rotary_positions():
    new = fields("llama_scaled")
    parameters = dict(new.pop("rope_parameters"))
    old = {**new, "rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}
    config = llama.Config.from_json(old)
    assert config == llama.Config.from_json(fields("llama_scaled")) == llama.Config.from_json(config.to_json())
    rope = llama.Rope(rope_theta=5e5, rope_type="llama3", factor=8.0)  # Llama 3.1
    ratio = rope.frequencies(128) / dataclasses.replace(rope, rope_type="default").frequencies(128)
    assert ratio[0] == 1
    np.testing.assert_allclose(ratio[-1], 1 / 8, rtol=1e-6)
    assert (np.diff(ratio) <= 1e-7).all()


def test_heads_and_windows():
    tiny = fields("llama_scaled")
    model = llama.make(llama.Config.from_json({**tiny, "architectures": ["LlamaForSequenceClassification"]}))
    assert "head" not in model.abstract
    assert model.steps is None
    mistral = {**tiny, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
    model = llama.make(llama.Config.from_json(mistral))
    batch = {"ids": jnp.zeros((1, 9), jnp.int32), "mask": jnp.ones((1, 9), bool)}
    with pytest.raises(ValueError, match="texts of 9 tokens, but the model attends to a sliding window of 8"):
        model.apply(model.abstract, batch)
    qwen = llama.Config.from_json({**fields("qwen2_tied"), "sliding_window": 8})
    assert qwen.sliding_window is None
    model = gpt2.make(gpt2.Config(n_positions=8))
    with pytest.raises(ValueError, match="texts of 9 tokens, but the model has 8 positions"):
        model.apply(model.abstract, batch)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("gpt2_tiny", {"activation_function": "swish"}, "activation_function='swish'; supported are gelu"),
        ("gpt2_tiny", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true"),
        ("gpt2_tiny", {"n_head": 5}, "not a multiple of 5 heads"),
        ("llama_scaled", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'; supported are default, llama3"),
        ("llama_scaled", {"rope_scaling": {"rope_type": "llama3"}}, "without factor, low_freq_factor"),
        ("llama_scaled", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama_scaled", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama_scaled", {"num_key_value_heads": 3}, "not a multiple of 3 key heads"),
    ],
)
def test_configs_that_mean_another_computation(name, change, says):
    family = gpt2 if name.startswith("gpt2") else llama
    with pytest.raises(ValueError, match=says):
        family.Config.from_json({**fields(name), **change})
