"""CLIP under the names of OpenAI and OpenCLIP: to the names of Hugging Face and back, and whole files.

    open_clip.convert("checkpoints/ViT-B-32/MNIST/finetuned.pt", "mnist")   # a folder that `taskvec.models.load` takes

Their models have one fused matrix for queries, keys and values (``in_proj_weight``, in this order) and projections that
are not transposed (``x @ proj``). The image encoders of the task_vectors line (arXiv 2212.04089) are OpenCLIP models
without the blocks of the text tower: the rest of that tower is frozen and is left out here.
"""

import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from taskvec.io import safetensors, torch_modules
from taskvec.io.atomic import write_text
from taskvec.messages import some

PathLike = str | os.PathLike

# Name there -> name in Hugging Face's CLIPModel.
_OUTSIDE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
    **{f"visual.ln_pre.{x}": f"vision_model.pre_layrnorm.{x}" for x in ("weight", "bias")},
    **{f"visual.ln_post.{x}": f"vision_model.post_layernorm.{x}" for x in ("weight", "bias")},
    **{f"ln_final.{x}": f"text_model.final_layer_norm.{x}" for x in ("weight", "bias")},
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_TOWERS = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
_INSIDE = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
_FUSED = ("q_proj", "k_proj", "v_proj")
# Constants that some files hold besides.
_IGNORED = r"(.*\.)?attn_mask|input_resolution|context_length|vocab_size"
_WRAPPED = r"((module|model|image_encoder)\.)+"


def to_hf(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors under Hugging Face's names, queries, keys and values apart.

    Args:
      tensors: under OpenCLIP's names, with ``module.``, ``model.`` or ``image_encoder.`` in front or without.

    Raises:
      ValueError: names that no CLIP with vision transformer has; lists them.
    """
    found: dict[str, np.ndarray] = {}
    unknown = []
    for name, x in tensors.items():
        bare = re.sub(f"^{_WRAPPED}", "", name)
        if re.fullmatch(_IGNORED, bare):
            continue
        made = _one_to_hf(bare, np.asarray(x))
        unknown += [] if made else [name]
        found |= made
    if unknown:
        raise ValueError(f"these are no names of an OpenCLIP model with a vision transformer: {some(sorted(unknown))}")
    return found


def _one_to_hf(name: str, x: np.ndarray) -> dict[str, np.ndarray]:
    """One tensor under its new name or names; none if the name is unknown."""
    if name in _OUTSIDE:
        return {_OUTSIDE[name]: x}
    if name in _TRANSPOSED:
        return {_TRANSPOSED[name]: x.T}
    tower, number, inside = _inside(name)
    at = f"{_TOWERS.get(tower)}.{number}."
    piece, _, kind = inside.rpartition(".")
    if tower in _TOWERS and piece in _INSIDE and kind in ("weight", "bias"):
        return {f"{at}{_INSIDE[piece]}.{kind}": x}
    if tower in _TOWERS and inside in ("attn.in_proj_weight", "attn.in_proj_bias") and len(x) % 3 == 0:
        kind = inside.rpartition("_")[2]
        return {f"{at}self_attn.{q}.{kind}": part for q, part in zip(_FUSED, np.split(x, 3), strict=True)}
    return {}


def _inside(name: str) -> tuple[str, str, str]:
    """``TOWER.NUMBER.REST`` as three strings, empty ones if the name has no number."""
    found = re.fullmatch(r"(.*?)\.(\d+)\.(.*)", name)
    return found.groups() if found else ("", "", "")


def from_hf(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverse of `to_hf`, without a prefix.

    Args:
      tensors: under the names of CLIPModel, or of an image tower saved alone, with or without ``vision_model.``.

    Raises:
      ValueError: names that no CLIP has, or a block without all three of queries, keys and values.
    """
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    transposed = {theirs: ours for ours, theirs in _TRANSPOSED.items()}
    towers, pieces = ({v: k for k, v in x.items()} for x in (_TOWERS, _INSIDE))
    alone = not any(name.startswith(("vision_model.", "text_model.")) for name in tensors)
    found, unknown, parts = {}, [], {}
    for name, x in tensors.items():
        full = f"vision_model.{name}" if alone and name not in transposed else name
        tower, number, inside = _inside(full)
        piece, _, kind = inside.rpartition(".")
        at = f"{towers.get(tower)}.{number}."
        if full in outside:
            found[outside[full]] = np.asarray(x)
        elif full in transposed:
            found[transposed[full]] = np.asarray(x).T
        elif tower in towers and piece in pieces:
            found[f"{at}{pieces[piece]}.{kind}"] = np.asarray(x)
        elif tower in towers and piece.removeprefix("self_attn.") in _FUSED:
            parts.setdefault(f"{at}attn.in_proj_{kind}", {})[piece.removeprefix("self_attn.")] = np.asarray(x)
        elif not full.endswith(".position_ids"):
            unknown.append(name)
    unknown += [fused for fused, x in parts.items() if len(x) < 3]
    if unknown:
        raise ValueError(f"these are no names of a Hugging Face CLIP, or parts are missing: {some(sorted(unknown))}")
    return found | {fused: np.concatenate([x[q] for q in _FUSED]) for fused, x in parts.items()}


def read(path: PathLike) -> dict[str, np.ndarray]:
    """Tensors of a file under the names that it gives them.

    Args:
      path: a ``.safetensors`` file, or what `taskvec.io.torch_modules.load_module` takes (``.pt``, ``.pth``, ``.bin``:
        state dicts, pickled image encoders, OpenAI's archives); nothing that it holds is run.
    """
    if pathlib.Path(path).suffix == ".safetensors":
        return dict(safetensors.load(path))
    return torch_modules.load_module(path)


def fields(tensors: Mapping[str, np.ndarray], hidden_act: str = "quick_gelu", head_width: int = 64) -> dict[str, Any]:
    """The fields of Hugging Face's ``config.json``, as far as shapes tell them.

    Args:
      tensors: as from `to_hf`. With both towers the model is a ``clip``, else a ``clip_vision_model``.
      hidden_act: activation, which no shape tells: ``quick_gelu`` in OpenAI's weights and all that starts from them,
        ``gelu`` in most of OpenCLIP's own.
      head_width: of an attention head; 64 in B/32, B/16 and L/14.

    Raises:
      ValueError: there is no image tower, or its shapes are not those of a CLIP.
    """

    def tower(at: str) -> dict[str, Any]:
        depth = next(n for n in itertools.count() if f"{at}.encoder.layers.{n}.layer_norm1.weight" not in tensors)
        ff, width = tensors[f"{at}.encoder.layers.0.mlp.fc1.weight"].shape
        return {
            "hidden_size": width, "intermediate_size": ff, "num_hidden_layers": depth,
            "num_attention_heads": width // head_width, "hidden_act": hidden_act,
        }  # fmt: skip

    try:
        patch = tensors["vision_model.embeddings.patch_embedding.weight"].shape[-1]
        positions = len(tensors["vision_model.embeddings.position_embedding.weight"])
        projection, _ = tensors["visual_projection.weight"].shape
        vision = tower("vision_model")
    except KeyError as error:
        raise ValueError(f"no tensor {error}: this is not the image tower of a CLIP") from None
    vision |= {"image_size": math.isqrt(positions - 1) * patch, "patch_size": patch, "projection_dim": projection}
    if "text_model.encoder.layers.0.layer_norm1.weight" not in tensors:
        return {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModelWithProjection"], **vision}
    words, _ = tensors["text_model.embeddings.token_embedding.weight"].shape
    text = tower("text_model") | {
        "vocab_size": words, "max_position_embeddings": len(tensors["text_model.embeddings.position_embedding.weight"]),
        "bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1, "projection_dim": projection,
    }  # fmt: skip
    both = {"vision_config": vision, "text_config": text, "projection_dim": projection}
    return {"model_type": "clip", "architectures": ["CLIPModel"], **both}


def convert(path: PathLike, folder: PathLike, hidden_act: str = "quick_gelu", head_width: int = 64) -> None:
    """Writes a Hugging Face folder from a file with OpenCLIP's names; arguments as of `read` and `fields`.

    A file with both towers becomes a ``clip``; one whose text tower has no blocks an image tower with its projection,
    from which the rest of the text tower is left out. Half-precision weights (OpenAI's) stay so.

    Raises:
      ValueError: as `read`, `to_hf` and `fields`.
    """
    tensors = to_hf(read(path))
    config = fields(tensors, hidden_act, head_width)
    if config["model_type"] == "clip_vision_model":
        tensors = {name: x for name, x in tensors.items() if name.startswith(("vision_model.", "visual_projection."))}
    folder = pathlib.Path(folder)
    safetensors.save(folder, {name: np.asarray(x, order="C") for name, x in tensors.items()})
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
