"""Loading and saving models: which family a file belongs to, and what must agree before it is taken."""

import json
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskvec import tree as trees
from taskvec.io import names, safetensors, torch_checkpoint, torch_reader
from taskvec.io.atomic import write_text
from taskvec.io.tensor_files import TensorFiles
from taskvec.messages import listing
from taskvec.models import bert, clip, efficientnet, gpt2, llama, t5, vit
from taskvec.models.base import Model
from taskvec.tree import Tree

PathLike = str | os.PathLike

# ``model_type`` of config.json -> how to make the model from its fields.
FAMILIES = {
    "bert": lambda fields, dtype: bert.make(bert.Config.from_json(fields), dtype),
    "roberta": lambda fields, dtype: bert.make(bert.Config.from_json(fields), dtype),
    "gpt2": lambda fields, dtype: gpt2.make(gpt2.Config.from_json(fields), dtype),
    "llama": lambda fields, dtype: llama.make(llama.Config.from_json(fields), dtype),
    "mistral": lambda fields, dtype: llama.make(llama.Config.from_json(fields), dtype),
    "qwen2": lambda fields, dtype: llama.make(llama.Config.from_json(fields), dtype),
    "t5": lambda fields, dtype: t5.make(t5.Config.from_json(fields), dtype),
    **dict.fromkeys(
        ("clip", "clip_vision_model", "clip_text_model"),
        lambda fields, dtype, part=None: clip.make(clip.from_json(fields, part), dtype),
    ),
    "vit": lambda fields, dtype, part=None: vit.make(vit.Config.from_json(fields, part), dtype),
    efficientnet.NAME: lambda fields, dtype: efficientnet.make(dtype=dtype),
}
HAVE_PARTS = ("clip", "clip_vision_model", "clip_text_model", "vit")
TORCH = (".pth", ".pt")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json", "modules.json", "vocab.json",
    "merges.txt", "preprocessor_config.json", "processor_config.json",
    "spiece.model", "tokenizer.model", "added_tokens.json", "generation_config.json",
    "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
)  # fmt: skip


def describe(path: PathLike, dtype: Any = jnp.float32, part: str | None = None) -> Model:
    """The model of a folder or file without reading its weights; arguments and errors as `load`."""
    path = pathlib.Path(path)
    if path.suffix in TORCH:
        return efficientnet.make(dtype=dtype)
    fields = _config(path)
    if fields.get("model_type") in HAVE_PARTS:
        fields |= _pixels(path)
    if fields.get("model_type") not in FAMILIES:
        raise ValueError(
            f"{path / 'config.json'} has model_type {fields.get('model_type')!r}; supported are {', '.join(FAMILIES)}, "
            "and a PyTorch file (.pth) of EfficientNet-Lite0"
        )
    if part is None:
        return FAMILIES[fields["model_type"]](fields, dtype)
    if fields["model_type"] not in HAVE_PARTS:
        raise ValueError(f"{path}: part={part!r}, but only {', '.join(HAVE_PARTS)} have parts")
    return FAMILIES[fields["model_type"]](fields, dtype, part)


def load(path: PathLike, dtype: Any = jnp.float32, part: str | None = None) -> tuple[Model, Tree]:
    """Loads a model and its params.

    Args:
      path: a Hugging Face folder (``config.json`` and safetensors, or without these ``pytorch_model.bin``), a folder
        written by `save`, or the ``.pth`` file of EfficientNet-Lite0, whose batch normalisation is folded into the
        convolutions.
      dtype: of the params.
      part: of the model, instead of all of it: see `taskvec.models.clip` and `taskvec.models.vit`. Saving it with this
        folder as `source` copies the rest.

    Raises:
      FileNotFoundError: no config or no weights; says what is there.
      ValueError: an architecture or image processor that is not supported, names or shapes that do not belong to it, a
        damaged file, or NaN or infinity in a tensor; says which file and tensor.
    """
    path = pathlib.Path(path)
    model = describe(path, dtype, part)
    if path.suffix in TORCH:
        params = efficientnet.fold(torch_checkpoint.load_state_dict(path))
    else:
        reader = torch_reader.open_weights(path)
        tensors = {name: reader.read(name) for name in _wanted(model, reader)}
        _check_copies(path, model, reader, tensors)
        params = _to_tree(model, tensors)
    _check(path, model, params)
    return model, jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def save(folder: PathLike, model: Model, params: Tree, *, source: PathLike | None = None) -> None:
    """Writes a folder that `load`, and for Hugging Face families ``transformers``, takes.

    The weights appear whole or not at all, the config last.

    Args:
      folder: to write; made if absent.
      model: as from `load`.
      params: of the model, in their dtype.
      source: the folder that the model came from. Its config and tokenizer files are copied, and so are tensors that
        are no part of the params (MiniLM's pooler). Without it the folder has the encoder alone.

    Raises:
      ValueError: the params are not those of the model, or `source` holds another model.
    """
    folder = pathlib.Path(folder)
    _check(folder, model, params)
    tensors = _to_file(model, params)
    fields = {"model_type": model.name} if model.table is None else model.config.to_json()
    if source is not None and pathlib.Path(source).is_dir():
        source = pathlib.Path(source)
        fields = _config(source)
        dtype = str(next(iter(tensors.values())).dtype)
        fields |= {key: dtype for key in ("dtype", "torch_dtype") if key in fields}
        tensors = _with_rest_of(source, model, tensors)
        for name in _TOKENIZER:
            if (source / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, folder / name)
    safetensors.save(folder, tensors)
    write_text(folder / "config.json", json.dumps(fields, indent=2) + "\n")


def _config(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        what = f"it holds {listing(folder)}" if folder.is_dir() else "it is no folder"
        raise FileNotFoundError(
            f"{folder} has no config.json ({what}); name a Hugging Face model folder or a .pth file"
        )
    return json.loads(file.read_text(encoding="utf-8"))


def _pixels(folder: pathlib.Path) -> dict[str, Any]:
    """``image_mean`` and ``image_std`` as the folder's image processor has them; {} where there is none."""
    file, within = folder / "preprocessor_config.json", lambda fields: fields
    if not file.is_file():  # transformers 5 writes all processors into one file
        file, within = folder / "processor_config.json", lambda fields: fields.get("image_processor") or {}
    if not file.is_file():
        return {}
    fields = within(json.loads(file.read_text(encoding="utf-8")))
    factor = fields.get("rescale_factor", 1 / 255)
    if abs(255 * factor - 1) > 1e-6 or not all(fields.get(name, True) for name in ("do_rescale", "do_normalize")):
        raise ValueError(
            f"{file}: rescale_factor, do_rescale or do_normalize say that pixels are not (x / 255 - image_mean) / "
            "image_std, which is all that is computed here"
        )
    return {name: fields[name] for name in ("image_mean", "image_std") if fields.get(name) is not None}


def _wanted(model: Model, reader: TensorFiles) -> list[str]:
    """The names of the file that are part of the params; found from the header, before a tensor is read."""
    return list(names.places(model.table, reader.specs) if model.table is not None else reader.specs)


def _to_tree(model: Model, tensors: dict[str, np.ndarray]) -> Tree:
    if model.table is not None:
        return names.to_paths(model.table, tensors)
    return trees.unflatten(tensors)


def _to_file(model: Model, params: Tree) -> dict[str, np.ndarray]:
    if model.table is not None:
        return names.to_names(model.table, params)
    return {path: np.asarray(x) for path, x in trees.flatten(params).items()}


def _with_rest_of(source: pathlib.Path, model: Model, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under the names that `source` gives them, with its tensors that are no part of the params."""
    if model.table is None:
        return tensors
    reader = torch_reader.open_weights(source)
    mine = names.places(model.table, tensors)
    here = {place.path: name for name, place in mine.items()}
    theirs = names.places(model.table, reader.specs)
    if {p.path for p in theirs.values()} != here.keys():
        raise ValueError(f"source {source} holds another model: its tensors are not those of the params")
    path_of = {n: place.path for n, place in theirs.items()} | names.copies(model.table, reader.specs)
    return {n: tensors[here[path_of[n]]] if n in path_of else reader.read(n) for n in reader.specs}


def _check_copies(path: pathlib.Path, model: Model, reader: TensorFiles, tensors: dict[str, np.ndarray]) -> None:
    """Tied tensors that a file holds twice must be equal; the model here has them once."""
    if model.table is None:
        return
    name_of = {place.path: name for name, place in names.places(model.table, tensors).items()}
    for name, which in names.copies(model.table, reader.specs).items():
        if which in name_of and not np.array_equal(reader.read(name), tensors[name_of[which]]):
            raise ValueError(
                f"{path}: {name} differs from {name_of[which]}, but config.json says that they are one tensor; "
                'if they are not, set "tie_word_embeddings": false there'
            )


def _check(path: pathlib.Path, model: Model, params: Tree) -> None:
    found = {p: tuple(x.shape) for p, x in trees.flatten(params).items()}
    wanted = {p: x.shape for p, x in trees.flatten(model.abstract).items()}
    differ = sorted(p for p in found.keys() | wanted.keys() if found.get(p) != wanted.get(p))
    if differ:
        what = "; ".join(f"{p}: {found.get(p, 'absent')}, expected {wanted.get(p, 'nothing')}" for p in differ[:4])
        raise ValueError(f"{path}: the params are not those of its {model.name} config: {what}")
