"""`taskvec merge`: runs a job and writes its folder, whole or not at all."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from taskvec.commands.job import Job
from taskvec.io import provenance
from taskvec.io.atomic import alive, remove_stale, this_process, write_text
from taskvec.io.folders import Model
from taskvec.io.hashes import Hashes
from taskvec.io.safetensors import SafetensorsReader, SafetensorsWriter
from taskvec.merging.streamed import merge_streamed
from taskvec.messages import some

# Stands in a folder while it is being written, and says what will be there.
UNFINISHED = ".taskvec_unfinished"
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".tar", ".zip", ".ot",
    ".index.json", ".md", ".tflite", ".mlmodel", ".log", ".jsonl",
)  # fmt: skip
_LEFT_BEHIND = {provenance.NAME, "training_args.bin", "trainer_state.json", "optimizer.pt", "mergekit_config.yml"}


@dataclasses.dataclass(frozen=True)
class Target:
    """Where the result goes.

    Attributes:
      folder: that holds everything.
      weights: what `SafetensorsWriter` is given: the folder, or a file in it.
      record: the file that says what was done.
      marker: stands there while the folder is being written.
    """

    folder: pathlib.Path
    weights: pathlib.Path
    record: pathlib.Path
    marker: pathlib.Path


def target(out: str, job: Job) -> Target:
    """Where a job's result goes: a folder, or a single file if `out` ends in ``.safetensors``."""
    path = pathlib.Path(out).expanduser()
    if path.suffix == ".safetensors":
        name = f"{path.stem}.{provenance.NAME}"
        return Target(path.parent, path, path.with_name(name), path.with_name(f"{UNFINISHED}.{path.name}"))
    weights = path / job.single_name if job.single_name else path
    return Target(path, weights, path / provenance.NAME, path / UNFINISHED)


def check_target(to: Target, job: Job, overwrite: bool) -> tuple[int, int]:
    """Checks that the result may and can be written; returns (bytes needed, bytes free).

    Raises:
      FileExistsError: a model is there already, or another process is writing one.
      ValueError: the place is that of an input.
      OSError: too little space.
    """
    inputs = {path.resolve() for model in job.inputs.values() for path in model.files}
    here = to.weights.resolve()
    if here in inputs or any(path.parent == here for path in inputs):
        raise ValueError(f"{to.weights} holds an input of this merge; choose another --out")
    if to.folder.exists() and not to.folder.is_dir():
        raise FileExistsError(f"{to.folder} is a file; --out names a folder, or a file ending in .safetensors")
    unfinished = _unfinished(to)
    process = (unfinished or {}).get("process", "")
    if alive(process):
        pid = process.partition("-")[0]
        raise FileExistsError(
            f"process {pid} is writing to {to.folder}; wait for it, or delete {to.marker} if that is another program"
        )
    found = _weights_at(to)
    if found and not unfinished and not overwrite:
        raise FileExistsError(f"{to.folder} already holds {some(found)}; choose another --out, or give --overwrite")
    room = sum((to.folder / name).stat().st_size for name in found)
    existing = next(p for p in (to.folder.absolute(), *to.folder.absolute().parents) if p.exists())
    need, free = job.write_bytes, shutil.disk_usage(existing).free + room
    if free < need:
        raise OSError(f"{existing} has {free / 1e9:.2f} GB free and the result needs {need / 1e9:.2f} GB")
    return need, free


def execute(
    job: Job,
    to: Target,
    *,
    hashing: Hashes | None = None,
    earlier: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Merges and writes; call `check_target` before.

    The record comes last. A process killed before leaves a marker, by which the next one knows what to delete.

    Args:
      job: what to do.
      to: where to.
      hashing: computes the SHA-256 of all inputs for the record; without it only their sizes are recorded.
      earlier: the record of the merge that this one repeats; inputs that have changed since are an error.
      on_progress: called with (bytes done, bytes in all).

    Returns:
      The record.
    """
    start = time.perf_counter()
    _clear(to)
    side = _side_files(job.first) if to.weights == to.folder or job.single_name else {}
    with _marked(to, side), contextlib.ExitStack() as stack:
        if hashing:
            hashing.want(path for model in job.inputs.values() for path in model.files)
        writer = SafetensorsWriter(to.weights, job.specs, max_shard_bytes=job.request.shard_bytes)
        stack.enter_context(writer)
        _mark(to, [*writer.names, *side, to.record.name])
        _run(job, writer, on_progress)
        found = hashing.result() if hashing else {}
        inputs = {label: provenance.describe(model, found) for label, model in job.inputs.items()}
        for label, record in (earlier or {}).get("inputs", {}).items():
            provenance.check_unchanged(record, label, inputs[label])
        for name, source in side.items():
            _copy_side_file(source, to.folder / name, job)
        stack.close()  # the weights get their names
        _check_written(to, job)
        record = {
            "request": dataclasses.asdict(_pinned(job)),
            "inputs": inputs,
            "output": {
                "tensors": len(job.specs),
                "files": {name: (to.folder / name).stat().st_size for name in writer.names},
                "tied": dict(job.copies),
            },
            "notes": list(job.notes),
            "seconds": round(time.perf_counter() - start, 2),
        }
        provenance.write(to.record, record)
    return record


def _pinned(job: Job) -> Any:
    """The request with models named so that they are found from anywhere."""
    request = job.request
    base = job.models["base"].pinned if request.base else ""
    experts = tuple((label, job.models[label].pinned) for label, _ in request.experts)
    return dataclasses.replace(request, base=base, experts=experts)


def _run(job: Job, writer: SafetensorsWriter, on_progress: Callable[[int, int], None] | None) -> None:
    twins: dict[str, list[str]] = {}
    for alias, source in job.copies.items():
        twins.setdefault(source, []).append(alias)

    def write(name, array, rows=None):
        for each in (name, *twins.get(name, ())):
            writer.write(each, array, rows)

    before = 0
    for part in job.parts:
        progress = on_progress and (lambda done, total, before=before: on_progress(before + done, job.read_bytes))
        merge_streamed(part.method, part.pretrained, part.finetuned, write, on_progress=progress, **part.options)
        before += part.streaming.read_bytes
    for name in job.kept:
        write(name, job.first.read(name))


def _side_files(model: Model) -> dict[str, pathlib.Path]:
    """Config, tokenizer and what else stands beside the weights: name -> file."""
    if model.home is None:
        return {}
    files = [path for path in sorted(model.home.iterdir()) if path.is_file()]
    modules = model.home / "modules.json"  # sentence-transformers: pooling and the like have folders of their own
    if modules.is_file():
        folders = [model.home / each["path"] for each in json.loads(modules.read_text("utf-8")) if each.get("path")]
        files += [path for folder in folders if folder.is_dir() for path in sorted(folder.rglob("*")) if path.is_file()]
    templates = model.home / "additional_chat_templates"
    files += sorted(templates.glob("*.jinja")) if templates.is_dir() else []
    chosen = {}
    for path in files:
        nested = path.parent != model.home
        weights = path.name.endswith(_WEIGHT_SUFFIXES) or path.name in _LEFT_BEHIND or path.name.startswith(".")
        if nested or not weights or path.name.startswith(("LICENSE", "NOTICE")):
            chosen[str(path.relative_to(model.home))] = path
    return chosen


def _copy_side_file(source: pathlib.Path, to: pathlib.Path, job: Job) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if source != job.first.home / "config.json":
        shutil.copyfile(source, to)
        return
    fields = json.loads(source.read_text(encoding="utf-8"))
    write_text(to, json.dumps(adapted(fields, job.dtype, job.config), indent=2, ensure_ascii=False) + "\n")


def adapted(fields: Mapping[str, Any], dtype: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` of the result: in the dtype that was asked for (if any), with what else changes."""

    def cast(part: Mapping[str, Any]) -> dict[str, Any]:
        changed = dict(part)
        for key, value in part.items():
            if isinstance(value, dict) and key.endswith("config"):
                changed[key] = cast(value)
            elif key in ("dtype", "torch_dtype") and isinstance(value, str):
                changed[key] = dtype
        return changed

    if not dtype:
        return {**fields, **changes}
    named = {} if {"dtype", "torch_dtype"} & fields.keys() else {"torch_dtype": dtype}
    return {**cast(fields), **named, **changes}


def _check_written(to: Target, job: Job) -> None:
    found = SafetensorsReader(to.weights, check_finite=False).specs
    if found != dict(job.specs):
        raise OSError(f"{to.weights} does not hold what was written to it; is another process writing there?")


def _weights_at(to: Target) -> list[str]:
    """Files that a model at the target consists of."""
    if to.weights != to.folder:
        return [path.name for path in (to.weights, to.record) if path.is_file()]
    patterns = ("model*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", provenance.NAME)
    return sorted({path.name for pattern in patterns for path in to.folder.glob(pattern)})


def _unfinished(to: Target) -> dict[str, Any] | None:
    try:
        return json.loads(to.marker.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _mark(to: Target, names: list[str]) -> None:
    write_text(to.marker, json.dumps({"process": this_process(), "files": names}))


def _clear(to: Target) -> None:
    """Deletes what a killed run left, and a model that may be overwritten; the record and the index go first."""
    if to.folder.is_dir():
        remove_stale(to.folder, "*")
    unfinished = _unfinished(to) or {"files": []}
    names = {*unfinished["files"], *_weights_at(to)}
    for name in sorted(names, key=lambda name: (name != to.record.name, not name.endswith(".index.json"), name)):
        (to.folder / name).unlink(missing_ok=True)
    to.marker.unlink(missing_ok=True)


@contextlib.contextmanager
def _marked(to: Target, side: Mapping[str, pathlib.Path]) -> Iterator[None]:
    """Marks the folder as unfinished; an exception leaves it as empty as it was."""
    existed = to.folder.is_dir()
    to.folder.mkdir(parents=True, exist_ok=True)
    before = {path.name for path in to.folder.iterdir()}
    _mark(to, [])
    try:
        yield
    except BaseException:
        for name in _unfinished(to)["files"]:
            if name not in before:
                (to.folder / name).unlink(missing_ok=True)
        to.marker.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            to.folder.rmdir() if not existed else None
        raise
    to.marker.unlink(missing_ok=True)
