"""Loading and saving: round trips, what a saved folder holds, and errors that say what to do."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec import cli, models
from taskvec.io import safetensors
from taskvec.models import efficientnet

TINY = pathlib.Path(__file__).parent / "recorded" / "bert_even"


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny model that a test may damage."""
    shutil.copytree(TINY, tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    tensors = safetensors.load(folder)
    safetensors.save(folder, change(dict(tensors)))


def test_round_trip_with_source_gives_back_the_file(tmp_path):
    model, params = models.load(TINY)
    models.save(tmp_path / "saved", model, params, source=TINY)
    again, reread = models.load(tmp_path / "saved")
    assert again.config == model.config
    assert_same(reread, params)
    assert_same(safetensors.load(tmp_path / "saved"), safetensors.load(TINY))
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == json.loads(
        (TINY / "config.json").read_text()
    )


def test_round_trip_without_source_keeps_the_encoder(tmp_path):
    model, params = models.load(TINY)
    models.save(tmp_path / "saved", model, params)
    again, reread = models.load(tmp_path / "saved")
    assert again.config == model.config
    assert_same(reread, params)
    left_out = safetensors.load(TINY).keys() - safetensors.load(tmp_path / "saved").keys()
    assert left_out == {"pooler.dense.weight", "pooler.dense.bias"}


def test_tokenizer_files_and_names_with_a_prefix_are_kept(folder, tmp_path):
    rewrite(folder, lambda t: {f"bert.{k}": v for k, v in t.items()} | {"classifier.weight": np.ones((2, 32))})
    (folder / "1_Pooling").mkdir()
    for name in ("tokenizer.json", "1_Pooling/config.json"):
        (folder / name).write_text("{}")
    model, params = models.load(folder)
    assert_same(params, models.load(TINY)[1])
    models.save(tmp_path / "saved", model, params, source=folder)
    assert safetensors.load(tmp_path / "saved").keys() == safetensors.load(folder).keys()
    assert (tmp_path / "saved" / "1_Pooling" / "config.json").is_file()


def test_old_names_of_norms_are_read_and_kept(folder, tmp_path):
    old = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    rewrite(folder, lambda t: {old(f"bert.{k}"): v for k, v in t.items()})
    model, params = models.load(folder)
    assert_same(params, models.load(TINY)[1])
    models.save(tmp_path / "saved", model, params, source=folder)
    assert_same(safetensors.load(tmp_path / "saved"), safetensors.load(folder))
    models.save(tmp_path / "alone", model, params)
    assert "embeddings.LayerNorm.weight" in safetensors.load(tmp_path / "alone")
    experts = [f"--expert={expert}" for expert in (TINY, tmp_path / "saved")]
    assert not cli.main(
        ["merge", "--method=weight_average", f"--base={folder}", *experts, f"--out={tmp_path / 'merged'}"]
    )
    assert_same(safetensors.load(tmp_path / "merged"), safetensors.load(folder))


def test_bfloat16_is_saved_as_such(tmp_path):
    model, params = models.load(TINY, dtype=jnp.bfloat16)
    models.save(tmp_path, model, params, source=TINY)
    _, reread = models.load(tmp_path, dtype=jnp.bfloat16)
    assert_same(reread, params)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert safetensors.SafetensorsReader(tmp_path).specs["embeddings.LayerNorm.bias"].dtype == jnp.bfloat16


def test_efficientnet_round_trip(tmp_path):
    model = efficientnet.make()
    params = jax.tree.map(lambda s: jnp.arange(np.prod(s.shape), dtype=s.dtype).reshape(s.shape), model.abstract)
    models.save(tmp_path, model, params)
    again, reread = models.load(tmp_path)
    assert again.name == "efficientnet_lite0_folded"
    assert_same(reread, params)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "efficientnet_lite0_folded"}


def test_files_that_do_not_fit(folder):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != "encoder.layer.1.output.dense.bias"})
    with pytest.raises(ValueError, match="cannot stack blocks/mlp/down/bias"):
        models.load(folder)
    rewrite(folder, lambda t: {"embeddings.extra": np.ones(2), **t})
    with pytest.raises(ValueError, match=r"no rule covers embeddings\.extra"):
        models.load(folder)


def test_shapes_that_contradict_the_config(folder):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "vocab_size": 98}))
    with pytest.raises(ValueError, match=r"embeddings/word: \(97, 32\), expected \(98, 32\)"):
        models.load(folder)


def test_nan_names_file_and_tensor(folder):
    rewrite(folder, lambda t: {**t, "embeddings.LayerNorm.bias": np.full(32, np.nan, np.float32)})
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor embeddings\.LayerNorm\.bias holds NaN"):
        models.load(folder)


def test_unknown_families_and_places(folder, tmp_path):
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="model_type 'mamba'; supported are bert"):
        models.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json \(it holds .*model\.safetensors"):
        models.load(folder)
    with pytest.raises(FileNotFoundError, match="it is no folder"):
        models.load(tmp_path / "nowhere")


def described(folder, name, **fields):
    """A recorded model with other fields in its config."""
    given = json.loads((TINY.parent / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**given, **fields}))
    return models.describe(folder)


def test_configs_that_mean_other_functions_of_the_same_params(tmp_path):
    found = lambda name, **fields: models.differences(described(tmp_path, name, **fields), models.describe(at / name))
    at = TINY.parent
    assert not found("bert_even", pad_token_id=5, architectures=["BertForMaskedLM"])
    assert found("bert_even", layer_norm_eps=1e-5, num_attention_heads=2) == {
        "layer_norm_eps": (1e-5, 1e-12), "num_attention_heads": (2, 4),
    }  # fmt: skip
    assert found("roberta_tiny", pad_token_id=0) == {"pad_token_id": (0, 1)}
    assert not found("gpt2_tiny", pad_token_id=3, eos_token_id=[1, 2])
    rope = json.loads((at / "llama_scaled" / "config.json").read_text())["rope_parameters"]
    assert found("llama_scaled", rope_parameters={**rope, "rope_theta": 7.0}) == {
        "rope.rope_theta": (7.0, rope["rope_theta"])
    }
    text = json.loads((at / "clip_both" / "config.json").read_text())["text_config"]
    assert found("clip_both", text_config={**text, "hidden_act": "relu", "eos_token_id": 2}).keys() == {
        "text_config.hidden_act"
    }
    assert models.differences(models.describe(TINY), models.describe(at / "roberta_tiny")) == {
        "model_type": ("bert", "roberta")
    }


def test_saving_what_is_not_the_model(tmp_path, folder):
    model, params = models.load(TINY)
    with pytest.raises(ValueError, match="embeddings/norm/bias: absent"):
        models.save(tmp_path / "x", model, {**params, "embeddings": {}})
    assert not (tmp_path / "x").exists()
    rewrite(folder, lambda t: {k: v for k, v in t.items() if ".layer.2." not in k})
    with pytest.raises(ValueError, match="holds another model"):
        models.save(tmp_path / "x", model, params, source=folder)
