"""What a streamed merge will do, known before a tensor is read: blocks of rows, threads, passes, memory."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from taskvec import tree as trees, vectors
from taskvec.merging.api import Which, resolve
from taskvec.merging.workspace import Workspace, check_extras
from taskvec.transforms import Chain, LeafPolicy
from taskvec.transforms.plan import Plan, make_plan

BLOCK = 1 << 20  # entries of a block of rows, at most: larger ones are no faster,
WHOLE = 1 << 21  # but where tensors are measured, one in a single block is read once and not twice
WORKERS = 4  # threads at most; blocks are cut for as many everywhere, for sums are rounded by how a tensor is cut


class Reader(Protocol):
    """Where a model's tensors come from; `taskvec.io.safetensors.SafetensorsReader` is one.

    One that cannot read rows alone also has ``held(name) -> int``: the bytes that reading some rows takes besides them.
    """

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
    task: int | None = None,
    **settings: Any,
) -> Streaming:
    """Checks everything that can be checked without reading a tensor; arguments as `merge_streamed`.

    Raises:
      ValueError: what `merge` raises, extras do not fit the model, or `memory` is too small for a method that needs
        whole tensors.
    """
    extras = extras or {}
    transform = resolve(method, settings, len(finetuned), pretrained is not None, extras)
    specs = dict((pretrained or finetuned[0]).specs)
    for i, reader in enumerate(finetuned):
        vectors.check_same_model(specs, dict(reader.specs), f"fine-tuned model {i}")
    plan = make_plan(transform, specs, len(finetuned), policy)
    inputs = [model for model in (pretrained, *finetuned) if model is not None]
    models = [None if model is None else model.specs for model in (pretrained, *finetuned)]
    work = Workspace(transform, plan, models, extras, dtype, task)
    if extras:
        check_extras(extras, specs, plan)
        work.check()
    rows: dict[str, int] = {}
    if all(stage.by_rows for stage in transform.stages):
        rows, needs = _cut(transform, plan, inputs, extras, memory)
    else:
        needs = {path: _entries(specs[path]) * _per_entry(plan, inputs, {}) for path in plan.tensors}
        matrices = [path for path in work.kinds() if len(plan.tensors[path].shape) > 1]
        needs |= {path: max(needs[path], work.bytes(path)) for path in matrices[:3]}
    largest = max(needs, key=needs.__getitem__)
    held = sum(max(reader.held(path) for path in plan.tensors) for reader in inputs if hasattr(reader, "held"))
    need = needs[largest] + held
    if need > memory:
        reason = "which this method needs whole" if not rows else "even a single row of it"
        kept = f" and {held / 2**20:,.0f} MiB for what checkpoints give whole only" if held else ""
        raise ValueError(
            f"{largest} takes {needs[largest] / 2**20:,.0f} MiB for {len(finetuned)} models, {reason}{kept}, and "
            f"memory is {memory / 2**20:,.0f} MiB: allow more, or leave the tensor out by the policy's include"
        )
    # Threads would take turns at making a reader restore what another has just let go.
    workers = 1 if held else max(1, min(WORKERS, os.cpu_count() or 1, memory // max(need, 1)))
    passes = 1 + sum(measure.scope == "model" for stage in transform.stages for measure in stage.measures)
    copied = tuple(sorted(specs.keys() - plan.tensors.keys()))
    read = passes * sum(nbytes(reader.specs[path]) for reader in inputs for path in plan.tensors)
    read += sum(nbytes(specs[path]) for path in copied)
    written = sum(map(nbytes, output_specs(specs, dtype).values()))
    return Streaming(transform, plan, copied, passes, read, written, rows, workers, workers * need, largest)


def _per_entry(plan: Plan, inputs: Sequence[Reader], extras: Mapping[str, Sequence[Reader]]) -> int:
    """Bytes for an entry of a tensor: as it is stored in all models and extras, and what is computed, in float32."""
    count = plan.info.num_tasks
    stored = sum(max(reader.specs[path].dtype.itemsize for path in plan.tensors) for reader in inputs)
    more = (4 + max(spec.dtype.itemsize for spec in readers[0].specs.values()) for readers in extras.values())
    return stored + 4 * (2 * count + 4) + count * sum(more)


def _cut(
    transform: Chain, plan: Plan, inputs: Sequence[Reader], extras: Mapping[str, Sequence[Reader]], memory: int
) -> tuple[dict[str, int], dict[str, int]]:
    """``{tensor that is cut: rows of a block}`` and ``{tensor: bytes for a block of it}``."""
    measures = [measure for stage in transform.stages for measure in stage.measures]
    most = WHOLE if any(measure.scope == "tensor" for measure in measures) else BLOCK
    entry = _per_entry(plan, inputs, extras)
    budget = min(most, memory // WORKERS // entry)  # entries of a block
    rows, needs = {}, {}
    for path, tensor in plan.tensors.items():
        size = _entries(inputs[0].specs[path])
        if size > budget and len(tensor.shape) > 1 and not tensor.stacked:
            row = math.prod(tensor.shape[1:])
            rows[path] = _even(tensor.shape[0], max(1, budget // row))
            size = rows[path] * row
        needs[path] = size * entry
    return rows, needs


def output_specs(specs: Mapping[str, Any], dtype: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the merged model: floating-point tensors in `dtype` if it is given."""
    return {
        name: jax.ShapeDtypeStruct(spec.shape, np.dtype(dtype) if dtype and trees.is_float(spec) else spec.dtype)
        for name, spec in specs.items()
    }


def _even(length: int, most: int) -> int:
    """Rows of a block, at most `most`; blocks of one size, which compile once, if that does not halve them."""
    return next((rows for rows in range(most, most // 2, -1) if length % rows == 0), most)


def _entries(spec: Any) -> int:
    return math.prod(spec.shape)


def nbytes(spec: Any) -> int:
    """Size of a tensor."""
    return _entries(spec) * spec.dtype.itemsize
