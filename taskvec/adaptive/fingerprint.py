"""What a run of an adaptive method depends on, in short texts: a checkpoint of another run is known by them."""

import zlib
from typing import Any

import jax
import numpy as np

from taskvec.adaptive.problem import Problem
from taskvec.adaptive.rows import Rows

SIMPLE = (str, bool, int, float, type(None))


def of(name: str, problem: Problem, rows: Rows, settings: dict[str, Any], seed: int) -> dict[str, str]:
    """``{what: text}`` of a method's run.

    Of arrays the shapes, and a checksum of the last entry along the last axis; of rows the numbers, labels and the
    first of every task. So little costs no time beside a run, and runs on other models or data differ in it.

    Args:
      name: of the method.
      problem, rows, settings, seed: what it is given, defaults included.
    """
    about = {"method": repr(name), "seed": repr(int(seed)), "rows": _text(rows), "linear": repr(problem.linear)}
    about |= {part: _text(getattr(problem, part)) for part in ("theta0", "tau", "heads")}
    return about | {f"setting {key}": _text(value) for key, value in settings.items()}


def _text(value: Any) -> str:
    if isinstance(value, Rows):
        first = [value.take(t, np.zeros(1, int)) for t, count in enumerate(value.counts) if count]
        return f"{list(value.counts)} rows, checksum {_checksum((first, value.labels)):08x}"
    value = value.item() if isinstance(value, np.generic) else value
    if all(isinstance(x, SIMPLE) for x in jax.tree.leaves(value)):
        return repr(value)
    return f"checksum {_checksum(value):08x}"


def _checksum(tree: Any) -> int:
    leaves, structure = jax.tree.flatten(tree)
    # Arrays of the host stay there: they may be too large for the device. Of what other processes hold, shapes count.
    ours = lambda x: isinstance(x, jax.Array) and x.is_fully_addressable
    ends = iter(jax.device_get(_ends([x for x in leaves if ours(x)])))

    def told(x: Any) -> bytes:
        if not isinstance(x, jax.Array | np.ndarray):
            return repr(x if isinstance(x, SIMPLE) else getattr(x, "__qualname__", type(x).__qualname__)).encode()
        end = _end(x) if isinstance(x, np.ndarray) else next(ends) if ours(x) else np.zeros(0)
        return f"{x.dtype}{x.shape}".encode() + end.tobytes()

    return zlib.crc32(b" ".join([str(structure).encode(), *map(told, leaves)]))


def _end(x: Any) -> Any:
    return x[..., -1] if x.ndim and x.shape[-1] else x


@jax.jit
def _ends(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_end(x) for x in arrays]
