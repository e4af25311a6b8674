"""CLIP under OpenCLIP's names, against files and outputs of open_clip (tests/parity/record_open_clip.py)."""

import pathlib

import jax
import numpy as np
import pytest

from taskvec import models
from taskvec.io import open_clip, safetensors

RECORDED = pathlib.Path(__file__).parent / "recorded" / "open_clip"


@pytest.fixture(scope="module")
def whole():
    return dict(safetensors.load(RECORDED / "whole.safetensors"))


@pytest.fixture(scope="module")
def outputs():
    with np.load(RECORDED / "outputs.npz") as file:
        return dict(file)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        np.testing.assert_array_equal(x, b[name], err_msg=name)


@pytest.mark.parametrize(
    ("file", "towers", "tolerance"),
    [
        ("whole.safetensors", ["image", "text"], 1e-5),
        ("encoder.pt", ["image"], 1e-5),
        ("script.pt", ["image", "text"], 0.05),
    ],
)
def test_converted_files_compute_what_open_clip_computes(tmp_path, outputs, file, towers, tolerance):
    open_clip.convert(RECORDED / file, tmp_path / "model", head_width=8)
    model, params = models.load(tmp_path / "model")
    assert model.name == ("clip" if len(towers) == 2 else "clip_vision_model")
    mine = jax.jit(model.apply)(params, {"image": outputs["image"], "ids": outputs["ids"]})
    for tower in towers:
        found = mine["features" if len(towers) == 1 else f"{tower}_features"]
        np.testing.assert_allclose(found, outputs[f"{tower}_features"], atol=tolerance, rtol=tolerance)
    assert params.keys() == ({"vision", "text", "logit_scale"} if len(towers) == 2 else {*params}) and "projection" in (
        params if len(towers) == 1 else params["vision"]
    )


def test_names_and_back(whole):
    there = open_clip.to_hf(whole)
    assert there["vision_model.encoder.layers.1.self_attn.k_proj.weight"].shape == (16, 16)
    assert_same(open_clip.from_hf(there), whole)
    assert_same(open_clip.to_hf({f"module.model.{name}": x for name, x in whole.items()}), there)


def test_an_image_tower_saved_alone(tmp_path, whole):
    open_clip.convert(RECORDED / "encoder.pt", tmp_path / "projected", head_width=8)
    visual = {name: x for name, x in whole.items() if name.startswith("visual.")}
    assert_same(open_clip.from_hf(dict(safetensors.load(tmp_path / "projected"))), visual)
    model, params = models.load(tmp_path / "projected", part="vision")
    models.save(tmp_path / "plain", model, params)
    del visual["visual.proj"]
    assert_same(open_clip.from_hf(dict(safetensors.load(tmp_path / "plain"))), visual)


def test_the_files_of_one_model_agree(whole):
    encoder = open_clip.to_hf(open_clip.read(RECORDED / "encoder.pt"))
    wanted = open_clip.to_hf(whole)
    assert encoder.keys() == {name for name in wanted if "text_model.encoder" not in name}
    assert_same(encoder, {name: wanted[name] for name in encoder})
    for name, x in open_clip.read(RECORDED / "script.pt").items():
        assert x.dtype == np.float16
        np.testing.assert_array_equal(x, whole[name].astype(np.float16), err_msg=name)


def test_constants_are_left_out(whole):
    more = {"attn_mask": np.zeros((7, 7)), "input_resolution": np.array(16), "context_length": np.array(7)}
    assert_same(open_clip.to_hf(whole | more), open_clip.to_hf(whole))


def test_other_models(whole):
    with pytest.raises(ValueError, match=r"no names of an OpenCLIP model.*visual\.layer1\.0\.conv1\.weight"):
        open_clip.to_hf(whole | {"visual.layer1.0.conv1.weight": np.zeros(2)})
    with pytest.raises(ValueError, match=r"no names of a Hugging Face CLIP.*encoder\.layer\.0"):
        open_clip.from_hf({"encoder.layer.0.output.dense.bias": np.zeros(2)})
    there = open_clip.to_hf(whole)
    del there["text_model.encoder.layers.0.self_attn.v_proj.bias"]
    with pytest.raises(ValueError, match=r"parts are missing: transformer\.resblocks\.0\.attn\.in_proj_bias"):
        open_clip.from_hf(there)
    with pytest.raises(ValueError, match="not the image tower of a CLIP"):
        open_clip.fields({name: x for name, x in there.items() if not name.startswith("vision")})
