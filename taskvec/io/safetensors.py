"""Safetensors, tensor by tensor: what a file holds is known from its header, and memory is one tensor at a time.

An array that `read` gives is read-only and aligned, so that jax takes it without a copy on CPUs.

A model is one ``.safetensors`` file, or a Hugging Face folder with ``model.safetensors`` or with shards and their
``model.safetensors.index.json``. Everything that can be checked from headers and file sizes is checked when a reader
or writer is made, before the first tensor moves.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from taskvec.io.atomic import PathLike
from taskvec.io.safetensors_format import DTYPES, INDEX, SINGLE, header_and_start, read_header
from taskvec.io.safetensors_writer import SafetensorsWriter
from taskvec.io.tensor_files import Place, TensorFiles, weight_files

__all__ = ["SafetensorsReader", "SafetensorsWriter", "load", "read_header", "save"]


class SafetensorsReader(TensorFiles):
    """Reads the tensors of a file or a Hugging Face folder one at a time; see `TensorFiles`.

    ``metadata`` is the ``__metadata__`` of the file (of the first shard).
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
        super().__init__(check_finite)
        path = pathlib.Path(path)
        self.files, promised = weight_files(path, SINGLE, INDEX)
        for file in self.files:
            header, start = header_and_start(file)
            size = file.stat().st_size
            metadata = header.pop("__metadata__", {})
            self.metadata = self.metadata or metadata
            for name, entry in header.items():
                if entry["dtype"] not in DTYPES:
                    raise ValueError(f"{file}: {name} has dtype {entry['dtype']}; supported are {', '.join(DTYPES)}")
                place = Place(file, size, start + entry["data_offsets"][0])
                self._add(name, tuple(entry["shape"]), DTYPES[entry["dtype"]], place)
        self._check_promised(path / INDEX, promised)


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
