"""Merging models that stand on disk, in bounded memory: the same definitions as `merge`, leaf by leaf.

Elementwise and row-wise methods take large tensors in blocks of rows; methods that need a whole matrix say how much
memory that takes before they start.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from taskvec import tree as trees, vectors
from taskvec.merging.api import Which, resolve
from taskvec.transforms import Chain, LeafPolicy
from taskvec.transforms.base import Leaf
from taskvec.transforms.plan import Plan, make_leaf, make_plan
from taskvec.transforms.programs import applied
from taskvec.transforms.run import Where, run
from taskvec.transforms.stored import Stored

COPY = 1 << 24  # bytes of a tensor that takes no part, copied at once
BLOCK = 1 << 20  # entries of a block of rows, at most: larger ones are no faster,
WHOLE = 1 << 21  # but where tensors are measured, one in a single block is read once and not twice


class Reader(Protocol):
    """Where a model's tensors come from; `taskvec.io.safetensors.SafetensorsReader` is one."""

    specs: Mapping[str, Any]

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """One tensor, or some of its rows; called from several threads."""


class Streaming(NamedTuple):
    """What a streamed merge will do; everything here is known before a tensor is read.

    Attributes:
      transform, plan: the chain, and the tensors that take part.
      copied: names of the tensors that are copied from the pretrained model.
      passes: how often every tensor that takes part is read.
      read_bytes, write_bytes: in all passes together.
      rows: ``{name: rows of a block}`` of the tensors that are cut.
      workers: threads.
      peak_bytes: predicted memory of the blocks in flight.
      largest: name of the tensor whose block is largest.
    """

    transform: Chain
    plan: Plan
    copied: tuple[str, ...]
    passes: int
    read_bytes: int
    write_bytes: int
    rows: dict[str, int]
    workers: int
    peak_bytes: int
    largest: str


def plan_streamed(
    method: Which,
    pretrained: Reader | None,
    finetuned: Sequence[Reader],
    *,
    policy: LeafPolicy = LeafPolicy(),
    extras: Mapping[str, Sequence[Reader]] | None = None,
    memory: int = 1 << 30,
    dtype: Any = None,
    **settings: Any,
) -> Streaming:
    """Checks everything that can be checked without reading a tensor; arguments as `merge_streamed`.

    Raises:
      ValueError: what `merge` raises, or `memory` is too small for a method that needs whole tensors.
    """
    transform = resolve(method, settings, len(finetuned), pretrained is not None, extras or {})
    specs = dict((pretrained or finetuned[0]).specs)
    for i, reader in enumerate(finetuned):
        vectors.check_same_model(specs, dict(reader.specs), f"fine-tuned model {i}")
    plan = make_plan(transform, specs, len(finetuned), policy)
    inputs = [model for model in (pretrained, *finetuned) if model is not None]
    entry = sum(max(r.specs[p].dtype.itemsize for p in plan.tensors) for r in inputs)
    entry += 4 * (2 * len(finetuned) + 4) + 4 * len(extras or {}) * len(finetuned)
    sizes = {path: math.prod(tensor.shape) for path, tensor in plan.tensors.items()}
    workers = min(4, os.cpu_count() or 1)
    rows: dict[str, int] = {}
    if all(stage.by_rows for stage in transform.stages):
        measures = [measure for stage in transform.stages for measure in stage.measures]
        most = WHOLE if any(measure.scope == "tensor" for measure in measures) else BLOCK
        budget = min(most, memory // workers // entry)  # entries of a block
        for path, tensor in plan.tensors.items():
            if sizes[path] > budget and len(tensor.shape) > 1:
                rows[path] = _even(tensor.shape[0], max(1, budget // math.prod(tensor.shape[1:])))
        block = {p: rows[p] * math.prod(plan.tensors[p].shape[1:]) if p in rows else n for p, n in sizes.items()}
        largest = max(block, key=block.__getitem__)
        need = block[largest] * entry
    else:
        largest = max(sizes, key=sizes.__getitem__)
        matrices = [p for p in sizes if len(plan.tensors[p].shape) > 1]
        need = max(sizes[largest] * entry, *(_workspace(transform, plan, specs, p) for p in _shapes(plan, matrices)), 0)
    if need > memory:
        reason = "which this method needs whole" if not rows else "even a single row of it"
        raise ValueError(
            f"{largest} takes {need / 2**20:,.0f} MiB for {len(finetuned)} models, {reason}, and memory is "
            f"{memory / 2**20:,.0f} MiB: allow more, or leave the tensor out by the policy's include"
        )
    workers = max(1, min(workers, memory // max(need, 1)))
    passes = 1 + sum(measure.scope == "model" for stage in transform.stages for measure in stage.measures)
    copied = tuple(sorted(specs.keys() - plan.tensors.keys()))
    read = passes * sum(reader.specs[p].dtype.itemsize * n for reader in inputs for p, n in sizes.items())
    out = output_specs(specs, dtype)
    written = sum(math.prod(s.shape) * s.dtype.itemsize for s in out.values())
    read += sum(math.prod(specs[p].shape) * specs[p].dtype.itemsize for p in copied)
    return Streaming(transform, plan, copied, passes, read, written, rows, workers, workers * need, largest)


def output_specs(specs: Mapping[str, Any], dtype: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the merged model: floating-point tensors in `dtype` if it is given."""
    return {
        name: jax.ShapeDtypeStruct(spec.shape, np.dtype(dtype) if dtype and trees.is_float(spec) else spec.dtype)
        for name, spec in specs.items()
    }


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
        method, pretrained, finetuned, policy=policy, extras=extras, memory=memory, dtype=dtype, **settings
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
            raise ValueError("this method gives one model a task: name the task whose model to write")
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
        on_leaf=lambda path: advance(sum(_bytes(reader.specs[path]) for reader in inputs.readers)),
    )
    for path in todo.copied:
        _copy(inputs.readers[0], path, out[path], write)
        advance(_bytes(inputs.readers[0].specs[path]))


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
        have = {name: readers for name, readers in self.extras.items() if path in readers[0].specs}
        extra = {name: jnp.stack([read(reader) for reader in readers]) for name, readers in have.items()}
        plan = self.todo.plan
        return make_leaf(plan.tensors[path], plan.info, theta0, experts, extra, rows.start if rows else 0)

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


def _even(length: int, most: int) -> int:
    """Rows of a block, at most `most`; blocks of one size, which compile once, if that does not halve them."""
    return next((rows for rows in range(most, most // 2, -1) if length % rows == 0), most)


def _copy(reader: Reader, path: str, spec: Any, write: Callable) -> None:
    if len(spec.shape) < 2:
        write(path, np.asarray(reader.read(path), spec.dtype), None)
        return
    step = max(1, COPY // max(1, math.prod(spec.shape[1:]) * spec.dtype.itemsize))
    for at in range(0, spec.shape[0], step):
        rows = slice(at, min(at + step, spec.shape[0]))
        write(path, np.asarray(reader.read(path, rows), spec.dtype), rows)


def _bytes(spec: Any) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


def _shapes(plan: Plan, paths: Sequence[str]) -> list[str]:
    """One path of each shape among the largest tensors."""
    one = {plan.tensors[path].shape: path for path in paths}
    return sorted(one.values(), key=lambda path: -math.prod(plan.tensors[path].shape))[:3]


def _workspace(transform: Chain, plan: Plan, specs: Mapping[str, Any], path: str) -> int:
    """Memory that XLA plans for one tensor: arguments, result and everything between."""
    spec = jax.ShapeDtypeStruct(specs[path].shape, specs[path].dtype)
    leaf = make_leaf(plan.tensors[path], plan.info, spec, (spec,) * plan.info.num_tasks, {})
    nothing = tuple({} for _ in transform.stages)
    if any(m.scope == "model" for stage in transform.stages for m in stage.measures):
        return 0
    constants = tuple(dict(enumerate(stage.constants)) for stage in transform.stages)
    stages = tuple(s._replace(constants=(0.0,) * len(s.constants)) for s in transform.stages)
    lowered = applied.lower(stages, constants, nothing, leaf, False, True, True, None, 0)
    memory = lowered.compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
