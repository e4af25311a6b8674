"""Reads PyTorch state dicts without PyTorch and without running anything that they hold.

Files of whole modules are read by `taskvec.io.torch_modules`, which shares the layouts and the checks of this one.

The pickle inside may use only the handful of names listed here (see `taskvec.io.pickles`). Shapes, strides and offsets
are checked against the bytes there are, before an array is made of them.

Both layouts of ``torch.save`` are read: the zip archive (PyTorch 1.6 and later) and the older sequence of pickles
followed by raw storages.
"""

import collections
import io
import math
import pathlib
import sys
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from taskvec.io.pickles import DAMAGED, Forbidden, RestrictedUnpickler, load_numpy_pickle, natural
from taskvec.io.safetensors_format import PathLike, some

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
    path = pathlib.Path(path)
    with open(path, "rb") as file:
        try:
            read_layout = _read_zip if zipfile.is_zipfile(file) else _read_legacy
            tensors, storages = read_layout(file, lambda file: unpickler(file, str(path)), tensors_of)
        except Forbidden:
            raise
        except Odd as error:
            raise ValueError(f"{path}{error}") from None
        except (*DAMAGED, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged or is no PyTorch state dict: {error}") from error
    return {name: _array(path, name, tensor, storages) for name, tensor in tensors.items()}


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


def _read_zip(file: BinaryIO, unpickler: Callable, tensors_of: Callable) -> tuple[dict, Callable[[_Storage], bytes]]:
    """The tensors of a zip checkpoint, and a function giving the bytes of a storage."""
    with zipfile.ZipFile(file) as archive:
        members = {name.partition("/")[2]: name for name in archive.namelist()}
        if "data.pkl" not in members:
            raise ValueError("it is a zip archive without data.pkl")
        if "byteorder" in members and archive.read(members["byteorder"]).strip() != sys.byteorder.encode():
            raise ValueError("it was written on a machine of the other byte order")
        tensors = tensors_of(unpickler(io.BytesIO(archive.read(members["data.pkl"]))).load())
        wanted = {tensor.storage for tensor in tensors.values()}
        data = {storage: archive.read(members[f"data/{storage.key}"]) for storage in wanted}
    return tensors, data.__getitem__


def _read_legacy(file: BinaryIO, unpickler: Callable, tensors_of: Callable) -> tuple[dict, Callable[[_Storage], bytes]]:
    """As `_read_zip` for the layout before PyTorch 1.6: magic, version, machine, table, keys, then raw storages."""
    file.seek(0)
    magic, _, machine = (unpickler(file).load() for _ in range(3))
    if magic != _LEGACY_MAGIC:
        raise ValueError("it has not the magic number of a PyTorch checkpoint")
    if not machine["little_endian"] or sys.byteorder != "little":
        raise ValueError("old checkpoints are read only where both machines are little-endian")
    pickled = unpickler(file)
    tensors = tensors_of(pickled.load())
    data = {}
    for key in unpickler(file).load():
        size = int.from_bytes(file.read(8), "little", signed=True)
        data[key] = file.read(natural(size, "size of a storage") * pickled.widths[key])
    return tensors, lambda storage: data[storage.key]


def _array(path: pathlib.Path, name: str, tensor: TorchTensor, storages: Callable[[_Storage], bytes]) -> np.ndarray:
    """Cuts one tensor out of its storage, after checking that every element lies inside it."""
    storage, offset, shape, strides = tensor
    where = f"{path}: tensor {name}"
    try:
        data = storages(storage)
    except KeyError as error:
        raise ValueError(f"{where}: its storage {storage.key!r} is not in the file") from error
    if len(data) < storage.size * storage.dtype.itemsize:
        raise ValueError(f"{where}: its storage has {len(data)} bytes, but the file announces {storage.size} numbers")
    count = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    # More elements than the storage holds means overlapping ones (an expanded tensor), which could be of any size.
    if count and (last >= storage.size or count > storage.size):
        raise ValueError(f"{where}: shape {shape}, strides {strides} reach beyond its {storage.size} numbers")
    flat = np.frombuffer(data, storage.dtype, storage.size)
    if not count:
        return np.empty(shape, storage.dtype)
    steps = tuple(s * storage.dtype.itemsize for s in strides)
    # `order="C"` makes the copy contiguous whatever the strides in the file were.
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps).copy(order="C")
