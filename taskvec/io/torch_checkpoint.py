"""Reads PyTorch state dicts without PyTorch and without running anything that they hold.

Files of whole modules are read by `taskvec.io.torch_modules`, which shares the layouts and the checks of this one.

The pickle inside may use only the handful of names listed here (see `taskvec.io.pickles`). Shapes, strides and offsets
are checked against the bytes there are, before an array is made of them.

Both layouts of ``torch.save`` are read: the zip archive (PyTorch 1.6 and later) and the older sequence of pickles
followed by raw storages.
"""

import collections
import functools
import io
import math
import pathlib
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from taskvec.io.atomic import PathLike
from taskvec.io.pickles import DAMAGED, Forbidden, RestrictedUnpickler, load_numpy_pickle, natural
from taskvec.messages import some

__all__ = ["Forbidden", "load_numpy_pickle", "load_state_dict"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int


class TorchTensor(NamedTuple):
    """A tensor that is still in its file."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """Whether its entries follow each other in the storage."""
        width = 1
        for n, step in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n > 1 and step != width:
                return False
            width *= n
        return True

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """A view of the storage's numbers; the tensor must lie inside them."""
        steps = tuple(step * numbers.itemsize for step in self.strides)
        return np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, steps)


class Span(NamedTuple):
    """Where a storage lies in its file: the first byte, how many there are, and their CRC-32 if the file has it."""

    start: int
    size: int
    checksum: int | None = None


class TorchUnpickler(RestrictedUnpickler):
    """Adds the references to storages, which PyTorch keeps outside the pickle."""

    def __init__(self, file: BinaryIO, source: str):
        super().__init__(file, _torch_names(), source)
        self.widths: dict[str, int] = {}  # of the numbers in the storages met so far, in bytes

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or pid[1] not in _STORAGES:
            raise ValueError(f"not a tensor storage: {str(pid)[:100]}")
        if len(pid) > 5 and pid[5] is not None:
            raise ValueError("views of storages (PyTorch before 0.4) are not supported")
        storage = _Storage(str(pid[2]), np.dtype(_STORAGES[pid[1]]), natural(pid[4], "size of a storage"))
        self.widths[storage.key] = storage.dtype.itemsize
        return storage


def load_state_dict(path: PathLike) -> dict[str, np.ndarray]:
    """Reads a ``.pt`` or ``.pth`` file that holds a flat dict from names to tensors.

    Returns:
      name -> contiguous array in the dtype of the file (bfloat16 as `ml_dtypes.bfloat16`).

    Raises:
      FileNotFoundError: no such file.
      Forbidden: the file holds anything but dicts of tensors (a pickled module, an optimiser, code).
      ValueError: the file is cut short, damaged, or not a flat dict of tensors.
    """
    return read(path, TorchUnpickler, _flat_dict)


def read(
    path: PathLike, unpickler: type[TorchUnpickler], tensors_of: Callable[[Any], dict[str, TorchTensor]]
) -> dict[str, np.ndarray]:
    """Reads some of the tensors of a file; errors as `load_state_dict`.

    Args:
      path: of the file.
      unpickler: what is allowed in its pickle.
      tensors_of: what to read, from what was unpickled.
    """
    tensors, spans = places(path, unpickler, tensors_of)
    with open(path, "rb") as file:

        @functools.cache
        def numbers(storage: _Storage) -> np.ndarray:
            start, size, checksum = spans[storage.key]
            file.seek(start)
            data = file.read(size)
            if checksum is not None and zlib.crc32(data) != checksum:
                raise ValueError(f"{path} is damaged: the checksum of storage {storage.key} is another")
            return np.frombuffer(data, storage.dtype, storage.size)

        # `order="C"` makes the copy contiguous whatever the strides in the file were.
        return {
            name: tensor.of(numbers(tensor.storage)).copy(order="C")
            if math.prod(tensor.shape)
            else np.empty(tensor.shape, tensor.storage.dtype)
            for name, tensor in tensors.items()
        }


def places(
    path: PathLike,
    unpickler: type[TorchUnpickler] = TorchUnpickler,
    tensors_of: Callable[[Any], dict[str, TorchTensor]] | None = None,
) -> tuple[dict[str, TorchTensor], dict[str, Span]]:
    """The tensors of a file, which all lie inside it, and where its storages are, by their keys; as `read`."""
    path = pathlib.Path(path)
    with open(path, "rb") as file:
        try:
            layout = _zip_layout if zipfile.is_zipfile(file) else _legacy_layout
            tensors, spans = layout(file, lambda file: unpickler(file, str(path)), tensors_of or _flat_dict)
        except Forbidden:
            raise
        except Odd as error:
            raise ValueError(f"{path}{error}") from None
        except (*DAMAGED, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged or is no PyTorch state dict: {error}") from error
    for name, tensor in tensors.items():
        _check_inside(f"{path}: tensor {name}", tensor, spans)
    return tensors, spans


class Odd(Exception):
    """A file is whole, but holds something else than was expected; the message goes on after the file's name."""


def _flat_dict(table: Any) -> dict[str, TorchTensor]:
    if not isinstance(table, dict):
        raise Odd(f" holds a {type(table).__name__}; expected a dict of tensors")
    odd = [
        str(name) for name, value in table.items() if not isinstance(value, TorchTensor) or not isinstance(name, str)
    ]
    if odd:
        raise Odd(f": entries {some(odd)} are not tensors; save only the state dict of the model")
    return table


def _torch_names() -> dict[tuple[str, str], Any]:
    """The allow-list for state dicts, made anew for every file because a pickle can write to what it is given."""
    allowed: dict[tuple[str, str], Any] = {("torch", name): name for name in _STORAGES}

    def rebuild_tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
        del requires_grad, hooks, metadata
        if not isinstance(storage, _Storage):
            raise TypeError("a tensor without a storage")
        shape, strides = (tuple(natural(n, what) for n in x) for x, what in ((shape, "axis"), (strides, "stride")))
        return TorchTensor(storage, natural(offset, "offset"), shape, strides)

    return allowed | {
        ("collections", "OrderedDict"): lambda *args: collections.OrderedDict(*args),
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
    }


def _zip_layout(file: BinaryIO, unpickler: Callable, tensors_of: Callable) -> tuple[dict, dict[str, Span]]:
    """The tensors of a zip checkpoint, and where their storages are."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "data.pkl" not in members:
            raise ValueError("it is a zip archive without data.pkl")
        if "byteorder" in members and archive.read(members["byteorder"]).strip() != sys.byteorder.encode():
            raise ValueError("it was written on a machine of the other byte order")
        tensors = tensors_of(unpickler(io.BytesIO(archive.read(members["data.pkl"]))).load())
    names = {tensor.storage.key: f"data/{tensor.storage.key}" for tensor in tensors.values()}
    return tensors, {key: _member(file, members[name]) for key, name in names.items() if name in members}


def _member(file: BinaryIO, info: zipfile.ZipInfo) -> Span:
    """Where the bytes of a stored member of a zip archive are: after its own header, which has a name and extras."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"its {info.filename} is compressed, which PyTorch never does; save it with torch.save again")
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"there is no {info.filename} where its table of contents says")
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return _span(file, info.header_offset + 30 + name + extra, info.file_size, info.CRC)


def _legacy_layout(file: BinaryIO, unpickler: Callable, tensors_of: Callable) -> tuple[dict, dict[str, Span]]:
    """As `_zip_layout` for the layout before PyTorch 1.6: magic, version, machine, table, keys, then raw storages."""
    file.seek(0)
    magic, _, machine = (unpickler(file).load() for _ in range(3))
    if magic != _LEGACY_MAGIC:
        raise ValueError("it has not the magic number of a PyTorch checkpoint")
    if not machine["little_endian"] or sys.byteorder != "little":
        raise ValueError("old checkpoints are read only where both machines are little-endian")
    pickled = unpickler(file)
    tensors = tensors_of(pickled.load())
    spans, keys = {}, unpickler(file).load()
    at = file.tell()
    for key in keys:
        file.seek(at)
        size = natural(int.from_bytes(file.read(8), "little", signed=True), "size of a storage") * pickled.widths[key]
        spans[key] = _span(file, at + 8, size)
        at += 8 + size
    return tensors, spans


def _span(file: BinaryIO, start: int, size: int, checksum: int | None = None) -> Span:
    """A span that ends where the file ends, at the latest."""
    return Span(start, max(0, min(size, file.seek(0, io.SEEK_END) - start)), checksum)


def _check_inside(where: str, tensor: TorchTensor, spans: Mapping[str, Span]) -> None:
    """Raises `ValueError` unless every entry of a tensor lies inside its storage, and that inside the file."""
    storage, offset, shape, strides = tensor
    if storage.key not in spans:
        raise ValueError(f"{where}: its storage {storage.key!r} is not in the file")
    size = spans[storage.key].size
    if size < storage.size * storage.dtype.itemsize:
        raise ValueError(f"{where}: its storage has {size} bytes, but the file announces {storage.size} numbers")
    count = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    # More elements than the storage holds means overlapping ones (an expanded tensor), which could be of any size.
    if count and (last >= storage.size or count > storage.size):
        raise ValueError(f"{where}: shape {shape}, strides {strides} reach beyond its {storage.size} numbers")
