"""Memory of the host that jax on a CPU takes as it is."""

import numpy as np

ALIGNMENT = 64  # bytes; an array that starts at a multiple of it is shared, any other is copied


def aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """A flat array of `size` entries, not initialised, that `jax.device_put` does not copy."""
    nbytes = size * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + nbytes].view(dtype)
