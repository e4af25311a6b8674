"""Vision transformers (arXiv 2010.11929) as feature extractors and classifiers, such as google/vit-base-patch16-224.

Pre-norm blocks, class token, learned positions. Folders of ViTModel and of ViTForImageClassification; of the latter
``models.load(folder, part="body")`` gives the model without its head. Checked against ``transformers`` to 1e-5.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from taskvec.io import names
from taskvec.models import layers, vision
from taskvec.models.base import Array, Model, fields_of
from taskvec.tree import Tree

# Of google/vit-*, where a folder has no preprocessor_config.json.
MEAN = STD = (0.5, 0.5, 0.5)
CLASSIFIER = "ViTForImageClassification"


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of a Hugging Face ``config.json`` that the model depends on, under their names there.

    `labels` are the class names of ``id2label``, in order; none for a model without a head. `image_mean` and
    `image_std` are those of ``preprocessor_config.json``.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    image_mean: tuple[float, ...] = MEAN
    image_std: tuple[float, ...] = STD
    labels: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], part: str | None = None) -> "Config":
        """Makes a config; raises `ValueError` for what is not computed here.

        Args:
          fields: of ``config.json``.
          part: ``body`` for the model without its head.
        """
        if part not in (None, "body"):
            raise ValueError(f"unknown part {part!r} of a ViT; allowed: body")
        config = cls(**fields_of(cls, fields))
        vision.check(fields, config, {"num_channels": 3}, "ViT")
        if part == "body" or CLASSIFIER not in (fields.get("architectures") or ()):
            return config
        # Two classes without names are what transformers leaves out of its files.
        found = fields.get("id2label") or {str(i): f"LABEL_{i}" for i in range(fields.get("num_labels", 2))}
        return dataclasses.replace(config, labels=tuple(found[str(i)] for i in range(len(found))))

    def to_json(self) -> dict[str, Any]:
        """The fields of a ``config.json`` that says the same."""
        fields = {**dataclasses.asdict(self), "model_type": "vit", "architectures": ["ViTModel"]}
        if labels := fields.pop("labels"):
            fields |= {"architectures": [CLASSIFIER], "id2label": {str(i): label for i, label in enumerate(labels)}}
            fields["label2id"] = {label: i for i, label in enumerate(labels)}
        return fields


def table(config: Config) -> names.Table:
    """Names of the tensors of a config."""
    attention = {name: f"attention.attention.{name}" for name in ("query", "key", "value")}
    rest = {"output": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}
    rest |= {"attention_norm": "layernorm_before", "mlp_norm": "layernorm_after"}
    rules = (
        names.Rule("embeddings.cls_token", "embeddings/class"),
        names.Rule("embeddings.position_embeddings", "embeddings/position"),
        names.Rule("embeddings.patch_embeddings.projection.weight", "embeddings/patch/kernel", "conv"),
        names.Rule("embeddings.patch_embeddings.projection.bias", "embeddings/patch/bias"),
        *vision.block_rules("encoder.layer.{}", attention, rest, config.qkv_bias),
        *names.norm("layernorm", "norm"),
    )
    # Features are those of the class token, which use neither the pooler nor what is left of pre-training.
    ignore = (r"pooler\..*", r"embeddings\.mask_token", r"decoder\..*")
    if not config.labels:
        return names.Table(rules, (*ignore, r"classifier\..*"), prefix="vit.")
    prefixed = tuple(names.Rule(f"vit.{rule.name}", rule.path, rule.op) for rule in rules)
    return names.Table((*prefixed, *names.dense("classifier", "head")), ignore, prefix="vit.")


def make(config: Config, dtype: Any = jnp.float32) -> Model:
    """The model of a config; `dtype` is that of its params."""
    return Model(
        name="vit",
        config=config,
        apply=functools.partial(apply, config),
        abstract=abstract(config, dtype),
        feature_dim=config.hidden_size,
        scanned=True,
        table=table(config),
    )


def abstract(config: Config, dtype: Any = jnp.float32) -> Tree:
    """Shapes and dtypes of the params; class token and positions have the leading axes that they have in files."""
    d, p = config.hidden_size, config.patch_size

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    tree = {
        "embeddings": {
            "class": array(1, 1, d),
            "position": array(1, 1 + (config.image_size // p) ** 2, d),
            "patch": {"kernel": array(p, p, 3, d), "bias": array(d)},
        },
        "blocks": vision.abstract_blocks(config, dtype, config.qkv_bias),
        "norm": {"scale": array(d), "bias": array(d)},
    }
    classes = len(config.labels)
    return {**tree, "head": {"kernel": array(d, classes), "bias": array(classes)}} if classes else tree


def apply(config: Config, params: Tree, batch: Mapping[str, Array], **how: Any) -> dict[str, Array]:
    """Runs the model.

    Args:
      config: of the model.
      params: as `abstract` describes.
      batch: ``image`` ``[B, H, W, 3]``, RGB: uint8, normalised here, or float, normalised already (with the
        config's `image_mean` and `image_std`).
      **how: see `taskvec.models.layers.Options`.

    Returns:
      ``features`` float32 ``[B, d]``, the normalised class token, to which a head is applied; ``tokens``
      ``[B, 1 + P, d]``, the normalised last layer; ``logits`` float32 ``[B, C]`` if there is a head; captured pieces.
    """
    options = layers.options_of(how)
    x = vision.embed(params["embeddings"], vision.pixels(batch["image"], config), options.dtype)
    block = functools.partial(vision.block, config, None)
    x, captured, _ = layers.run_blocks(block, params["blocks"], layers.Tap(options, options.key).drop(x), options)
    x = layers.layer_norm(params["norm"], x, config.layer_norm_eps)
    features = x[:, 0].astype(jnp.float32)
    out = {"features": features, "tokens": x, **captured}
    if "head" in params:
        out["logits"] = layers.dense(layers.cast(params["head"], jnp.float32), features)
    return out
