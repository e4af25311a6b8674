"""CLIP (arXiv 2103.00020): the image tower, the text tower, and both.

Three kinds of Hugging Face folder: ``clip_vision_model`` (such as FusionBench's fine-tuned checkpoints),
``clip_text_model`` and ``clip``; and parts of a ``clip`` folder:

    model, params = models.load(folder, part="vision")            # as a folder of CLIPVisionModel
    model, params = models.load(folder, part="vision_projected")  # with the projection, as OpenAI's image encoder
    model, params = models.load(folder, part="text")              # with the projection

A tower has its blocks at the top of its tree, so that merging inside the scan works. The features of the image tower
alone are its pooled output: FusionBench keeps the projection frozen, as a part of its heads. With the projection (and
in ``clip``) they are the image embedding, and the projection is among the params: so it is in the checkpoints of
OpenCLIP. Embeddings are not normalised. Checked against ``transformers`` to 1e-5.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from taskvec.io import names
from taskvec.models import layers, vision
from taskvec.models.base import Array, Model, fields_of
from taskvec.tree import Tree

# Statistics of the pixels that CLIP was trained on, in [0, 1]; where a folder has no preprocessor_config.json.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Tower:
    """What the configs of the towers share."""

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Any:
        """Makes a config; raises `ValueError` for what is not computed here."""
        projected = {"projected": cls.architectures[True] in (fields.get("architectures") or ())}
        config = cls(**fields_of(cls, fields) | projected)
        vision.check(fields, config, {"num_channels": 3}, "CLIP tower")
        if not isinstance(getattr(config, "eos_token_id", 0), int):
            raise ValueError(f"config.json has eos_token_id={fields['eos_token_id']!r}; the CLIP tower here has one")
        return config

    def to_json(self) -> dict[str, Any]:
        """The fields of a ``config.json`` that says the same."""
        fields = dataclasses.asdict(self)
        architecture = self.architectures[fields.pop("projected")]
        return {**fields, "model_type": self.model_type, "architectures": [architecture]}


@dataclasses.dataclass(frozen=True)
class VisionConfig(Tower):
    """What of ``config.json`` and the image processor the image tower depends on, and whether it has a projection."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    image_mean: tuple[float, ...] = MEAN
    image_std: tuple[float, ...] = STD
    projected: bool = False

    model_type = "clip_vision_model"
    architectures = ("CLIPVisionModel", "CLIPVisionModelWithProjection")


@dataclasses.dataclass(frozen=True)
class TextConfig(Tower):
    """The same for the text tower."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    projection_dim: int = 512
    projected: bool = False

    model_type = "clip_text_model"
    architectures = ("CLIPTextModel", "CLIPTextModelWithProjection")


@dataclasses.dataclass(frozen=True)
class Config:
    """Both towers, which have projections."""

    vision_config: VisionConfig
    text_config: TextConfig
    projection_dim: int = 512

    def to_json(self) -> dict[str, Any]:
        """The fields of a ``config.json`` that says the same."""
        towers = {name: getattr(self, name).to_json() for name in ("vision_config", "text_config")}
        return {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": self.projection_dim, **towers}


AnyConfig = Config | VisionConfig | TextConfig
PARTS = ("vision", "vision_projected", "text")


def from_json(fields: Mapping[str, Any], part: str | None = None) -> AnyConfig:
    """The config of a folder, or of a part of it.

    Args:
      fields: of ``config.json``.
      part: one of `PARTS` (see above), or ``None`` for all that the folder is.

    Raises:
      ValueError: no such part, or what is not computed here.
    """
    if part not in (None, *PARTS):
        raise ValueError(f"unknown part {part!r} of CLIP; allowed: {', '.join(PARTS)}")
    if fields["model_type"] == "clip":
        return _of_both(fields, part)
    kind = VisionConfig if fields["model_type"] == VisionConfig.model_type else TextConfig
    config = kind.from_json(fields)
    if part is None:
        return config
    wanted = part != "vision"
    if part.startswith("vision") != (kind is VisionConfig) or wanted > config.projected:
        raise ValueError(f"a folder of {kind.architectures[config.projected]} has no part {part!r}")
    return dataclasses.replace(config, projected=wanted)


def _of_both(fields: Mapping[str, Any], part: str | None) -> AnyConfig:
    width, pixels = fields.get("projection_dim", 512), {k: x for k, x in fields.items() if k.startswith("image_")}

    def tower(kind: type[Tower], name: str, projected: bool = True) -> Any:
        # Where both keys stand, the older one wins, as in transformers.
        config = kind.from_json((fields.get(f"{name}_dict") or fields.get(name) or {}) | pixels)
        return dataclasses.replace(config, projection_dim=width, projected=projected)

    if part is None:
        return Config(tower(VisionConfig, "vision_config"), tower(TextConfig, "text_config"), width)
    kind, name = (TextConfig, "text_config") if part == "text" else (VisionConfig, "vision_config")
    return tower(kind, name, part != "vision")


def _rules(tower: str, at: str = "", to: str = "") -> tuple[names.Rule, ...]:
    """Rules of a tower, whose names begin with `at` and whose paths with `to`."""
    layer = {"output": "self_attn.out_proj", "up": "mlp.fc1", "down": "mlp.fc2"}
    layer |= {"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2"}
    attention = {name: f"self_attn.{name[0]}_proj" for name in ("query", "key", "value")}
    rules = [
        names.Rule("embeddings.position_embedding.weight", "embeddings/position"),
        *vision.block_rules("encoder.layers.{}", attention, layer),
    ]
    if tower == "vision":
        rules += [
            names.Rule("embeddings.class_embedding", "embeddings/class"),
            names.Rule("embeddings.patch_embedding.weight", "embeddings/patch/kernel", "conv"),
            *names.norm("pre_layrnorm", "embeddings/norm"),
            *names.norm("post_layernorm", "norm"),
        ]
    else:
        word = names.Rule("embeddings.token_embedding.weight", "embeddings/word")
        rules += [word, *names.norm("final_layer_norm", "norm")]
    return tuple(names.Rule(at + rule.name, to + rule.path, rule.op) for rule in rules)


def _projection(tower: str, to: str = "") -> names.Rule:
    name = {"vision": "visual_projection.weight", "text": "text_projection.weight"}[tower]
    return names.Rule(name, f"{to}projection/kernel", "transpose")


def table(config: AnyConfig) -> names.Table:
    """Names of a config's tensors; what belongs to the other tower is left out."""
    # Position numbers are constants, stored by old versions.
    numbers = r"(vision_model\.|text_model\.)?embeddings\.position_ids"
    if isinstance(config, Config):
        rules = [names.Rule("logit_scale", "logit_scale")]
        for tower in ("vision", "text"):
            rules += [*_rules(tower, f"{tower}_model.", f"{tower}/"), _projection(tower, f"{tower}/")]
        return names.Table(tuple(rules), ignore=(numbers,))
    tower, other = ("vision", "text") if isinstance(config, VisionConfig) else ("text", "vision")
    ignore = (numbers, "logit_scale", rf"{other}_model\..*", re.escape(_projection(other).name))
    if config.projected:
        return names.Table((*_rules(tower, f"{tower}_model."), _projection(tower)), ignore, f"{tower}_model.")
    return names.Table(_rules(tower), (*ignore, re.escape(_projection(tower).name)), f"{tower}_model.")


def make(config: AnyConfig, dtype: Any = jnp.float32) -> Model:
    """The model of a config; `dtype` is that of its params."""
    both = isinstance(config, Config)
    return Model(
        name="clip" if both else config.model_type,
        config=config,
        apply=functools.partial(apply if both else apply_tower, config),
        abstract=abstract(config, dtype),
        feature_dim=config.projection_dim if both or config.projected else config.hidden_size,
        scanned=True,
        table=table(config),
    )


def abstract(config: AnyConfig, dtype: Any = jnp.float32) -> Tree:
    """Shapes and dtypes of the params: of a tower, or ``{vision, text, logit_scale}``."""

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    if isinstance(config, Config):
        towers = {"vision": abstract(config.vision_config, dtype), "text": abstract(config.text_config, dtype)}
        return {**towers, "logit_scale": array()}
    d = config.hidden_size
    norm = {"scale": array(d), "bias": array(d)}
    if isinstance(config, VisionConfig):
        p, grid = config.patch_size, config.image_size // config.patch_size
        patch = {"kernel": array(p, p, 3, d)}
        embeddings = {"class": array(d), "patch": patch, "position": array(1 + grid * grid, d), "norm": dict(norm)}
    else:
        embeddings = {"word": array(config.vocab_size, d), "position": array(config.max_position_embeddings, d)}
    tree = {"embeddings": embeddings, "blocks": vision.abstract_blocks(config, dtype), "norm": norm}
    return {**tree, "projection": {"kernel": array(d, config.projection_dim)}} if config.projected else tree


def apply(config: Config, params: Tree, batch: Mapping[str, Array], **how: Any) -> dict[str, Array]:
    """Runs the towers that the batch has something for.

    Args:
      config: of both.
      params: as `abstract` describes.
      batch: ``image``, or ``ids`` and ``mask``, or all three, with different numbers of rows if need be.
      **how: see `taskvec.models.layers.Options`; both towers get them.

    Returns:
      what `apply_tower` gives, with ``image_`` or ``text_`` before each name; ``features``, the image embeddings, else
      those of the texts; with both, ``logits`` float32 ``[images, texts]``, cosines times ``exp(logit_scale)``.
    """
    out = {}
    for name, key, tower in (("image", "image", "vision"), ("text", "ids", "text")):
        if key in batch:
            found = apply_tower(getattr(config, f"{tower}_config"), params[tower], batch, **how)
            out |= {f"{name}_{k}": x for k, x in found.items()}
    found = [out[k] for k in ("image_features", "text_features") if k in out]
    if not found:
        raise ValueError(f"the batch has {', '.join(batch)}; CLIP needs image, or ids, or both")
    if len(found) == 2:
        image, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in found)
        out["logits"] = jnp.exp(params["logit_scale"].astype(jnp.float32)) * (image @ text.T)
    return {"features": found[0], **out}


def apply_tower(
    config: VisionConfig | TextConfig, params: Tree, batch: Mapping[str, Array], **how: Any
) -> dict[str, Array]:
    """Runs one tower.

    Args:
      config: of the tower.
      params: as `abstract` describes; the word table may be any object with ``take(ids, axis=0)``.
      batch: ``image`` ``[B, H, W, 3]``, RGB: uint8, normalised here, or float, normalised already. Or ``ids``
        int32 ``[B, N]`` with the tokenizer's first and last token, and ``mask`` bool ``[B, N]``, which may be left out.
      **how: see `taskvec.models.layers.Options`.

    Returns:
      ``features`` float32, the projected embedding if there is a projection, else ``pooled``; ``pooled`` float32
      ``[B, d]``, the normalised output at the class token or at the end of the text; ``tokens`` ``[B, N, d]``, the
      last layer (of texts, normalised), as ``last_hidden_state`` of transformers; captured pieces.
    """
    options = layers.options_of(how)
    start = _image if isinstance(config, VisionConfig) else _text
    x, bias, at = start(config, params["embeddings"], batch, options)
    block = functools.partial(vision.block, config, bias)
    x, captured, _ = layers.run_blocks(block, params["blocks"], layers.Tap(options, options.key).drop(x), options)
    if at is None:
        pooled = layers.layer_norm(params["norm"], x[:, 0].astype(jnp.float32), config.layer_norm_eps)
    else:
        x = layers.layer_norm(params["norm"], x, config.layer_norm_eps)
        pooled = jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0].astype(jnp.float32)
    features = pooled @ params["projection"]["kernel"].astype(jnp.float32) if config.projected else pooled
    return {"features": features, "pooled": pooled, "tokens": x, **captured}


def _image(config: VisionConfig, weights: Tree, batch: Mapping[str, Array], options: layers.Options):
    x = vision.embed(weights, vision.pixels(batch["image"], config), options.dtype)
    return layers.layer_norm(weights["norm"], x, config.layer_norm_eps), None, None


def _text(config: TextConfig, weights: Tree, batch: Mapping[str, Array], options: layers.Options):
    ids, length = batch["ids"], batch["ids"].shape[1]
    if length > config.max_position_embeddings:
        raise ValueError(f"texts of {length} tokens, but the model has {config.max_position_embeddings} positions")
    x = weights["word"].take(ids, axis=0) + weights["position"].take(jnp.arange(length), axis=0)
    bias = layers.causal_bias(batch.get("mask", jnp.ones((1, length), bool)))
    # OpenAI's end of text is the highest token; configs of theirs say 2, which is no such token.
    end = ids if config.eos_token_id == 2 else ids == config.eos_token_id
    return x.astype(options.dtype or x.dtype), bias, jnp.argmax(end, axis=1)
