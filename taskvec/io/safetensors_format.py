"""What reading and writing safetensors share: dtype codes, file names of a model folder, the header."""

import json
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_NUMPY = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
DTYPES = {code: np.dtype(dtype) for code, dtype in _NUMPY.items()}
CODES = {dtype: code for code, dtype in DTYPES.items()}

PathLike = str | os.PathLike
_PROCESS = re.compile(r"\d+(-\d+)?")


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


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file under a temporary name and renames it, so that it is never half there."""
    temporary = temporary_name(path)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def temporary_name(path: pathlib.Path) -> pathlib.Path:
    """A hidden name beside `path`, on the same file system so that a rename is atomic."""
    return path.with_name(f".{path.name}.{this_process()}.tmp")


def remove_stale(folder: pathlib.Path, pattern: str) -> None:
    """Deletes temporary files for names that match `pattern` (as `glob` has it) that killed processes left."""
    for temporary in folder.glob(f".{pattern}.*.tmp"):
        process = temporary.name.split(".")[-2]
        if _PROCESS.fullmatch(process) and process != this_process() and not alive(process):
            temporary.unlink(missing_ok=True)


def this_process() -> str:
    """What this process is known by: ``PID-START`` where the time of its start can be told, else ``PID``."""
    pid = os.getpid()
    return "-".join(filter(None, (str(pid), _started(pid))))


def alive(process: str) -> bool:
    """Whether another process of this machine still runs, by what it was known by.

    Numbers come again, in containers at every start. So one that is our own was another's before, and where both times
    of start are known they must agree.
    """
    if not _PROCESS.fullmatch(process):
        return False
    pid, _, start = process.partition("-")
    if int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    now = _started(int(pid))
    return not start or not now or now == start


def _started(pid: int) -> str:
    """When a process started, in clock ticks since the machine did; "" where this cannot be told."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The second field is the program's name in brackets, and may hold spaces and brackets; this is the 22nd.
    state, *more = fields.rpartition(")")[2].split()
    return "ended" if state in "ZX" else more[18]


def listing(folder: pathlib.Path) -> str:
    """What a folder holds, for error messages."""
    return some(sorted(p.name for p in folder.iterdir())) or "nothing"


def some(names: Sequence[str], most: int = 8) -> str:
    """The first names of a list and how many more there are, for error messages."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
