"""Settings that must stand before jax starts.

Eight CPU devices, so that sharded runs are tested without accelerators. Compilation without expensive optimisations,
since tests compile hundreds of tiny programs and run each once. One thread a call of LAPACK: tests run side by side.
"""

import os
import pathlib

import pytest

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def few_programs():
    """Forgets compiled programs before their memory maps reach the kernel's limit for a process (65,530)."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        import jax

        jax.clear_caches()
