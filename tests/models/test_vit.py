"""ViT against the numbers that transformers computed in float64 (tests/parity/record_vision.py)."""

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
from taskvec.models import vit

RECORDED = pathlib.Path(__file__).parent / "recorded"
CLASSIFIER, ODD = RECORDED / "vit_classifier", RECORDED / "vit_odd"


@functools.cache
def ran(folder, part=None):
    """Recorded outputs of a folder, and ours."""
    with np.load(folder / "outputs.npz") as file:
        out = dict(file)
    model, params = models.load(folder, part=part)
    return model, params, out, run(model, params, {"image": out["image"]})


def run(model, params, batch, **how):
    return jax.jit(lambda params, batch: model.apply(params, batch, **how))(params, batch)


def close(mine, recorded):
    np.testing.assert_allclose(mine, recorded, atol=1e-5, rtol=1e-5)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("folder", [CLASSIFIER, ODD], ids=lambda folder: folder.name)
def test_tiny_models_equal_transformers(folder):
    model, params, out, mine = ran(folder)
    close(mine["tokens"], out["last_hidden_state"])
    close(mine["features"], out["last_hidden_state"][:, 0])
    assert mine["features"].shape == (4, model.feature_dim)
    assert ("logits" in mine) == ("head" in params) == ("logits" in out)
    if "logits" in out:
        close(mine["logits"], out["logits"])
        assert model.config.labels == ("cat", "dog", "bird")


def test_a_classifier_without_its_head():
    _, params, out, mine = ran(CLASSIFIER, "body")
    assert "head" not in params and "logits" not in mine
    close(mine["tokens"], out["last_hidden_state"])


@pytest.mark.parametrize(("folder", "part"), [(CLASSIFIER, None), (CLASSIFIER, "body"), (ODD, None)])
def test_round_trips(tmp_path, folder, part):
    model, params, _, _ = ran(folder, part)
    models.save(tmp_path / "alone", model, params)
    again, reread = models.load(tmp_path / "alone")
    assert again.config == model.config
    assert_same(reread, params)
    models.save(tmp_path / "whole", model, params, source=folder)
    assert_same(dict(safetensors.load(tmp_path / "whole")), dict(safetensors.load(folder)))


def test_options():
    model, params, out, mine = ran(CLASSIFIER)
    batch = {"image": out["image"]}
    hooks = {"attention": lambda run, weights, x: 0 * run(weights, x)}
    ours = run(model, params, batch, hooks=hooks, capture=("attention", "block"))
    assert ours["block"].shape == (3, 4, 10, 32) and not ours["attention"].any()
    doubled = run(model, params, batch, layer_params=lambda s: jax.tree.map(lambda x: 1.5 * x, s))
    outside = {**params, "blocks": jax.tree.map(lambda x: 1.5 * x, params["blocks"])}
    close(doubled["features"], model.apply(outside, batch)["features"])
    dropped = run(model, params, batch, dropout=0.3, key=jax.random.key(0))["features"]
    assert np.isfinite(dropped).all() and not np.allclose(dropped, mine["features"], atol=1e-2)
    half = run(model, params, batch, dtype=jnp.bfloat16)
    assert half["tokens"].dtype == jnp.bfloat16 and half["logits"].dtype == jnp.float32
    np.testing.assert_allclose(half["features"], mine["features"], atol=0.15)


def test_two_classes_that_the_config_does_not_name(tmp_path):
    fields = json.loads((CLASSIFIER / "config.json").read_text())
    assert vit.Config.from_json({k: v for k, v in fields.items() if "2" not in k}).labels == ("LABEL_0", "LABEL_1")
    shutil.copytree(CLASSIFIER, tmp_path / "two")
    (tmp_path / "two" / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if "2" not in k}))
    with pytest.raises(ValueError, match=r"head/bias: \(3,\), expected \(2,\)"):
        models.load(tmp_path / "two")


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_pixels_are_normalised_as_the_folder_says(tmp_path, name):
    _, params, out, _ = ran(ODD)
    shutil.copytree(ODD, tmp_path / "other")
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    about = {"image_mean": mean, "image_std": std, "rescale_factor": 0.00392156862745098, "do_rescale": True}
    write = lambda **more: (tmp_path / "other" / name).write_text(
        json.dumps(about | more if name[0:3] == "pre" else {"image_processor": about | more})
    )
    write()
    model, _ = models.load(tmp_path / "other")
    image = (np.random.default_rng(0).random(out["image"].shape) * 256).astype(np.uint8)
    wanted = run(model, params, {"image": ((image / 255.0 - mean) / std).astype(np.float32)})
    close(run(model, params, {"image": image})["features"], wanted["features"])
    models.save(tmp_path / "alone", model, params)
    assert models.describe(tmp_path / "alone").config == model.config
    for folder, part in (("clip_both", "vision"), ("clip_both", None), ("clip_tower", None)):
        shutil.copy(RECORDED / folder / "config.json", tmp_path / "other" / "config.json")
        config = models.describe(tmp_path / "other", part=part).config
        assert getattr(config, "vision_config", config).image_mean == tuple(mean)
    for bad in ({"rescale_factor": 1 / 127.5}, {"do_normalize": False}, {"image_std": [0.2]}):
        write(**bad)
        with pytest.raises(ValueError, match=r"all that is computed here|one number for each of three colours"):
            models.describe(tmp_path / "other")


def test_configs_that_mean_another_computation():
    fields = json.loads((CLASSIFIER / "config.json").read_text())
    with pytest.raises(ValueError, match="num_channels=1; the ViT here"):
        vit.Config.from_json({**fields, "num_channels": 1})
    with pytest.raises(ValueError, match="unknown part 'head' of a ViT; allowed: body"):
        vit.Config.from_json(fields, "head")
