"""Memory of a process on CPU that runs the same program step after step."""

import ctypes
import pathlib
import sys

# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


def keep_freed() -> bool:
    """Keeps memory that is freed in the process; call it before jax starts its threads.

    XLA on CPU allocates a program's temporary memory whenever it runs. Where that comes fresh from the kernel, page
    after page, this costs a step some 10 to 20 percent. The process may hold a third more than its peak otherwise.

    Returns:
      whether the C library is one that can be told so (glibc on Linux; elsewhere nothing changes).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # One arena: those of other threads hand large blocks back whatever the thresholds say.
    settings = ((_TRIM_THRESHOLD, -1), (_MMAP_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1))
    done = [mallopt(*setting) for setting in settings]
    return done == [1, 1, 1]


def forget_peak() -> None:
    """Starts to measure the peak of resident memory anew (Linux; elsewhere it stays that of the whole process)."""
    if sys.platform.startswith("linux"):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
