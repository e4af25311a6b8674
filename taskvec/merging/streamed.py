"""Merging models that stand on disk, in bounded memory: the same definitions as `merge`, leaf by leaf.

Elementwise and row-wise methods take large tensors in blocks of rows; methods that need a whole matrix say how much
memory that takes before they start.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from taskvec.host import aligned
from taskvec.merging.api import Which
from taskvec.merging.stream_plan import Reader, Streaming, nbytes, output_specs, plan_streamed
from taskvec.merging.workspace import extra_specs
from taskvec.transforms import LeafPolicy
from taskvec.transforms.base import Leaf
from taskvec.transforms.plan import make_leaf
from taskvec.transforms.run import Where, run
from taskvec.transforms.stored import Stored

COPY = 1 << 24  # bytes of a tensor that takes no part, copied at once


def merge_streamed(
    method: Which,
    pretrained: Reader | None,
    finetuned: Sequence[Reader],
    write: Callable[[str, np.ndarray, slice | None], None],
    *,
    policy: LeafPolicy = LeafPolicy(),
    extras: Mapping[str, Sequence[Reader]] | None = None,
    memory: int = 1 << 30,
    dtype: Any = None,
    task: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> None:
    """Merges models tensor by tensor: the same definition as `merge`, in bounded memory.

    Every measure of the whole model and the final application read each model once.

    Args:
      method: as for `merge`.
      pretrained, finetuned: readers; names, shapes and dtypes are compared before any tensor is read.
      write: receives every tensor of the merged model once, or in blocks of rows; one call at a time.
      policy: which tensors take part.
      extras: T readers for each extra that the method asks for.
      memory: bytes for the blocks in flight.
      dtype: of the merged floating-point tensors; those of the pretrained model if ``None``.
      task: which task's model to write, for task-conditioned methods.
      on_progress: called with (bytes done, bytes in all passes together).
      **settings: of the method.

    Raises:
      ValueError: as `plan_streamed`, or a tensor holds NaN or infinity (names the file and the tensor).
    """
    todo = plan_streamed(
        method, pretrained, finetuned, policy=policy, extras=extras, memory=memory, dtype=dtype, task=task, **settings
    )
    inputs = _Inputs(pretrained, tuple(finetuned), dict(extras or {}), todo, {})
    out, done = output_specs((pretrained or finetuned[0]).specs, dtype), 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_progress:
            on_progress(done, todo.read_bytes)

    def emit(path: str, rows: slice | None, x: Any) -> None:
        if isinstance(x, Stored):
            raise ValueError("this method gives one model per task: name the task whose model to write")
        write(path, np.asarray(x), rows)

    run(
        todo.transform,
        todo.plan,
        inputs.leaf,
        emit,
        where=Where(jax.default_backend() == "cpu", todo.workers, check=True),
        rows_of=inputs.rows,
        dtype=None if dtype is None else np.dtype(dtype),
        task=task,
        not_finite=inputs.name_not_finite,
        on_leaf=lambda path: advance(sum(nbytes(reader.specs[path]) for reader in inputs.readers)),
    )
    for path in todo.copied:
        _copy(inputs.readers[0], path, out[path], write)
        advance(nbytes(inputs.readers[0].specs[path]))


class _Inputs(NamedTuple):
    """The models of a streamed merge, and how their tensors are taken."""

    pretrained: Reader | None
    finetuned: tuple[Reader, ...]
    extras: dict[str, Sequence[Reader]]
    todo: Streaming
    blank: dict[tuple, Any]

    @property
    def readers(self) -> list[Reader]:
        """All models, the pretrained one first if there is one."""
        return [reader for reader in (self.pretrained, *self.finetuned) if reader is not None]

    def rows(self, path: str) -> list[slice | None]:
        """The blocks of a tensor."""
        if path not in self.todo.rows:
            return [None]
        length, step = self.todo.plan.tensors[path].shape[0], self.todo.rows[path]
        return [slice(at, min(at + step, length)) for at in range(0, length, step)]

    def leaf(self, path: str, rows: slice | None) -> Leaf:
        """Reads one tensor or block of every model."""
        # `jnp.asarray` would copy, by a program that it compiles for every shape.
        read = lambda reader: jax.device_put(reader.read(path, rows))
        experts = tuple(read(reader) for reader in self.finetuned)
        theta0 = self.zeros(experts[0]) if self.pretrained is None else read(self.pretrained)
        plan = self.todo.plan
        specs = extra_specs(self.extras, path, plan.tensors[path])
        extra = {name: self.extra(name, spec, path, rows) for name, spec in specs.items()}
        return make_leaf(plan.tensors[path], plan.info, theta0, experts, extra, rows.start if rows else 0)

    def extra(self, name: str, spec: Any, path: str, rows: slice | None) -> Any:
        """An extra of one tensor or block, of all tasks; beside them one task's is in memory."""
        shape = spec.shape if rows is None else (spec.shape[0], rows.stop - rows.start, *spec.shape[2:])
        out = aligned(math.prod(shape), spec.dtype).reshape(shape)
        for task, reader in enumerate(self.extras[name]):
            at = (slice(None), task) if self.todo.plan.tensors[path].stacked else task
            out[at] = reader.read(path, rows)
            if not np.isfinite(out[at]).all():
                raise ValueError(f"extra {name!r} of model {task}: {path} holds NaN or infinity")
        return jax.device_put(out)

    def zeros(self, like: Any) -> Any:
        """Zeros in a shape; made once for all blocks of that shape."""
        key = (like.shape, like.dtype)
        if key not in self.blank:
            self.blank[key] = jax.device_put(np.zeros(*key))
        return self.blank[key]

    def name_not_finite(self, path: str) -> None:
        """Raises `ValueError` naming the file of a tensor that holds NaN or infinity, if one does."""
        for number, reader in enumerate(self.readers):
            model = "the pretrained model" if self.pretrained is not None and number == 0 else "a fine-tuned model"
            for rows in self.rows(path):
                if not np.isfinite(np.asarray(reader.read(path, rows), np.float32)).all():
                    file = reader.path_of(path) if hasattr(reader, "path_of") else model
                    raise ValueError(f"{file}: tensor {path} holds NaN or infinity")


def _copy(reader: Reader, path: str, spec: Any, write: Callable) -> None:
    if len(spec.shape) < 2:
        write(path, np.asarray(reader.read(path), spec.dtype), None)
        return
    step = max(1, COPY // max(1, math.prod(spec.shape[1:]) * spec.dtype.itemsize))
    for at in range(0, spec.shape[0], step):
        rows = slice(at, min(at + step, spec.shape[0]))
        write(path, np.asarray(reader.read(path, rows), spec.dtype), rows)
