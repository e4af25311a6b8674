"""What a merge cannot be faster than: bytes to move and matrices to decompose, at rates measured in the same run.

* in memory: every pass over the T + 1 models and the result, at the rate at which all cores copy memory;
* matrix methods: the eigenvectors, polar factors and matrix products that the method needs (`WORK`), at the measured
  times of the best solver at hand for each size and the measured rate of float32 products. Work and movement may
  overlap: the floor is the larger of the two;
* on disk: reading the input files once, from a warm page cache into one small buffer, and writing as many bytes as
  the result has, into the page cache.

    python -m benchmarks.floors memory '[["my row", "ties", {}]]'     # prints RESULT and JSON, floors by row
    python -m benchmarks.floors disk OUT_BYTES SCRATCH_FILE INPUT...
"""

import argparse
import collections
import concurrent.futures
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from benchmarks.models import tower_shapes

BUFFER = 8 << 20


class Work(NamedTuple):
    """Work on one matrix.

    Attributes:
      eigh: ``(n, k)`` for the k leading eigenvectors of a symmetric matrix of size n.
      polar: sizes n of square roots ``G^(-1/2)`` of well-conditioned Gram matrices.
      flops: floating-point operations of products.
    """

    eigh: tuple[tuple[int, int], ...] = ()
    polar: tuple[int, ...] = ()
    flops: float = 0.0


def _iso_c(m: int, n: int, tasks: int, settings: dict) -> Work:
    """Gram matrix of the sum, its eigenvectors, ``G^(-1/2) A``."""
    r, size = min(m, n), m * n
    return Work(((r, r),), (), 2 * r * size + 2 * r**3 + 2 * r * size)


def _tsv_m(m: int, n: int, tasks: int, settings: dict) -> Work:
    """``r / T`` singular vectors per task; polar factors of U and V, r columns each; ``U S V``."""
    r, size = min(m, n), m * n
    per_task = 2 * r * size + 2 * size * (r // tasks)
    polar = 2 * (2 * r * r * (m + n))
    return Work(((r, r // tasks),) * tasks, (r, r), tasks * per_task + polar + 2 * r * size)


def _iso_cts(m: int, n: int, tasks: int, settings: dict) -> Work:
    """`_tsv_m` with fewer vectors per task, plus those of the sum and T projections away from its leading part."""
    plain, r, size = _tsv_m(m, n, tasks, settings), min(m, n), m * n
    common = round(0.8 * r)
    eigh = ((r, max((r - common) // tasks, 1)),) * tasks + ((r, r),)
    return Work(eigh, plain.polar, plain.flops + 2 * r * size + 2 * size * common + tasks * 4 * size * common)


def _wudi(m: int, n: int, tasks: int, settings: dict) -> Work:
    """``A = sum_t w_t tau_t' tau_t``, ``R = sum_t w_t tau_t tau_t' tau_t``; then ``y A - R`` a step, or ``R A^+``."""
    grams = tasks * (2 * m * n * n + min(2 * m * n * n, 4 * m * m * n))
    if settings.get("solver") == "exact":
        return Work(((n, n),), (), grams + 2 * 2 * m * n * n)
    return Work((), (), grams + settings.get("steps", 300) * 2 * m * n * n)


def _doge(m: int, n: int, tasks: int, settings: dict) -> Work:
    """Singular vectors of the tasks, then of these; a projection onto r / 6 columns and back a step."""
    r, size = min(m, n), m * n
    each = tasks * (2 * r * size + 2 * size * (r // tasks)) + 2 * m * r * r
    step = 4 * size * (r // 6) + 4 * tasks * size
    return Work((*((r, r // tasks),) * tasks, (r, r // 6)), (), each + settings.get("steps", 400) * step)


# method -> work on a matrix of m outputs and n inputs
WORK: dict[str, Callable[[int, int, int, dict], Work]] = {
    "iso_c": _iso_c,
    "tsv_m": _tsv_m,
    "iso_cts": _iso_cts,
    "wudi": _wudi,
    "doge": _doge,
}
LINEAR_ONLY = ("wudi", "doge")  # these leave tables of embeddings alone

# Passes over the models: one, and one more for every statistic of the whole model that the next step needs.
PASSES = {"ties": 2, "pcb": 4}


class Rates:
    """Rates of this machine, each measured when first asked for."""

    def __init__(self):
        self.cores = len(os.sched_getaffinity(0))
        self._eigh: dict[tuple[int, int], float] = {}

    def together(self, calls: list[Callable]) -> float:
        """Seconds of running calls at the same time."""
        with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
            return best(lambda: list(pool.map(lambda call: call(), calls)))

    @functools.cached_property
    def copy_bytes(self) -> float:
        """Bytes a second, read and written, of all cores copying arrays larger than the caches."""
        pairs = [(np.ones(16 << 20, np.float32), np.empty(16 << 20, np.float32)) for _ in range(self.cores)]
        seconds = self.together([functools.partial(np.copyto, out, x) for x, out in pairs])
        return self.cores * 2 * pairs[0][0].nbytes / seconds

    @functools.cached_property
    def flops(self) -> float:
        """Floating-point operations a second of a float32 matrix product."""
        a, b = jnp.ones((768, 768)), jnp.ones((768, 3072))
        product = jax.jit(jnp.matmul)
        return 2 * 768 * 768 * 3072 / best(lambda: jax.block_until_ready(product(a, b)), 5)

    def eigh(self, n: int, k: int) -> float:
        """Seconds for the k leading eigenvectors of size n: the best of jax's and LAPACK's solvers, one a core."""
        if k == 0:
            return 0.0
        if (n, k) not in self._eigh:
            a = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)
            gram, solve = a @ a.T, jax.jit(jnp.linalg.eigh)
            leading = functools.partial(scipy.linalg.eigh, gram, driver="evr", subset_by_index=(n - k, n - 1))
            found = [self.together([leading] * self.cores) / self.cores]
            found.append(best(lambda: jax.block_until_ready(solve(gram))))
            self._eigh[n, k] = min(found)
        return self._eigh[n, k]

    def polar(self, n: int) -> float:
        """Seconds of ``G^(-1/2)``, by eigenvectors or by eight Newton-Schulz steps of two products each."""
        return min(self.eigh(n, n) + 2 * n**3 / self.flops, 8 * 2 * 2 * n**3 / self.flops)

    def measured(self) -> dict[str, float]:
        """What has been measured so far, for the record."""
        rates = {name: vars(self)[name] for name in ("copy_bytes", "flops") if name in vars(self)}
        return rates | {f"eigh_{n}_leading_{k}_seconds": seconds for (n, k), seconds in self._eigh.items()}


def best(call: Callable, repeats: int = 3) -> float:
    """Least seconds of some calls, after one that is not counted."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def in_memory(method: str, settings: dict, shapes: Mapping[str, tuple], tasks: int, rates: Rates) -> dict:
    """Floor of a method on models of float32 tensors: seconds, and what they are made of."""
    size = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    moved = size * (PASSES.get(method, 1) * (tasks + 1) + 1)
    floor = {"bytes": moved, "bytes_seconds": moved / rates.copy_bytes}
    work = []
    for name, shape in shapes.items():
        if method in WORK and len(shape) == 2 and not (method in LINEAR_ONLY and "embed" in name):
            work.append(WORK[method](*shape, tasks, settings))
    solved = collections.Counter(size for each in work for size in each.eigh)
    roots = collections.Counter(n for each in work for n in each.polar)
    floor["eigh"] = {f"{n}, leading {k}": count for (n, k), count in solved.items()}
    floor["polar"] = dict(roots)
    floor["flops"] = sum(each.flops for each in work)
    compute = floor["flops"] / rates.flops + sum(count * rates.polar(n) for n, count in roots.items())
    floor["compute_seconds"] = compute + sum(count * rates.eigh(n, k) for (n, k), count in solved.items())
    return {"seconds": max(floor["bytes_seconds"], floor["compute_seconds"]), **floor}


def on_disk(files: Iterable[pathlib.Path], out_bytes: int, scratch: pathlib.Path) -> dict[str, float]:
    """Seconds of reading `files` once and of writing `out_bytes` to the file `scratch`, which is deleted again."""
    files, buffer = list(files), bytearray(BUFFER)

    def read() -> None:
        for path in files:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def write() -> None:
        with open(scratch, "wb", buffering=0) as file:
            for left in range(out_bytes, 0, -BUFFER):
                file.write(memoryview(buffer)[: min(left, BUFFER)])
        scratch.unlink()

    reading, writing = best(read), best(write)
    read_bytes = sum(path.stat().st_size for path in files)
    return {
        "seconds": reading + writing,
        "read_seconds": reading,
        "write_seconds": writing,
        "bytes": read_bytes + out_bytes,
    }


def main() -> None:
    """Prints the floors asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    memory = kinds.add_parser("memory")
    memory.add_argument("rows", type=json.loads, help="JSON: [[row, method, settings], ...]")
    memory.add_argument("--tasks", type=int, default=8)
    memory.add_argument("--small", action="store_true")
    disk = kinds.add_parser("disk")
    disk.add_argument("out_bytes", type=int)
    disk.add_argument("scratch", type=pathlib.Path)
    disk.add_argument("files", nargs="+", type=pathlib.Path)
    args = parser.parse_args()
    if args.kind == "disk":
        found = on_disk(args.files, args.out_bytes, args.scratch)
    else:
        rates, shapes = Rates(), tower_shapes(args.small)
        floors = {row: in_memory(method, settings, shapes, args.tasks, rates) for row, method, settings in args.rows}
        found = {"rates": rates.measured(), "floors": floors}
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
