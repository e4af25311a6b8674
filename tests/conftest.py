"""Settings that must stand before jax starts.

Eight CPU devices, so that sharded runs are tested without accelerators. Compilation without expensive optimisations,
since tests compile hundreds of tiny programs and run each once.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
