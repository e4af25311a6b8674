"""Models as pure functions over nested dicts, and loading and saving them.

    model, params = models.load("path/to/all-MiniLM-L6-v2")
    features = model.apply(params, {"ids": ids, "mask": mask})["features"]

`load` takes a Hugging Face folder, whose ``config.json`` says which family it is, or a PyTorch file of
EfficientNet-Lite0. Language models: BERT and RoBERTa, GPT-2, Llama, Mistral and Qwen2, T5 and Flan-T5; the last six
generate text by `taskvec.models.decoding`. Image models: CLIP, whole or one of its towers, and ViT.
"""

from taskvec.models.base import Model, differences
from taskvec.models.files import FAMILIES, describe, load, save

__all__ = ["FAMILIES", "Model", "describe", "differences", "load", "save"]
