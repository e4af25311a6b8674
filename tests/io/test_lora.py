"""Adapters as models. The oracle is the sum written out with float64 matrices."""

import numpy as np
import pytest

from taskvec.io.folders import open_model
from tests.io.folders_for_tests import BF16, adapter, pair, tensors, write

BASE = {
    "model.layers.0.self_attn.q_proj.weight": (6, 4),
    "model.layers.1.self_attn.q_proj.weight": (6, 4),
    "model.layers.0.mlp.c_fc.weight": (4, 10),
    "model.embed_tokens.weight": (11, 4),
    "patch.weight": (5, 3, 2, 2),
    "model.norm.weight": (4,),
    "score.weight": (2, 4),
}


def check_rows(model, name, wanted):
    np.testing.assert_allclose(model.read(name), wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(model.read(name, slice(1, 3)), wanted[1:3], rtol=1e-6, atol=1e-6)
    assert model.read(name).dtype == model.specs[name].dtype == np.float32


def test_lora_sums(tmp_path):
    base = tensors(BASE, 0, dtype=BF16)
    write(tmp_path / "base", base)
    q0, q1, c = (f"model.layers.{i}" for i in ("0.self_attn.q_proj", "1.self_attn.q_proj", "0.mlp.c_fc"))
    factors = pair(q0, (2, 4), (6, 2)) | pair(q1, (3, 4), (6, 3), seed=1, dtype=BF16)
    factors |= pair("patch", (2, 3, 2, 2), (5, 2, 1, 1), seed=2)
    factors |= pair("model.embed_tokens", (2, 11), (4, 2), "lora_embedding_{}", seed=3)
    factors |= {"score.weight": np.ones((2, 4), np.float32)}
    adapter(
        tmp_path / "a", factors, rank_pattern={"layers.1.self_attn.q_proj": 3}, alpha_pattern={r".*\.0\..*q_proj": 8}
    )
    model = open_model(tmp_path / "a", open_model(tmp_path / "base"))
    wide = {k: v.astype(np.float64) for k, v in (base | factors).items()}
    part = lambda module, kind="lora_{}.weight": [wide[f"{module}.{kind.format(x)}"] for x in "AB"]
    a, b = part(q0)
    check_rows(model, f"{q0}.weight", wide[f"{q0}.weight"] + 8 / 2 * b @ a)
    a, b = part(q1)
    check_rows(model, f"{q1}.weight", wide[f"{q1}.weight"] + 3 / 3 * b @ a)
    a, b = part("model.embed_tokens", "lora_embedding_{}")
    check_rows(model, "model.embed_tokens.weight", wide["model.embed_tokens.weight"] + 3 / 2 * (b @ a).T)
    a, b = part("patch")
    wanted = wide["patch.weight"] + 3 / 2 * np.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
    check_rows(model, "patch.weight", wanted)
    np.testing.assert_array_equal(model.read("score.weight"), 1)
    assert model.read(f"{c}.weight").dtype == BF16 and model.path_of(f"{c}.weight").parent.name == "base"
    assert model.home == tmp_path / "base" and model.kind == "lora"


def test_lora_of_transposed_weights_with_rslora_on_a_base_without_prefix(tmp_path):
    base = tensors({"h.0.c_fc.weight": (4, 10), "wte.weight": (5, 4)}, 0)
    write(tmp_path / "base", base)
    factors = pair("transformer.h.0.c_fc", (2, 4), (10, 2))
    adapter(
        tmp_path / "a", factors, fan_in_fan_out=True, use_rslora=True, base_model_name_or_path=str(tmp_path / "base")
    )
    a, b = (x.astype(np.float64) for x in factors.values())
    for model in (open_model(tmp_path / "a"), open_model(f"{tmp_path / 'base'}+{tmp_path / 'a'}")):
        check_rows(model, "h.0.c_fc.weight", base["h.0.c_fc.weight"] + 3 / np.sqrt(2) * (b @ a).T)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "of type LOHA; only LORA"),
        ({"use_dora": True}, "use_dora set, and DoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias set"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices set"),
        ({"layer_replication": [[0, 2]]}, "layer_replication set"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"r": 5}, "has rank 2, but adapter_config.json says 5"),
    ],
)
def test_adapters_that_are_no_plain_sum(tmp_path, config, message):
    write(tmp_path / "base", tensors(BASE, 0))
    adapter(tmp_path / "a", pair("model.layers.0.self_attn.q_proj", (2, 4), (6, 2)), **config)
    with pytest.raises(ValueError, match=message):
        open_model(tmp_path / "a", open_model(tmp_path / "base"))


def test_adapters_that_do_not_fit(tmp_path):
    base = open_model(write(tmp_path / "base", tensors(BASE, 0)))
    name = "model.layers.0.self_attn.q_proj"
    adapter(tmp_path / "other", pair("model.layers.9.self_attn.q_proj", (2, 4), (6, 2)))
    with pytest.raises(
        ValueError, match=r"adapts model.layers.9.self_attn.q_proj.weight, which its base does not have"
    ):
        open_model(tmp_path / "other", base)
    adapter(tmp_path / "shape", pair(name, (2, 4), (7, 2)))
    with pytest.raises(ValueError, match=r"factors \[7, 2\] and \[2, 4\] do not fit"):
        open_model(tmp_path / "shape", base)
    half = pair(name, (2, 4), (6, 2))
    adapter(tmp_path / "half", {k: v for k, v in half.items() if "lora_A" in k})
    with pytest.raises(ValueError, match=r"lacks a factor for model.layers.0.self_attn.q_proj"):
        open_model(tmp_path / "half", base)
    adapter(tmp_path / "dora", half | {f"{name}.lora_magnitude_vector": np.ones(6, np.float32)})
    with pytest.raises(ValueError, match="no factor of a plain LoRA"):
        open_model(tmp_path / "dora", base)
