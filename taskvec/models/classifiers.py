"""Classification heads that were trained together with a language model, as published checkpoints hold them.

transformers' ``...ForSequenceClassification`` of RoBERTa reads the first token through a dense layer, tanh and another;
that of BERT the same, the first layer being the pooler; those of GPT-2 and Llama the last token through one matrix
without bias. A merged model has its encoder from the merge and, for each task, the head of that task's expert.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskvec.io import torch_reader
from taskvec.messages import some
from taskvec.models.base import Array, Model
from taskvec.tree import Tree

# The layers by architecture, the names of their modules in a file.
LAYERS = {
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "bert": ("bert.pooler.dense", "classifier"),
    **dict.fromkeys(("gpt2", "llama", "mistral", "qwen2"), ("score",)),
}
_FIRST_TOKEN = ("roberta", "bert")


def with_features_for(model: Model) -> Model:
    """The model with the ``features`` that its kind of head reads: BERT's are else a mean over tokens.

    Raises:
      ValueError: a model of another kind.
    """
    _check(model.name)
    if model.name not in _FIRST_TOKEN:
        return model

    def apply(params: Tree, batch: Mapping[str, Array], **options: Any) -> dict[str, Array]:
        out = model.apply(params, batch, **options)
        return out | {"features": out["tokens"][:, 0].astype(jnp.float32)}

    return model._replace(apply=apply)


def load(folder: str | os.PathLike, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """The head of a Hugging Face folder, a function ``features [N, d] -> logits [N, C]``.

    Args:
      folder: with safetensors, or ``pytorch_model.bin``.
      name: of the architecture.

    Raises:
      FileNotFoundError: no weights.
      ValueError: the file has no such head.
    """
    _check(name)
    reader = torch_reader.open_weights(folder)
    missing = [f"{module}.weight" for module in LAYERS[name] if f"{module}.weight" not in reader.specs]
    if missing:
        raise ValueError(
            f"{folder} has no {', '.join(missing)}: it is no {name} model with a trained classification head; it holds "
            f"{some(sorted(reader.specs), 4)}"
        )
    read = lambda key: np.asarray(reader.read(key), np.float32) if key in reader.specs else np.float32(0)
    layers = [(read(f"{module}.weight").T, read(f"{module}.bias")) for module in LAYERS[name]]

    @jax.jit
    def logits(z_Nxd: Array) -> Array:
        for i, (kernel, bias) in enumerate(layers):
            z_Nxd = (jnp.tanh(z_Nxd) if i else z_Nxd) @ kernel + bias
        return z_Nxd

    return logits


def _check(name: str) -> None:
    if name not in LAYERS:
        raise ValueError(f"trained classification heads are read of {', '.join(LAYERS)}; the model is {name}")
