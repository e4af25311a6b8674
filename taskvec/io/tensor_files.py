"""Tensors that lie in files just as they do in memory: read one at a time, whole or by rows.

What differs between formats is only where the tensors lie; `taskvec.io.safetensors` and `taskvec.io.torch_reader` find
that out from headers and pickles, before the first tensor moves.
"""

import json
import math
import os
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from taskvec.host import aligned
from taskvec.messages import listing, some

# Entries looked at together in search of NaN and infinity: few enough that what is computed stays in the cache.
_BLOCK = 1 << 16


class Place(NamedTuple):
    """Where a tensor lies: its file, the file's size when it was opened, and the tensor's first byte in it."""

    file: pathlib.Path
    size: int
    start: int


class TensorFiles:
    """Reads the tensors of files one at a time; threads may read at once.

    Attributes:
      specs: name -> `jax.ShapeDtypeStruct`.
      metadata: what a format keeps besides, strings.
      files: the file or files.
      check_finite: whether `read` raises on NaN or infinity (it looks when it first reads a part of the file).
    """

    def __init__(self, check_finite: bool):
        self.check_finite = check_finite
        self.specs: dict[str, jax.ShapeDtypeStruct] = {}
        self.metadata: dict[str, str] = {}
        self.files: list[pathlib.Path] = []
        self._places: dict[str, Place] = {}
        self._checked: set[tuple[str, int, int]] = set()

    def _add(self, name: str, shape: tuple[int, ...], dtype: np.dtype, place: Place) -> None:
        if name in self._places:
            raise ValueError(f"tensor {name} is in both {self.path_of(name)} and {place.file}; delete the stale file")
        self.specs[name] = jax.ShapeDtypeStruct(shape, dtype)
        self._places[name] = place

    def _check_promised(self, index: pathlib.Path, promised: dict[str, pathlib.Path]) -> None:
        """That every tensor of an index is in the file that it names."""
        absent = [
            f"{name} ({file.name})"
            for name, file in promised.items()
            if name not in self._places or self._places[name].file != file
        ]
        if absent:
            raise ValueError(
                f"{index} promises tensors that are not in the file it names: {some(absent)}. "
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
        flat = self._flat(name, start, stop)
        if self.check_finite and (name, start, stop) not in self._checked:
            bad = _count_not_finite(flat)
            if bad:
                raise ValueError(f"{path}: tensor {name} holds NaN or infinity in {bad} of {flat.size} places")
            self._checked.add((name, start, stop))
        return flat.reshape(spec.shape if rows is None else (stop - start, *rest))

    def _flat(self, name: str, start: int, stop: int) -> np.ndarray:
        """The entries of some rows, in order."""
        spec = self.specs[name]
        width = math.prod(spec.shape[1:])
        return entries(self._places[name], start * width, (stop - start) * width, spec.dtype)


def entries(place: Place, first: int, count: int, dtype: np.dtype) -> np.ndarray:
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


def weight_files(path: pathlib.Path, single: str, index: str) -> tuple[list[pathlib.Path], dict[str, pathlib.Path]]:
    """The files of a model, and for an index the file of each tensor it promises.

    Args:
      path: a file, or a folder with a file called `single` or an index.
      single: name of a whole model.
      index: name of the list of shards.

    Raises:
      FileNotFoundError: no such file, or a shard of the index is absent; says what the folder holds.
    """
    if path.is_file():
        return [path], {}
    if not path.is_dir():
        near = f"{path.parent} holds {listing(path.parent)}" if path.parent.is_dir() else f"nor is {path.parent}"
        raise FileNotFoundError(f"{path} is no file or folder; {near}")
    if (path / single).is_file():
        return [path / single], {}
    if not (path / index).is_file():
        raise FileNotFoundError(
            f"{path} holds neither {single} nor {index}, but {listing(path)}. Name the file with the weights itself if "
            "it is called otherwise."
        )
    weight_map = json.loads((path / index).read_text(encoding="utf-8"))["weight_map"]
    promised = {name: path / file for name, file in weight_map.items()}
    files = sorted(set(promised.values()))
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise FileNotFoundError(f"{path}: {index} names {some(absent)}, but the folder holds {listing(path)}")
    return files, promised


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
