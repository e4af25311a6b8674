"""CLIP against the numbers that transformers computed in float64 (tests/parity/record_vision.py)."""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec import models, tree as trees
from taskvec.adaptive.coefficients import coefficients
from taskvec.adaptive.merged import merged_apply
from taskvec.io import safetensors
from taskvec.models import clip

RECORDED = pathlib.Path(__file__).parent / "recorded"
TOWER, BOTH = RECORDED / "clip_tower", RECORDED / "clip_both"


@functools.cache
def recorded(folder):
    with np.load(folder / "outputs.npz") as file:
        return dict(file)


@functools.cache
def ran(folder, part=None):
    """Outputs of a recorded folder, or of a part of it, on its recorded inputs."""
    out = recorded(folder)
    model, params = models.load(folder, part=part)
    batch = {name: out[name] for name in ("image", "ids", "mask") if name in out}
    return model, params, batch, run(model, params, batch)


def run(model, params, batch, **how):
    return jax.jit(lambda params, batch: model.apply(params, batch, **how))(params, batch)


def close(mine, recorded):
    np.testing.assert_allclose(mine, recorded, atol=1e-5, rtol=1e-5)


def changed(tmp_path, source, config=None, tensors=None):
    """A copy of a folder with another config or other tensors."""
    shutil.copytree(source, tmp_path / "changed")
    file = tmp_path / "changed" / "config.json"
    if config:
        file.write_text(json.dumps(config(json.loads(file.read_text()))))
    if tensors:
        safetensors.save(tmp_path / "changed", tensors(dict(safetensors.load(source))))
    return tmp_path / "changed"


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_image_tower_equals_transformers():
    model, params, _, mine = ran(TOWER)
    out = recorded(TOWER)
    close(mine["tokens"], out["last_hidden_state"])
    close(mine["features"], out["pooler_output"])
    assert mine["features"].shape == (4, model.feature_dim) and "blocks" in params and model.scanned


def test_both_towers_equal_transformers():
    model, _, _, mine = ran(BOTH)
    out = recorded(BOTH)
    close(mine["features"], out["image_embeds"])
    close(mine["text_features"], out["text_embeds"])
    close(mine["text_pooled"], out["text_pooler_output"])
    close(mine["text_tokens"][out["mask"]], out["text_last_hidden_state"][out["mask"]])
    close(mine["logits"], out["logits_per_image"])
    assert model.feature_dim == 14 and model.scanned


def test_parts_give_what_the_whole_gives():
    _, whole, _, all_out = ran(BOTH)
    for part, tower, name in (("vision_projected", "vision", "image"), ("text", "text", "text")):
        model, params, _, mine = ran(BOTH, part)
        assert_same(params, whole[tower])
        close(mine["features"], all_out[f"{name}_features"])
        assert model.scanned and model.feature_dim == 14
    model, params, _, mine = ran(BOTH, "vision")
    assert params.keys() == whole["vision"].keys() - {"projection"} and model.feature_dim == 18
    close(mine["features"], all_out["image_pooled"])
    close(mine["features"] @ whole["vision"]["projection"]["kernel"], all_out["image_features"])


def test_one_tower_at_a_time():
    model, params, batch, mine = ran(BOTH)
    image = run(model, params, {"image": batch["image"]})
    text = run(model, params, {"ids": batch["ids"]})  # padding after the end is seen by no token that counts
    close(image["features"], mine["features"])
    close(text["features"], mine["text_features"])
    assert "logits" not in image and "text_features" not in image
    with pytest.raises(ValueError, match="the batch has label; CLIP needs image, or ids"):
        run(model, params, {"label": batch["ids"]})


def test_the_end_of_text_of_old_configs(tmp_path):
    old = lambda fields: {**fields, "text_config": {**fields["text_config"], "eos_token_id": 2}}
    model, params = models.load(changed(tmp_path, BOTH, config=old), part="text")
    close(run(model, params, {"ids": recorded(BOTH)["ids_old"]})["features"], recorded(BOTH)["old"])


def test_padding_changes_nothing():
    model, params, batch, mine = ran(BOTH, "text")
    longer = {"ids": np.pad(batch["ids"], ((0, 0), (0, 1))), "mask": np.pad(batch["mask"], ((0, 0), (0, 1)))}
    close(run(model, params, longer)["features"], mine["features"])


def test_floats_are_pixels_that_are_normalised_already():
    model, params, batch, mine = ran(TOWER)
    x = (batch["image"] / 255 - np.array(clip.MEAN)) / np.array(clip.STD)
    close(run(model, params, {"image": x.astype(np.float32)})["features"], mine["features"])


def test_names_of_transformers_before_5(tmp_path):
    old = lambda t: (
        {f"vision_model.{k}": x for k, x in t.items()} | {"vision_model.embeddings.position_ids": np.arange(10)[None]}
    )
    folder = changed(tmp_path, TOWER, tensors=old)
    model, params = models.load(folder)
    assert_same(params, ran(TOWER)[1])
    models.save(tmp_path / "saved", model, params, source=folder)
    assert safetensors.load(tmp_path / "saved").keys() == safetensors.load(folder).keys()


def test_fields_that_a_config_leaves_out(tmp_path):
    def short(fields):
        fields["text_config_dict"] = fields.pop("text_config")
        fields["vision_config_dict"] = None
        del fields["text_config_dict"]["hidden_act"], fields["vision_config"]["layer_norm_eps"]
        return fields

    model = models.describe(changed(tmp_path, BOTH, config=short))
    assert model.config == ran(BOTH)[0].config


@pytest.mark.parametrize("part", [None, *clip.PARTS])
def test_round_trips(tmp_path, part):
    model, params, _, _ = ran(BOTH, part)
    models.save(tmp_path / "alone", model, params)
    again, reread = models.load(tmp_path / "alone")
    assert again.config == model.config and again.name == model.name
    assert_same(reread, params)
    models.save(tmp_path / "whole", model, params, source=BOTH)
    assert_same(dict(safetensors.load(tmp_path / "whole")), dict(safetensors.load(BOTH)))


def test_hooks_and_captures():
    model, params, batch, _ = ran(TOWER)
    hooks = {"mlp": lambda run, weights, x: 0 * run(weights, x)}
    out = run(model, params, batch, hooks=hooks, capture=("attention", "mlp", "block"))
    assert out["attention"].shape == out["block"].shape == (3, 4, 10, 32) and not out["mlp"].any()
    np.testing.assert_array_equal(out["block"][-1], out["tokens"])


def test_merging_inside_the_scan():
    model, params, batch, mine = ran(TOWER)
    wave = lambda x: 0.05 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    tau = jax.tree.map(wave, params)
    tasks = {name: jax.tree.map(lambda x, n=name: jnp.stack([x, -x], n == "blocks"), tau[name]) for name in tau}
    parametrisation = coefficients(trees.groups(params, "task"), 2, jnp.array([[0.7, 0.2]]))
    inside = jax.jit(merged_apply(model.apply, parametrisation, scanned=model.scanned))
    out = inside(parametrisation.init(), (params, tasks), batch)
    close(out["features"], run(model, jax.tree.map(lambda w, t: w + 0.5 * t, params, tau), batch)["features"])
    assert not np.allclose(out["features"], mine["features"], atol=1e-2)


def test_captures_of_both_towers_have_names_of_their_own():
    model, params, batch, _ = ran(BOTH)
    shapes = jax.eval_shape(lambda p, b: model.apply(p, b, capture=("block",)), params, batch)
    assert shapes["image_block"].shape == (2, 4, 10, 18) and shapes["text_block"].shape == (3, 5, 11, 24)


def test_bfloat16_computation_is_close():
    model, params, batch, mine = ran(BOTH)
    out = run(model, params, batch, dtype=jnp.bfloat16)
    assert out["image_tokens"].dtype == out["text_tokens"].dtype == jnp.bfloat16
    for name in ("features", "text_features"):
        assert out[name].dtype == jnp.float32
        np.testing.assert_allclose(out[name], mine[name], atol=0.15)


@pytest.mark.parametrize(
    ("folder", "part", "change", "says"),
    [
        (BOTH, "image", {}, "unknown part 'image' of CLIP; allowed: vision, vision_projected, text"),
        (TOWER, "vision_projected", {}, "a folder of CLIPVisionModel has no part 'vision_projected'"),
        (TOWER, "text", {}, "has no part 'text'"),
        (TOWER, None, {"num_channels": 1}, "num_channels=1; the CLIP tower here supports only 3"),
        (TOWER, None, {"hidden_act": "mish"}, "hidden_act='mish'; supported are gelu"),
        (TOWER, None, {"patch_size": [8, 4]}, "one number for both sides"),
        (TOWER, None, {"num_attention_heads": 5}, "not a multiple of 5 heads"),
        (RECORDED / "bert_even", "vision", {}, "only clip, clip_vision_model, clip_text_model, vit have parts"),
    ],
)
def test_what_is_not_computed(tmp_path, folder, part, change, says):
    with pytest.raises(ValueError, match=says):
        models.describe(changed(tmp_path, folder, config=lambda fields: {**fields, **change}), part=part)


def test_inputs_that_do_not_fit():
    model, params, batch, _ = ran(TOWER)
    with pytest.raises(ValueError, match=r"\(4, 20, 24, 3\), but the model takes \[B, 24, 24, 3\]"):
        model.apply(params, {"image": batch["image"][:, :20]})
    with pytest.raises(ValueError, match="images of int32"):
        model.apply(params, {"image": batch["image"].astype(np.int32)})
    model, params, _, _ = ran(BOTH, "text")
    with pytest.raises(ValueError, match="texts of 13 tokens, but the model has 12 positions"):
        model.apply(params, {"ids": np.zeros((1, 13), np.int32)})
