"""How many threads LAPACK may use on a CPU.

jax takes its CPU routines for eigenvectors and QR from the OpenBLAS inside scipy, which starts a thread a core for
every call. A 768 x 768 eigen-decomposition gains nothing by them, and calls from several threads at once, as `run`
makes them, wait for each other: on a busy machine hundreds of times longer than the work takes.
"""

import contextlib
import ctypes
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import scipy


@functools.cache
def _openblas() -> Any:
    """scipy's OpenBLAS, already loaded; ``None`` where scipy has another LAPACK."""
    root = pathlib.Path(scipy.__file__).parent
    for folder in (root.parent / "scipy.libs", root / ".dylibs"):
        for path in sorted(folder.glob("libscipy_openblas*")):
            with contextlib.suppress(OSError, AttributeError):
                library = ctypes.CDLL(str(path))
                library.scipy_openblas_get_num_threads, library.scipy_openblas_set_num_threads  # noqa: B018
                return library
    return None


@contextlib.contextmanager
def one_lapack_thread() -> Iterator[None]:
    """Within this, each call of LAPACK by jax uses the thread it is made from; without effect on other LAPACKs."""
    library = _openblas()
    if library is None:
        yield
        return
    before = library.scipy_openblas_get_num_threads()
    library.scipy_openblas_set_num_threads(1)
    try:
        yield
    finally:
        library.scipy_openblas_set_num_threads(before)
