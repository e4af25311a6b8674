"""Writing safetensors leaf by leaf, in any order, with one leaf in memory. Used through `taskvec.io.safetensors`."""

import contextlib
import glob
import json
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Mapping

import jax
import numpy as np

from taskvec.io.atomic import PathLike, remove_stale, temporary_name, write_text
from taskvec.io.safetensors_format import CODES, INDEX, SINGLE
from taskvec.messages import some

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class SafetensorsWriter:
    """Writes tensors in any order, each at its place, so that memory is one tensor and not the model.

    Threads may write at once. What killed runs left under temporary names is removed at the start.

    The headers follow from the specs, so every offset is known at the start. Data goes to temporary names; `close` (or
    leaving a ``with`` block without an exception) renames them, so a killed run leaves nothing that looks like a model.
    """

    def __init__(
        self,
        path: PathLike,
        specs: Mapping[str, jax.ShapeDtypeStruct],
        metadata: Mapping[str, str] | None = None,
        max_shard_bytes: int = 5_000_000_000,
    ):
        """Lays out the files and checks that they fit.

        Args:
          path: a file name ending in ``.safetensors``, or a folder (made if absent), which gets ``model.safetensors``
            or, beyond `max_shard_bytes`, shards and an index.
          specs: name -> shape and dtype of every tensor that will be written.
          metadata: texts for ``__metadata__``; ``format: pt`` is added, which Hugging Face readers expect.
          max_shard_bytes: of tensor data in one file; a larger tensor gets a file of its own.

        Raises:
          ValueError: a dtype has no safetensors code.
          FileExistsError: the folder holds weights in another layout, which readers would take for this model.
          OSError: too little disk space; says how much is needed and how much is free.
        """
        path = pathlib.Path(path)
        single = path.suffix == ".safetensors"
        self.folder = path.parent if single else path
        self.specs = dict(specs)
        odd = [f"{name} ({spec.dtype})" for name, spec in self.specs.items() if np.dtype(spec.dtype) not in CODES]
        if odd:
            raise ValueError(f"dtypes that safetensors cannot hold: {some(odd)}; allowed: {some(list(CODES.values()))}")
        # Wide dtypes first keeps every tensor aligned without padding, which the format forbids.
        order = sorted(self.specs, key=lambda name: (-self.specs[name].dtype.itemsize, name))
        shards = [order] if single else self._split(order, max_shard_bytes)
        count = len(shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
        self._targets = [path] if single else [self.folder / name for name in names]
        self._index = self.folder / INDEX if count > 1 else None
        self._left = {name: self._bytes(name) for name in self.specs}
        self._lock = threading.Lock()
        if not single:
            self._refuse_stale()
        headers = [self._header(shard, {"format": "pt", **(metadata or {})}) for shard in shards]
        self._open(headers, shards, glob.escape(path.name) if single else "model*")

    @property
    def names(self) -> list[str]:
        """The files that `close` makes in the folder."""
        return [target.name for target in self._targets] + ([INDEX] if self._index else [])

    def write(self, name: str, array: np.ndarray, rows: slice | None = None) -> None:
        """Writes a tensor, or a block of its rows (``slice(start, stop)``), at its place.

        Raises:
          ValueError: unknown name, written already, or another shape or dtype than announced.
        """
        if name not in self.specs:
            raise ValueError(f"tensor {name} was not announced; announced were {some(sorted(self.specs))}")
        spec = self.specs[name]
        length, *rest = spec.shape or (1,)
        start, stop, step = (rows or slice(None)).indices(length)
        shape = (stop - start, *rest) if spec.shape else ()
        if step != 1 or array.shape != shape or array.dtype != spec.dtype:
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)} but {spec.dtype}{list(shape)} was announced")
        with self._lock:
            if array.nbytes > self._left[name]:
                raise ValueError(f"tensor {name} is written twice")
            self._left[name] -= array.nbytes
        number, offset = self._start[name]
        offset += start * (self._bytes(name) // max(length, 1))
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        file = self._files[number].fileno()
        while data:  # one call writes at most 2 GB
            written = os.pwrite(file, data, offset)
            data, offset = data[written:], offset + written

    def close(self) -> None:
        """Renames the files into place; raises `ValueError` (and leaves nothing) if a tensor was not written."""
        try:
            missing = sorted(name for name, left in self._left.items() if left)
            if missing:
                raise ValueError(f"{len(missing)} tensors were announced but not fully written: {some(missing)}")
            self._stack.close()
        except BaseException:
            self.abort()
            raise
        if self._index:  # without it the folder is no model, so a kill between two renames cannot mix two models
            self._index.unlink(missing_ok=True)
        for temporary, target in zip(self._temporary, self._targets, strict=True):
            os.replace(temporary, target)
        if self._index:
            where = {name: self._targets[number].name for name, (number, _) in sorted(self._start.items())}
            total = sum(self._bytes(name) for name in self.specs)
            write_text(self._index, json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))

    def abort(self) -> None:
        """Closes and deletes the temporary files."""
        for temporary in self._temporary:
            temporary.unlink(missing_ok=True)
        self._stack.close()

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.abort() if kind else self.close()

    def _bytes(self, name: str) -> int:
        return int(np.prod(self.specs[name].shape, dtype=np.int64)) * self.specs[name].dtype.itemsize

    def _split(self, order: list[str], limit: int) -> list[list[str]]:
        shards, room = [[]], limit
        for name in order:
            if shards[-1] and self._bytes(name) > room:
                shards.append([])
                room = limit
            shards[-1].append(name)
            room -= self._bytes(name)
        return shards

    def _header(self, shard: list[str], metadata: dict[str, str]) -> bytes:
        header, at = {"__metadata__": metadata}, 0
        for name in shard:
            spec, offsets = self.specs[name], [at, at := at + self._bytes(name)]
            code = CODES[np.dtype(spec.dtype)]
            header[name] = {"dtype": code, "shape": list(spec.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _open(self, headers: list[bytes], shards: list[list[str]], pattern: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_stale(self.folder, pattern)
        need = sum(map(len, headers)) + sum(map(self._bytes, self.specs))
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise OSError(
                f"{self.folder} has {free / 1e9:.2f} GB free and the model needs {need / 1e9:.2f} GB beside what is "
                "there; free some space or choose another folder"
            )
        self._start: dict[str, tuple[int, int]] = {}  # name -> (number of its file, offset)
        self._temporary = [temporary_name(target) for target in self._targets]
        self._stack, self._files = contextlib.ExitStack(), []
        for number, (header, shard) in enumerate(zip(headers, shards, strict=True)):
            file = self._stack.enter_context(self._temporary[number].open("wb", buffering=0))
            self._files.append(file)
            file.write(header)
            at = len(header)
            for name in shard:
                self._start[name] = (number, at)
                at += self._bytes(name)

    def _refuse_stale(self) -> None:
        keep = {target.name for target in self._targets} | ({INDEX} if self._index else set())
        found = sorted(p.name for p in self.folder.iterdir()) if self.folder.is_dir() else []
        stale = [name for name in found if _WEIGHTS.fullmatch(name) and name not in keep]
        if stale:
            raise FileExistsError(
                f"{self.folder} already holds {some(stale)}, which would stay beside {some(sorted(keep))} and could "
                "be read instead of it; delete them or choose an empty folder"
            )
