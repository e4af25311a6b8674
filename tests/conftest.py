"""Settings that must stand before jax starts.

Eight CPU devices, so that sharded runs are tested without accelerators. Compilation without expensive optimisations,
since tests compile thousands of tiny programs and run each once, and compiled programs kept beside pytest's own cache:
the processes that tests run in share them. One thread a call of LAPACK: tests run side by side.
"""

import importlib.metadata
import os
import pathlib

import pytest

FLAGS = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Twice as fast to compile as the defaults; 0.12 knows the first no more.
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join(FLAGS)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
COMPILED = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def few_programs():
    """Forgets compiled programs before their memory maps reach the kernel's limit for a process (65,530)."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        import jax

        jax.clear_caches()
