"""``taskvec_merge.json``: what a merge was made of, from which it can be made again."""

import datetime
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

from taskvec._version import __version__
from taskvec.io.atomic import write_text
from taskvec.io.folders import Model

NAME = "taskvec_merge.json"
FORMAT = 1


def describe(model: Model, hashes: Mapping[pathlib.Path, str] | None = None) -> dict[str, Any]:
    """A model as it is recorded: how it was named, where it lay, its files with sizes and hashes."""
    files = []
    for path in model.files:
        entry: dict[str, Any] = {"path": str(path.absolute()), "bytes": path.stat().st_size}
        if hashes and path.resolve() in hashes:
            entry["sha256"] = hashes[path.resolve()]
        files.append(entry)
    return {"ref": model.ref, "pinned": model.pinned, "kind": model.kind, "files": files}


def versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    packages = ("jax", "jaxlib", "numpy", "ml_dtypes")
    return {"taskvec": __version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }


def check_unchanged(record: Mapping[str, Any], label: str, now: Mapping[str, Any]) -> None:
    """Raises `ValueError` if a model is not the one that was recorded: other files, sizes or (where known) hashes."""
    before, after = ([_print(file) for file in each["files"]] for each in (record, now))
    if len(before) != len(after):
        raise ValueError(f"{label} ({now['pinned']}) has {len(after)} files; the recorded merge had {len(before)}")
    for then, here in zip(before, after, strict=True):
        if then[1] != here[1] or (then[2] and here[2] and then[2] != here[2]):
            raise ValueError(
                f"{label}: {here[0]} is not the file of the recorded merge ({here[1]} bytes, {then[1]} then"
                f"{'; the hashes differ' if then[1] == here[1] else ''}), so the merge cannot be repeated exactly"
            )


def _print(file: Mapping[str, Any]) -> tuple[str, int, str | None]:
    return file["path"], file["bytes"], file.get("sha256")


def write(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Writes the record, whole or not at all."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    head = {"format": FORMAT, "created": now, "versions": versions()}
    write_text(path, json.dumps(head | dict(record), indent=2, default=_plain) + "\n")


def load(path: pathlib.Path) -> dict[str, Any]:
    """Reads a record; raises `ValueError` if it is not one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or "request" not in record:
        raise ValueError(f"{path} is no record of a merge (a {NAME} of format {FORMAT})")
    return record


def _plain(value: Any) -> Any:
    if isinstance(value, pathlib.Path):
        return str(value)
    raise TypeError(f"{value!r} cannot be recorded")
