"""CLIP and ViT against transformers, live (extra `parity`): as saved there, and as saved here and opened there."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402

from taskvec import models  # noqa: E402

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 50}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 5, "projection_dim": 9}
TEXT = {**SMALL, "vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 48, "eos_token_id": 49,
        "pad_token_id": 49, "projection_dim": 9}  # fmt: skip
PIXELS = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
IDS = np.array([[48, 3, 5, 49, 49, 49], [48, 7, 11, 2, 40, 49]], np.int32)


def clip(kind):
    return kind(transformers.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=9))


def vit(kind, **more):
    return kind(transformers.ViTConfig(**{k: v for k, v in IMAGE.items() if k != "projection_dim"}, **more))


CASES = {
    "tower": (lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**IMAGE)), None),
    "projected": (lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**IMAGE)), None),
    "text": (lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)), None),
    "text_projected": (lambda: transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**TEXT)), None),
    "both": (lambda: clip(transformers.CLIPModel), None),
    "both_vision": (lambda: clip(transformers.CLIPModel), "vision"),
    "both_projected": (lambda: clip(transformers.CLIPModel), "vision_projected"),
    "both_text": (lambda: clip(transformers.CLIPModel), "text"),
    "vit": (lambda: vit(transformers.ViTModel), None),
    "classifier": (lambda: vit(transformers.ViTForImageClassification, num_labels=4), None),
    "no_bias": (lambda: vit(transformers.ViTForImageClassification, qkv_bias=False), None),
}


def theirs(model, part):
    """Features and logits of a transformers model, under our names."""
    x = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    tokens = {"input_ids": torch.from_numpy(IDS).long()}
    name = type(model).__name__
    with torch.no_grad():
        if name == "CLIPModel":
            image, text = model.get_image_features(x).pooler_output, model.get_text_features(**tokens).pooler_output
            logits = model(pixel_values=x, **tokens).logits_per_image
            pooled = model.vision_model(x).pooler_output
            wanted = {"vision": pooled, "vision_projected": image, "text": text}
            return {"features": wanted[part]} if part else {"features": image, "text_features": text, "logits": logits}
        if name.startswith("CLIP"):
            out = model(**tokens) if "Text" in name else model(pixel_values=x)
            projected = out.get("text_embeds" if "Text" in name else "image_embeds")
            return {"features": out.pooler_output if projected is None else projected, "tokens": out.last_hidden_state}
        if name == "ViTModel":
            return {"tokens": model(x).last_hidden_state}
        return {"logits": model(x).logits, "tokens": model.vit(x).last_hidden_state}


def agree(mine, wanted, tolerance=1e-5):
    for key, x in wanted.items():
        np.testing.assert_allclose(mine[key], x.numpy(), atol=tolerance, rtol=tolerance, err_msg=key)


@pytest.mark.parametrize("case", CASES)
def test_a_random_model_and_its_saved_copies(tmp_path, case):
    make, part = CASES[case]
    torch.manual_seed(0)
    reference = make().eval()
    reference.save_pretrained(tmp_path / "theirs")
    wanted = theirs(reference, part)
    model, params = models.load(tmp_path / "theirs", part=part)
    agree(jax.jit(model.apply)(params, {"image": PIXELS, "ids": IDS}), wanted)
    models.save(tmp_path / "copy", model, params, source=tmp_path / "theirs")
    agree({k: x.numpy() for k, x in theirs(opened(type(reference), tmp_path / "copy"), part).items()}, wanted, 0)
    models.save(tmp_path / "alone", model, params)
    architecture = getattr(transformers, model.config.to_json()["architectures"][0])
    alone = theirs(opened(architecture, tmp_path / "alone", ["pooler.dense.weight", "pooler.dense.bias"]), None)
    agree({k: x.numpy() for k, x in alone.items()}, {k: x for k, x in wanted.items() if k in alone}, 1e-6)


def opened(kind, folder, may_miss=()):
    """What transformers makes of a folder, which must hold nothing else."""
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not set(report["missing_keys"]) - {*may_miss} and not report["unexpected_keys"], report
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("patch", [32, 16])
def test_a_full_size_image_tower(tmp_path, patch):
    torch.manual_seed(0)
    reference = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(patch_size=patch)).eval()
    with torch.no_grad():
        for x in reference.parameters():
            x.add_(0.01 * torch.randn_like(x))
    reference.save_pretrained(tmp_path)
    x = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = reference(torch.from_numpy(x).permute(0, 3, 1, 2))
    model, params = models.load(tmp_path)
    mine = jax.jit(model.apply)(params, {"image": x})
    agree(mine, {"features": wanted.pooler_output}, 1e-4)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(p.numel() for p in reference.parameters())
    if patch == 32:
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 87_456_000


@pytest.mark.slow
def test_a_full_size_clip(tmp_path):
    torch.manual_seed(0)
    reference = transformers.CLIPModel(transformers.CLIPConfig()).eval()
    reference.save_pretrained(tmp_path)
    x = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
    ids = np.random.default_rng(0).integers(0, 49406, (3, 77)).astype(np.int32)
    ids[:, 0], ids[:, -1] = 49406, 49407
    with torch.no_grad():
        wanted = reference(input_ids=torch.from_numpy(ids).long(), pixel_values=torch.from_numpy(x).permute(0, 3, 1, 2))
    model, params = models.load(tmp_path)
    mine = jax.jit(model.apply)(params, {"image": x, "ids": ids})
    agree(mine, {"logits": wanted.logits_per_image}, 1e-4)
