"""Safetensors, tensor by tensor: what a file holds is known from its header, and memory is one tensor at a time.

A model is one ``.safetensors`` file, or a Hugging Face folder with ``model.safetensors`` or with shards and their
``model.safetensors.index.json``. Everything that can be checked from headers and file sizes is checked when a reader
or writer is made, before the first tensor moves.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from taskvec.io.safetensors_format import DTYPES, INDEX, SINGLE, PathLike, listing, read_header, some
from taskvec.io.safetensors_writer import SafetensorsWriter

__all__ = ["SafetensorsReader", "SafetensorsWriter", "load", "read_header", "save"]


class SafetensorsReader:
    """Reads the tensors of a file or a Hugging Face folder one at a time.

    Attributes:
      specs: name -> `jax.ShapeDtypeStruct`, from the headers alone.
      metadata: the ``__metadata__`` of the file (of the first shard).
    """

    def __init__(self, path: PathLike, check_finite: bool = True):
        """Opens `path` and checks names, shapes and file sizes.

        Args:
          path: a ``.safetensors`` file, or a folder that holds one model.
          check_finite: whether `read` raises on NaN or infinity.

        Raises:
          FileNotFoundError: no such file, or a shard of the index is absent; says what the folder holds.
          ValueError: a file is cut short or is not safetensors, or the index and the shards disagree.
        """
        self.check_finite = check_finite
        self.specs: dict[str, jax.ShapeDtypeStruct] = {}
        self.metadata: dict[str, str] = {}
        self._files: dict[str, pathlib.Path] = {}
        files, promised = _weight_files(pathlib.Path(path))
        for file in files:
            header = read_header(file)
            metadata = header.pop("__metadata__", {})
            self.metadata = self.metadata or metadata
            for name, entry in header.items():
                if name in self._files:
                    raise ValueError(f"tensor {name} is in both {self._files[name]} and {file}; delete the stale file")
                if entry["dtype"] not in DTYPES:
                    raise ValueError(f"{file}: {name} has dtype {entry['dtype']}; supported are {', '.join(DTYPES)}")
                self.specs[name] = jax.ShapeDtypeStruct(tuple(entry["shape"]), DTYPES[entry["dtype"]])
                self._files[name] = file
        absent = [f"{name} ({file.name})" for name, file in promised.items() if self._files.get(name) != file]
        if absent:
            raise ValueError(
                f"{path}: {INDEX} promises tensors that are not in the file it names: {some(absent)}. "
                "The download is incomplete or mixes two models; fetch the folder again."
            )

    def path_of(self, name: str) -> pathlib.Path:
        """The file that holds a tensor; raises `KeyError` if there is none."""
        if name not in self._files:
            raise KeyError(f"no tensor {name!r}; there are {len(self._files)}: {some(sorted(self._files))}")
        return self._files[name]

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Reads a tensor, or some of its rows (a slice of the first axis), in the dtype of the file.

        Raises:
          KeyError: no such tensor.
          ValueError: it holds NaN or infinity and the reader was made with ``check_finite``.
        """
        path, spec = self.path_of(name), self.specs[name]
        if rows is not None:  # the library knows no negative, empty or overlong slices
            start, stop, step = rows.indices(spec.shape[0])
            if step != 1:
                raise ValueError(f"rows are read with step 1, found {rows}")
            if stop <= start:
                return np.empty((0, *spec.shape[1:]), spec.dtype)
            rows = slice(start, stop)
        # A handle maps its file into memory; one handle a read keeps resident memory at one tensor.
        with safetensors.safe_open(path, framework="numpy") as file:
            array = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        if self.check_finite and jnp.issubdtype(array.dtype, jnp.floating):
            bad = array.size - int(np.isfinite(array).sum())
            if bad:
                raise ValueError(f"{path}: tensor {name} holds NaN or infinity in {bad} of {array.size} places")
        return array


def load(path: PathLike, check_finite: bool = True) -> dict[str, np.ndarray]:
    """Reads every tensor of a file or folder: name -> array."""
    reader = SafetensorsReader(path, check_finite)
    return {name: reader.read(name) for name in reader.specs}


def save(path: PathLike, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Writes `tensors` to a file (name ending in ``.safetensors``) or a folder; whole or not at all."""
    specs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tensors.items()}
    with SafetensorsWriter(path, specs, metadata) as writer:
        for name, x in tensors.items():
            writer.write(name, np.asarray(x))


def _weight_files(path: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, pathlib.Path]]:
    """The files of a model, and for an index the file of each tensor it promises."""
    if path.is_file():
        return [path], {}
    if not path.is_dir():
        near = f"{path.parent} holds {listing(path.parent)}" if path.parent.is_dir() else f"nor is {path.parent}"
        raise FileNotFoundError(f"{path} is no file or folder; {near}")
    if (path / SINGLE).is_file():
        return [path / SINGLE], {}
    if not (path / INDEX).is_file():
        raise FileNotFoundError(
            f"{path} holds neither {SINGLE} nor {INDEX}, but {listing(path)}. Name the .safetensors file itself if it "
            "is called otherwise; a pytorch_model.bin must first be converted."
        )
    weight_map = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
    promised = {name: path / file for name, file in weight_map.items()}
    files = sorted(set(promised.values()))
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise FileNotFoundError(f"{path}: {INDEX} names {some(absent)}, but the folder holds {listing(path)}")
    return files, promised
