"""Digests of what a trained model depends on, so that a stored one is used again only where it would be the same."""

import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

import taskvec
from taskvec.data.base import SPLITS, Task
from taskvec.data.lazy import Images
from taskvec.evaluation import rows as rows_lib

# The library's code that fine-tuning runs through, and training on all tasks together besides.
_CODE = (
    "tree.py", "models", "data", "training", "adaptive/fit.py", "adaptive/objectives.py", "adaptive/optimisers.py",
    "io/names.py", "io/torch_checkpoint.py",
)  # fmt: skip
_TOGETHER = ("adaptive/parametrisation.py", "adaptive/rows.py", "merging", "transforms", "vectors.py")


def of_run(
    config: Any, folder: pathlib.Path, tasks: Sequence[Task], heads: Sequence[tuple], seed: int, together: Any = None
) -> str:
    """A digest of weights, training rows, heads, settings and seed.

    Args:
      config: of the experiment.
      folder: of the model.
      tasks: one, or all of them.
      heads: theirs.
      seed: of the run.
      together: settings of training on all tasks together, which may look at held-out rows; None for an expert.
    """
    digest = hashlib.sha256(_folder(folder).encode())
    for task, head in zip(tasks, heads, strict=True):
        for split in (task.train,) if together is None else (task.train, task.held_out):
            for name, x in sorted({**split.inputs, "label": split.labels}.items()):
                digest.update(name.encode())
                _add(digest, x)
        if head[0] is not None:
            digest.update(np.asarray(head[0]).tobytes())
    names = ("finetune", "trainable", "compute", "part", "heads", "head_scale", "augment")
    settings = {name: config.to_dict()[name] for name in names} | {"seed": seed}
    settings["suite"] = {k: config.suite.get(k) for k in ("kind", "preprocess", "image_size", "max_length", "family")}
    settings |= {} if together is None else {"together": together}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:20]


def of_bench(bench: Any) -> str:
    """A digest of all that the rows of a seed depend on: the config, as result rows have it, weights, data, code.

    Args:
      bench: `experiments.prepare.Bench`.
    """
    about = [rows_lib.config_hash(bench.config.to_dict()), bench.seed, _versions()]
    digest = hashlib.sha256(json.dumps(about).encode())
    for leaf in jax.tree.leaves((bench.base.pretrained, bench.experts, bench.heads)):
        _add(digest, np.asarray(leaf))
    for task in bench.tasks:
        for split in (getattr(task, name) for name in SPLITS):
            for x in (*(split.inputs[name] for name in sorted(split.inputs)), split.labels):
                _add(digest, x)
    for root in (pathlib.Path(taskvec.__file__).parent, pathlib.Path(__file__).parent):
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:20]


def of_code(together: bool = False) -> str:
    """A digest of the library's source files that training runs through, and of what they run on."""
    root, digest = pathlib.Path(taskvec.__file__).parent, hashlib.sha256()
    for part in _CODE + _TOGETHER * together:
        for file in sorted((root / part).rglob("*.py")) if (root / part).is_dir() else [root / part]:
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    digest.update(json.dumps(_versions()).encode())
    return digest.hexdigest()[:20]


def _versions() -> list[str]:
    return [jax.__version__, optax.__version__, np.__version__, jax.default_backend()]


@functools.cache
def _folder(folder: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*") if folder.is_dir() else [folder]):
        if file.suffix in (".safetensors", ".bin", ".pth", ".json"):
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
