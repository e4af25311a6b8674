"""Safetensors, tensor by tensor: what a file holds is known from its header, and memory is one tensor at a time.

An array that `read` gives is read-only and aligned, so that jax takes it without a copy on CPUs.

A model is one ``.safetensors`` file, or a Hugging Face folder with ``model.safetensors`` or with shards and their
``model.safetensors.index.json``. Everything that can be checked from headers and file sizes is checked when a reader
or writer is made, before the first tensor moves.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from taskvec.host import aligned
from taskvec.io.safetensors_format import DTYPES, INDEX, SINGLE, PathLike, header_and_start, listing, read_header, some
from taskvec.io.safetensors_writer import SafetensorsWriter

__all__ = ["SafetensorsReader", "SafetensorsWriter", "load", "read_header", "save"]


# Entries looked at together in search of NaN and infinity: few enough that what is computed stays in the cache.
_BLOCK = 1 << 16


class _Place(NamedTuple):
    """Where a tensor lies: its file, the file's size when it was opened, and the tensor's first byte in it."""

    file: pathlib.Path
    size: int
    start: int


class SafetensorsReader:
    """Reads the tensors of a file or a Hugging Face folder one at a time; threads may read at once.

    Attributes:
      specs: name -> `jax.ShapeDtypeStruct`, from the headers alone.
      metadata: the ``__metadata__`` of the file (of the first shard).
      files: the file or files.
    """

    def __init__(self, path: PathLike, check_finite: bool = True):
        """Opens `path` and checks names, shapes and file sizes.

        Args:
          path: a ``.safetensors`` file, or a folder that holds one model.
          check_finite: whether `read` raises on NaN or infinity (it looks when it first reads a part of the file).

        Raises:
          FileNotFoundError: no such file, or a shard of the index is absent; says what the folder holds.
          ValueError: a file is cut short or is not safetensors, or the index and the shards disagree.
        """
        self.check_finite = check_finite
        self.specs: dict[str, jax.ShapeDtypeStruct] = {}
        self.metadata: dict[str, str] = {}
        self._places: dict[str, _Place] = {}
        self._checked: set[tuple[str, int, int]] = set()
        self.files, promised = _weight_files(pathlib.Path(path))
        for file in self.files:
            header, start = header_and_start(file)
            size = file.stat().st_size
            metadata = header.pop("__metadata__", {})
            self.metadata = self.metadata or metadata
            for name, entry in header.items():
                if name in self._places:
                    raise ValueError(f"tensor {name} is in both {self.path_of(name)} and {file}; delete the stale file")
                if entry["dtype"] not in DTYPES:
                    raise ValueError(f"{file}: {name} has dtype {entry['dtype']}; supported are {', '.join(DTYPES)}")
                self.specs[name] = jax.ShapeDtypeStruct(tuple(entry["shape"]), DTYPES[entry["dtype"]])
                self._places[name] = _Place(file, size, start + entry["data_offsets"][0])
        absent = [
            f"{name} ({file.name})"
            for name, file in promised.items()
            if name not in self._places or self._places[name].file != file
        ]
        if absent:
            raise ValueError(
                f"{path}: {INDEX} promises tensors that are not in the file it names: {some(absent)}. "
                "The download is incomplete or mixes two models; fetch the folder again."
            )

    def path_of(self, name: str) -> pathlib.Path:
        """The file that holds a tensor; raises `KeyError` if there is none."""
        if name not in self._places:
            raise KeyError(f"no tensor {name!r}; there are {len(self._places)}: {some(sorted(self._places))}")
        return self._places[name].file

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or some of its rows (a slice of the first axis), in the dtype of the file; not to be written to.

        Raises:
          KeyError: no such tensor.
          ValueError: it holds NaN or infinity and the reader was made with ``check_finite``, or the file has changed.
        """
        path, spec = self.path_of(name), self.specs[name]
        length, *rest = spec.shape or (1,)
        start, stop, step = (rows or slice(None)).indices(length)
        if step != 1:
            raise ValueError(f"rows are read with step 1, found {rows}")
        stop = max(start, stop)
        width = math.prod(rest)
        flat = _entries(self._places[name], start * width, (stop - start) * width, spec.dtype)
        if self.check_finite and (name, start, stop) not in self._checked:
            bad = _count_not_finite(flat)
            if bad:
                raise ValueError(f"{path}: tensor {name} holds NaN or infinity in {bad} of {flat.size} places")
            self._checked.add((name, start, stop))
        return flat.reshape(spec.shape if rows is None else (stop - start, *rest))


def _entries(place: _Place, first: int, count: int, dtype: np.dtype) -> np.ndarray:
    """`count` entries from entry `first` on, in memory aligned so that jax takes the array without a copy."""
    flat = aligned(count, dtype)
    # Not mapped: tensors are seldom aligned in their file, and a page fault costs more than copying the page.
    with open(place.file, "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != place.size:
            raise ValueError(f"{place.file} was changed while it was being read")
        file.seek(place.start + first * dtype.itemsize)
        rest = flat.view(np.uint8).data
        while rest:
            got = file.readinto(rest)
            if not got:
                raise ValueError(f"{place.file} was changed while it was being read")
            rest = rest[got:]
    flat.flags.writeable = False
    return flat


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


def _count_not_finite(flat: np.ndarray) -> int:
    """How many entries are NaN or infinity; 0 for integers."""
    if flat.dtype.kind in "iub":
        return 0
    blocks = (flat[i : i + _BLOCK] for i in range(0, flat.size, _BLOCK))
    return sum(0 if _all_finite(block) else block.size - int(np.isfinite(block).sum()) for block in blocks)


def _all_finite(block: np.ndarray) -> bool:
    if block.dtype.itemsize != 2:
        return bool(np.isfinite(block).all())
    # NumPy is slow at 16-bit floats. Infinity and NaN have the largest bit patterns of either sign.
    infinity = int(np.array(np.inf, block.dtype).view(np.int16))
    return block.view(np.int16).max() < infinity and block.view(np.uint16).max() < infinity + 0x8000


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
