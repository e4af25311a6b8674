"""One merge of models in memory, in a process of its own, for `benchmarks.merge`.

    python -m benchmarks.tower WORK/ckpt ties --settings '{"density": 0.2}'

Loads ``base`` and the fine-tuned copies into jax arrays, merges twice, and prints ``RESULT`` and a line of JSON:
seconds of the first call (with compilation) and of the second, and the peak of resident memory during each, above
what the loaded models take. The peak is the kernel's own high-water mark, reset before each call (Linux).
"""

import argparse
import gc
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import taskvec as tv
from taskvec.io import safetensors


def main() -> None:
    """Prints the figures of one method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("method")
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--tasks", type=int, default=8)
    args = parser.parse_args()
    if args.method in tv.methods():
        result = measure(args.folder, args.method, args.settings, args.tasks)
    else:
        result = {"error": f"not registered: {args.method}"}
    print("RESULT " + json.dumps(result), flush=True)


def measure(folder: pathlib.Path, method: str, settings: dict[str, Any], tasks: int = 8) -> dict[str, Any]:
    """Merges twice; returns seconds, megabytes and the norm of the result."""
    load = lambda name: {k: jnp.array(x) for k, x in safetensors.load(folder / f"{name}.safetensors").items()}
    pretrained, finetuned = load("base"), [load(f"t{t}") for t in range(tasks)]
    jax.block_until_ready((pretrained, finetuned))
    merge = lambda: tv.merge(method, pretrained, finetuned, **settings)
    models_mb = memory("VmRSS")
    result, first, cpu, first_peak = metered(merge)
    del result
    result, again, _, again_peak = metered(merge)
    return {
        "seconds": first,
        "seconds_again": again,
        "cpu_seconds": cpu,
        "models_mb": round(models_mb),
        "extra_mb": round(max(first_peak, again_peak) - models_mb),
        "extra_again_mb": round(again_peak - models_mb),
        "norms": norms(result),
    }


def metered(call: Callable[[], Any]) -> tuple[Any, float, float, float]:
    """Result, wall seconds, CPU seconds and peak resident megabytes of a call."""
    gc.collect()
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    start, cpu = time.perf_counter(), time.process_time()
    result = call()
    jax.block_until_ready(result if jax.tree.leaves(result) else result.params(0))
    return result, time.perf_counter() - start, time.process_time() - cpu, memory("VmHWM")


def memory(field: str) -> float:
    """A memory field of this process in megabytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def norms(result: Any) -> list[float]:
    """Euclidean norm of the merged model's floats; of a task-conditioned result, of its first two models."""
    models = [result.params(task) for task in range(2)] if hasattr(result, "params") else [result]
    square = lambda x: float(np.sum(np.square(np.asarray(x, np.float64))))
    return [round(sum(map(square, jax.tree.leaves(model))) ** 0.5, 6) for model in models]


if __name__ == "__main__":
    main()
