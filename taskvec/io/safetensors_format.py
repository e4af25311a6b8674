"""What reading and writing safetensors share: dtype codes, file names of a model folder, the header."""

import json
import math
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from taskvec.io.atomic import PathLike

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_NUMPY = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
DTYPES = {code: np.dtype(dtype) for code, dtype in _NUMPY.items()}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def read_header(path: PathLike) -> dict[str, Any]:
    """The JSON header of a safetensors file; see `header_and_start`."""
    return header_and_start(path)[0]


def header_and_start(path: PathLike) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and the first byte of its data.

    The file must be as long as its header says, and every tensor as its shape says.

    Raises:
      ValueError: the file is cut short, has bytes left over, or is not safetensors.
    """
    path = pathlib.Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            what = "it is cut short, or is no safetensors file (a Git LFS pointer?)"
            raise ValueError(f"{path}: {size} bytes cannot hold a header of {length} bytes: {what}. Fetch it again.")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: its header is not that of a safetensors file ({error!r})") from error
    if size != expected:
        relation = "is cut short" if size < expected else "has bytes left over"
        raise ValueError(f"{path} {relation}: {size} bytes, but its header promises {expected}. Fetch it again.")
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in DTYPES:
            begin, end = entry["data_offsets"]
            size = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
            if not 0 <= begin <= end or end - begin != size:
                raise ValueError(f"{path}: {name} needs {size} bytes, but its header gives it {begin} to {end}")
    return header, 8 + length
