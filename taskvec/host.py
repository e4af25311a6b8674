"""The host that jax runs on: memory that jax takes as it is, the cache folder, programs kept, processes."""

import os
import pathlib

import jax
import numpy as np

ALIGNMENT = 64  # bytes; an array that starts at a multiple of it is shared, any other is copied


def aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """A flat array of `size` entries, not initialised, that `jax.device_put` does not copy."""
    nbytes = size * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + nbytes].view(dtype)


def cache() -> pathlib.Path:
    """The cache folder: ``$TASKVEC_CACHE``, else ``~/.cache/taskvec``."""
    return pathlib.Path(os.environ.get("TASKVEC_CACHE") or "~/.cache/taskvec").expanduser()


def keep_programs() -> None:
    """Compiled programs are kept in the cache folder, for the next process; for mains, which own jax's settings.

    A folder that is set already (``$JAX_COMPILATION_CACHE_DIR``) stays.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def alone(what: str) -> None:
    """Raises `RuntimeError` where several processes run what one has to do."""
    if jax.process_count() > 1:
        raise RuntimeError(
            f"{what} is done by one process, here are {jax.process_count()}: run it alone first, what it leaves is used"
        )
