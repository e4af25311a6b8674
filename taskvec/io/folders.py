"""Models by their names: folders, files, hub ids, LoRA adapters and orbax checkpoints, opened without reading weights.

`open_model` gives a `Model`, from which tensors are read one at a time. What it refuses (quantised weights, adapters
that are no plain LoRA) it refuses here, from headers and config files.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from taskvec.io.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LoraReader
from taskvec.io.safetensors import SafetensorsReader
from taskvec.io.safetensors_format import INDEX, SINGLE
from taskvec.io.torch_reader import is_torch, open_weights
from taskvec.messages import listing, some

# A repository, perhaps a folder or file in it, perhaps a revision.
_HUB_ID = re.compile(r"(\w[\w.-]*(?:/\w[\w.-]*)?)((?:/\w[\w.-]*)*)(?:@([\w./-]+))?")
# Weights in other formats are left behind; everything else is small.
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken"]
_HUB_TORCH = ["pytorch_model*.bin"]  # where there are no safetensors
_PACKED = re.compile(
    r"\.(qweight|qzeros|g_idx|absmax|quant_map|nested_absmax|SCB|weight_packed|weight_scale(_inv)?|weight_zero_point)$"
    r"|\.quant_state\."
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on disk; a reader in the sense of `taskvec.merging`.

    Attributes:
      ref: as the user wrote it.
      path: folder or file.
      reader: gives tensors.
      files: what its weights are read from.
      config: ``config.json``, or {}.
      kind: ``folder``, ``file``, ``orbax``, ``lora`` (an adapter on a base) or ``factors`` (an adapter's own tensors).
      pinned: a name under which the very same model can be opened again: an absolute path, a hub id with its commit.
      home: the folder with its config and tokenizer, if it has one.
    """

    ref: str
    path: pathlib.Path
    reader: Any
    files: tuple[pathlib.Path, ...]
    config: Mapping[str, Any]
    kind: str
    pinned: str
    home: pathlib.Path | None = None

    @property
    def specs(self) -> Mapping[str, Any]:
        """Name -> shape and dtype."""
        return self.reader.specs

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor or some of its rows; threads may read at once."""
        return self.reader.read(name, rows)

    def path_of(self, name: str) -> pathlib.Path:
        """The file that a tensor is read from."""
        return self.reader.path_of(name)

    def held(self, name: str) -> int:
        """Bytes that reading rows of a tensor takes besides them: its own where it is restored whole."""
        return self.reader.held(name) if hasattr(self.reader, "held") else 0


def open_model(ref: str | os.PathLike, base: Model | None = None, lora: str = "delta") -> Model:
    """Opens a model; only headers and configs are read.

    Args:
      ref: a Hugging Face folder (``model.safetensors`` or shards with an index, or where there is neither
        ``pytorch_model.bin`` or its shards), a file with such weights, an orbax checkpoint or a folder of its numbered
        steps, a PEFT LoRA adapter, ``MODEL+ADAPTER``, or what `from_hub` takes if no file has that name.
      base: the model that an adapter belongs to; where it is not given, the one that the adapter's config names.
      lora: ``delta`` reads an adapter as its base plus the product of its factors, ``factor`` as the factors alone.

    Raises:
      FileNotFoundError: there is no such model; says what is there.
      ValueError: weights that cannot be merged: quantised, damaged, in an unknown dtype, an adapter of another kind.
    """
    ref = str(ref)
    path = pathlib.Path(ref).expanduser()
    if not path.exists() and "+" in ref:
        left, _, right = ref.rpartition("+")
        base = open_model(left)
        adapter = open_model(right, base, lora)
        return dataclasses.replace(adapter, ref=ref, pinned=f"{base.pinned}+{adapter.pinned}")
    pinned = str(path.absolute())
    if not path.exists():
        root, inside = _snapshot(ref)
        path = root / inside
        pinned = f"{ref.partition('@')[0]}@{root.name}"
    if (path / ADAPTER_CONFIG).is_file():
        return _open_adapter(ref, path, base, lora, pinned)
    home = path if path.is_dir() else None
    if home and not any((path / name).is_file() for name in (SINGLE, INDEX)):
        if not is_torch(path):
            # Imported late: orbax takes seconds to import, and most models are safetensors.
            from taskvec.io import orbax_reader

            if folder := orbax_reader.find(path):
                reader = orbax_reader.OrbaxReader(folder)
                return Model(ref, path, reader, reader.files, {}, "orbax", pinned)
        if only := _only_file(path):
            path = only
    config = _read_json(home / "config.json") if home else {}
    if "quantization_config" in config:
        how = config["quantization_config"].get("quant_method", "a packed format")
        raise ValueError(f"{ref} is quantised ({how}, says its config.json); merge the unquantised checkpoint instead")
    # The merge itself looks for NaN and infinity.
    reader = open_weights(path, check_finite=False)
    packed = sorted(name for name in reader.specs if _PACKED.search(name))
    if packed:
        raise ValueError(f"{ref} holds quantised weights ({some(packed, 3)}); merge the unquantised checkpoint instead")
    return Model(ref, path, reader, tuple(reader.files), config, "folder" if home else "file", pinned, home)


def _open_adapter(ref: str, path: pathlib.Path, base: Model | None, lora: str, pinned: str) -> Model:
    if lora not in ("delta", "factor"):
        raise ValueError(f"lora must be 'delta' or 'factor', got {lora!r}")
    config = _read_json(path / ADAPTER_CONFIG)
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise FileNotFoundError(f"{path} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}; it holds {listing(path)}")
    files = (path / ADAPTER_WEIGHTS, path / ADAPTER_CONFIG)
    if lora == "factor":
        LoraReader.check(config, ref)
        factors = SafetensorsReader(path / ADAPTER_WEIGHTS, check_finite=False)
        return Model(ref, path, factors, files, config, "factors", pinned, path)
    if base is None:
        named = config.get("base_model_name_or_path")
        if not named:
            raise ValueError(f"{ref} is a LoRA adapter and does not say what of; give --base")
        base = open_model(named)
    reader = LoraReader(path, config, base, ref)
    return Model(ref, path, reader, (*files, *base.files), base.config, "lora", pinned, base.home)


def from_hub(ref: str) -> pathlib.Path:
    """The folder of a hub id, fetched if it is not here.

    Args:
      ref: ``name`` or ``owner/name``, or ``owner/name/FOLDER`` for a folder (or one file) of a repository, of which
        nothing else is fetched; with ``@revision`` or without.

    Raises:
      FileNotFoundError: there is no such model, here or there.
    """
    root, inside = _snapshot(ref)
    return root / inside


def _snapshot(ref: str) -> tuple[pathlib.Path, str]:
    """As `from_hub`: the root of the repository, and what is meant in it."""
    here = f"{ref} is no file or folder here"
    found = _HUB_ID.fullmatch(ref)
    name, inside, revision = found.groups() if found else ("", "", None)
    inside = inside.removeprefix("/")
    # A longer path that begins with a folder of this disk is a path.
    if not found or (inside and pathlib.Path(ref).parents[-2].exists()) or name.endswith(".safetensors"):
        parent = pathlib.Path(ref).expanduser().parent
        near = f"{parent} holds {listing(parent)}" if parent.is_dir() else f"nor is {parent}"
        raise FileNotFoundError(f"{here}; {near}")
    # Imported late: only for models that are not on this disk.
    import huggingface_hub

    def fetch(patterns: list[str]) -> pathlib.Path:
        if inside:
            patterns = [inside, *(f"{inside}/{pattern}" for pattern in patterns)]
        return pathlib.Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))

    try:
        root = fetch(_HUB_FILES)
        if not any((root / inside).glob("*.safetensors")) and not (root / inside).is_file():
            root = fetch([*_HUB_FILES, *_HUB_TORCH])
    except Exception as error:  # whatever the libraries of the network raise
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{here}, and the Hugging Face hub did not give a model of that name ({why}); check the spelling, or "
            "download the model where there is a network and name its folder"
        ) from error
    if not (root / inside).exists():
        raise FileNotFoundError(f"{here}, and the hub's {name} has no {inside or 'model'}; check the spelling")
    return root, inside


def _only_file(folder: pathlib.Path) -> pathlib.Path | None:
    """The weights of a folder that calls its only safetensors file otherwise."""
    files = sorted(folder.glob("*.safetensors"))
    return files[0] if len(files) == 1 else None


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(fields).__name__}")
    return fields
