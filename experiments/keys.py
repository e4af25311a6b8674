"""Digests of what an expert depends on, so that a stored one is used again only where it would come out the same."""

import functools
import hashlib
import json
import pathlib
from typing import Any

import jax
import numpy as np
import optax

import taskvec
from taskvec.data.base import Task
from taskvec.data.lazy import Images

# The library's code that fine-tuning runs through.
_CODE = ("tree.py", "models", "data", "training", "adaptive/fit.py", "io/names.py", "io/torch_checkpoint.py")


def of_run(config: Any, folder: pathlib.Path, task: Task, head: tuple, seed: int) -> str:
    """A digest of weights, training rows, head, settings and seed."""
    digest = hashlib.sha256(_folder(folder).encode())
    for name, x in sorted({**task.train.inputs, "label": task.train.labels}.items()):
        digest.update(name.encode())
        _add(digest, x)
    if head[0] is not None:
        digest.update(np.asarray(head[0]).tobytes())
    names = ("finetune", "trainable", "compute", "part", "heads", "head_scale", "augment")
    settings = {name: config.to_dict()[name] for name in names} | {"seed": seed}
    settings["suite"] = {k: config.suite.get(k) for k in ("kind", "preprocess", "image_size", "max_length", "family")}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:20]


def of_code() -> str:
    """A digest of the library's source files that fine-tuning runs through, and of what they run on."""
    root, digest = pathlib.Path(taskvec.__file__).parent, hashlib.sha256()
    for part in _CODE:
        for file in sorted((root / part).rglob("*.py")) if (root / part).is_dir() else [root / part]:
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    versions = [jax.__version__, optax.__version__, np.__version__, jax.default_backend()]
    digest.update(json.dumps(versions).encode())
    return digest.hexdigest()[:20]


@functools.cache
def _folder(folder: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*") if folder.is_dir() else [folder]):
        if file.suffix in (".safetensors", ".pth", ".json"):
            with file.open("rb") as opened:
                digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _add(digest: Any, x: np.ndarray | Images) -> None:
    """Adds rows; of encoded images what is encoded, of those in files their names, sizes and times."""
    if not isinstance(x, Images):
        digest.update(np.ascontiguousarray(x).tobytes())
        return
    for row in x.rows:
        blob = x.blob(int(row))
        if isinstance(blob, str | pathlib.Path):
            found = pathlib.Path(blob).stat()
            blob = f"{blob} {found.st_size} {found.st_mtime_ns}".encode()
        digest.update(blob if isinstance(blob, bytes) else np.ascontiguousarray(blob).tobytes())
