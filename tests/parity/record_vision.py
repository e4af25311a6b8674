"""Records what transformers computes for random tiny CLIPs and ViTs (extra `parity`); run once, from the root:

    python tests/parity/record_vision.py

Computed in float64 and stored as float32, as in record.py.
"""

import pathlib

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent.parent / "models" / "recorded"
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
          "image_size": 24, "patch_size": 8, "projection_dim": 20}  # fmt: skip
# 20 pixels are three patches of 6, and two pixels that no patch covers.
ODD = {"hidden_size": 18, "intermediate_size": 31, "num_hidden_layers": 2, "num_attention_heads": 3,
       "image_size": 20, "patch_size": 6, "hidden_act": "gelu"}  # fmt: skip
TEXT = {"hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 61,
        "max_position_embeddings": 12, "bos_token_id": 59, "eos_token_id": 60, "pad_token_id": 60}  # fmt: skip
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "bird"}, "label2id": {"cat": 0, "dog": 1, "bird": 2}}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def perturbed(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The usual initialisation is too small to show a wrong bias or scale."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images(seed: int, size: int, batch: int = 4) -> np.ndarray:
    """Random uint8 images."""
    return np.random.default_rng(seed).integers(0, 256, (batch, size, size, 3), np.uint8)


def values(image: np.ndarray, mean, std) -> torch.Tensor:
    """What transformers' models take: normalised, channels first."""
    x = (torch.from_numpy(image).double() / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
    return x.permute(0, 3, 1, 2)


def texts(seed: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens of different lengths, with first and last token, padded by the last one as by CLIP's tokenizer."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, TEXT["bos_token_id"], (5, length)).astype(np.int32)
    lengths = rng.integers(2, length + 1, 5)
    ids[:, 0] = TEXT["bos_token_id"]
    mask = np.arange(length) < lengths[:, None]
    ids[~mask] = TEXT["eos_token_id"]
    ids[np.arange(5), lengths - 1] = TEXT["eos_token_id"]
    return ids, mask


def run(model: torch.nn.Module, **inputs) -> dict[str, np.ndarray]:
    """Outputs of interest, in float64."""
    with torch.no_grad():
        out = model.double().eval()(**inputs)
    wanted = ("last_hidden_state", "pooler_output", "logits", "logits_per_image", "image_embeds", "text_embeds")
    return {name: out[name].numpy().astype(np.float32) for name in wanted if out.get(name) is not None}


def write(name: str, model: torch.nn.Module, **arrays) -> None:
    """A Hugging Face folder with an ``outputs.npz``."""
    model.float().save_pretrained(HERE / name)
    np.savez_compressed(HERE / name / "outputs.npz", **arrays)


def record_tower() -> None:
    """An image tower, as FusionBench publishes them."""
    model = perturbed(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)), 0)
    image = images(0, VISION["image_size"])
    write("clip_tower", model, image=image, **run(model, pixel_values=values(image, CLIP_MEAN, CLIP_STD)))


def record_both() -> None:
    """A whole CLIP, and its texts again with the end of text found the old way."""
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=ODD, projection_dim=14)
    model = perturbed(transformers.CLIPModel(config), 1)
    image, (ids, mask) = images(1, ODD["image_size"]), texts(1, TEXT["max_position_embeddings"] - 1)
    tokens = {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(mask).long()}
    pixel_values = values(image, CLIP_MEAN, CLIP_STD)
    out = run(model, pixel_values=pixel_values, **tokens)
    tower = run(model.text_model, **tokens)
    out |= {"text_last_hidden_state": tower["last_hidden_state"], "text_pooler_output": tower["pooler_output"]}
    # The embeddings of the outputs are of unit length; ours are not.
    with torch.no_grad():
        for name, found in (
            ("image", model.get_image_features(pixel_values)),
            ("text", model.get_text_features(**tokens)),
        ):
            out[f"{name}_embeds"] = found.pooler_output.numpy().astype(np.float32)
        model.text_model.eos_token_id = 2
        ids_old = np.where(mask, ids, 0)[:, ::-1].copy()  # the highest token stands anywhere
        old = model.get_text_features(torch.from_numpy(ids_old).long()).pooler_output
    model.text_model.eos_token_id = TEXT["eos_token_id"]
    write(
        "clip_both", model, image=image, ids=ids, mask=mask, ids_old=ids_old, old=old.numpy().astype(np.float32), **out
    )


def record_vit() -> None:
    """A classifier, and a model without head whose queries, keys and values have no bias."""
    fields = {k: v for k, v in VISION.items() if k != "projection_dim"}
    model = perturbed(transformers.ViTForImageClassification(transformers.ViTConfig(**fields, **LABELS)), 2)
    image = images(2, VISION["image_size"])
    pixel_values = values(image, (0.5,) * 3, (0.5,) * 3)
    out = run(model, pixel_values=pixel_values) | run(model.vit, pixel_values=pixel_values)
    write("vit_classifier", model, image=image, **out)
    model = perturbed(transformers.ViTModel(transformers.ViTConfig(**ODD, qkv_bias=False)), 3)
    image = images(3, ODD["image_size"])
    out = run(model, pixel_values=values(image, (0.5,) * 3, (0.5,) * 3))
    write("vit_odd", model, image=image, last_hidden_state=out["last_hidden_state"])


if __name__ == "__main__":
    HERE.mkdir(parents=True, exist_ok=True)
    record_tower()
    record_both()
    record_vit()
