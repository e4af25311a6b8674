"""Settings that must stand before jax starts.

Eight CPU devices, so that sharded runs are tested without accelerators. Compilation without expensive optimisations,
since tests compile hundreds of tiny programs and run each once. One thread a call of LAPACK: tests run side by side.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
