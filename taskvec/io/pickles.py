"""Unpickling without running anything: a pickle may call only names from a short table.

A pickle is a program. Here its names are never imported: each allowed one is replaced by a small record of our own, and
any other is refused before it is looked up. Used for the two kinds of pickle that published weights and data sets come
in: PyTorch state dicts (`taskvec.io.torch_checkpoint`) and single numpy arrays.
"""

import io
import math
import pathlib
import pickle
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from taskvec.io.atomic import PathLike

# What a damaged pickle can make the interpreter of pickles raise, our own checks included.
DAMAGED = (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError, OverflowError)


class Forbidden(pickle.UnpicklingError, ValueError):
    """A pickle asked for a name outside the allow-list; nothing of it was run."""


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler whose names come from a table and nowhere else."""

    def __init__(self, file: BinaryIO, allowed: Mapping[tuple[str, str], Any], source: str):
        super().__init__(file)
        self._allowed, self._source = allowed, source

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise Forbidden(
                f"{self._source}: the pickle wants {module}.{name}, which is not allowed and was not run. Allowed are "
                f"{', '.join(sorted('.'.join(k) for k in self._allowed))}. Save plain tensors (a state dict) instead."
            )
        return self._allowed[module, name]


def natural(n: Any, what: str) -> int:
    """`n` if it is a whole number >= 0; raises `ValueError` otherwise."""
    if not isinstance(n, int) or isinstance(n, bool) or n < 0:
        raise ValueError(f"{what} must be a whole number >= 0, found {n!r}")
    return n


def load_numpy_pickle(source: bytes | PathLike) -> np.ndarray:
    """Reads one pickled numpy array of numbers (pickle protocol 3 or 4), from bytes or a file.

    Raises:
      Forbidden: the pickle holds anything but a plain array.
      ValueError: it is damaged, or its dtype is not one of plain numbers.
    """
    data = source if isinstance(source, bytes) else pathlib.Path(source).read_bytes()
    name = "the pickle" if isinstance(source, bytes) else str(source)
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    allowed: dict[tuple[str, str], Any] = {(m, "_reconstruct"): _new(_PickledArray) for m in modules}
    allowed |= {("numpy", "ndarray"): "ndarray", ("numpy", "dtype"): _new(_PickledDtype)}
    try:
        return _PickledArray.result(RestrictedUnpickler(io.BytesIO(data), allowed, name).load())
    except Forbidden:
        raise
    except DAMAGED as error:
        raise ValueError(f"{name} is not one pickled array of numbers: {error}") from error


class _PickledArray:
    """Takes the place of an ndarray while unpickling, so that numpy's own ``__setstate__`` never sees the file."""

    state: Any = None

    def __init__(self, kind: Any, shape: Any, typecode: Any):
        del kind, shape, typecode  # always an empty ndarray; what matters follows in the state

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @staticmethod
    def result(record: Any) -> np.ndarray:
        if not isinstance(record, _PickledArray) or not isinstance(record.state, tuple):
            raise ValueError("it holds something else")
        _, shape, dtype, fortran, data = record.state
        if not isinstance(dtype, _PickledDtype) or not isinstance(data, bytes):
            raise ValueError("arrays of objects are not read")
        shape = tuple(natural(n, "axis") for n in shape)
        if math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise ValueError(f"{len(data)} bytes cannot fill {dtype.dtype}{list(shape)}")
        return np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C").copy()


class _PickledDtype:
    """Takes the place of a numpy dtype of plain numbers."""

    def __init__(self, code: str, align: Any = False, copy: Any = True):
        del align, copy
        if not (isinstance(code, str) and code[:1] in tuple("biuf") and code[1:] in tuple("1248")):
            raise ValueError(f"dtype {code!r} is not one of plain numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


def _new(record: type) -> Callable:
    # A function of our own instead of the class: a pickle may set attributes on what it is given.
    return lambda *args: record(*args)
