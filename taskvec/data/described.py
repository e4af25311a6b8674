"""Suites described by a small YAML or JSON file, so that a user's own data needs no code.

kind: image                      # or text
tasks:
  dots:
    format: folder               # folder, parquet, jsonl, npz, tfds
    train: dots/train            # relative to this file; parquet takes a list or a pattern, tfds "NAME:SPLIT"
    test: dots/test
    held_out: dots/val           # optional: its own validation rows
    classes: dots/classes.txt    # optional: a list, or a file with one name a line
    templates: ["a photo of a {}."]   # optional, for heads made from class names: a list or such a file
    columns: {image: img, label: fine_label}   # parquet, jsonl, tfds; texts: {text: [premise, hypothesis], ...}
  more:
    format: npz
    file: image_more.npz
"""

import dataclasses
import glob
import hashlib
import os
import pathlib
from typing import Any

import numpy as np

from taskvec.data import base, images, sources, text

FORMATS = ("folder", "parquet", "jsonl", "npz", "tfds")
SUFFIXES = (".yaml", ".yml", ".json")
_KEYS = ("format", "train", "test", "held_out", "file", "classes", "templates", "columns", "data_dir")


@dataclasses.dataclass(frozen=True)
class Described:
    """One task of such a file; the attributes are its keys, `home` is the file's folder."""

    format: str
    home: pathlib.Path
    train: Any = None
    test: Any = None
    held_out: Any = None
    file: str = ""
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    columns: sources.Columns | None = None
    data_dir: str | None = None


def is_description(source: str) -> bool:
    """Whether a suite's source names such a file and not a folder."""
    return source.endswith(SUFFIXES) and not pathlib.Path(source).expanduser().is_dir()


def read(path: str | os.PathLike) -> tuple[str, dict[str, Described]]:
    """The kind and the tasks of a description.

    Raises:
      FileNotFoundError: no such file.
      ValueError: names the file, the task and the key at fault, with what is allowed.
    """
    import yaml

    path = pathlib.Path(path).expanduser()
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML or JSON ({error})") from None
    if not isinstance(raw, dict) or set(raw) != {"kind", "tasks"} or not isinstance(raw["tasks"], dict):
        raise ValueError(f"{path}: want the keys kind and tasks (a mapping from names), found {str(raw)[:80]}")
    if raw["kind"] not in ("text", "image"):
        raise ValueError(f"{path}: kind is {raw['kind']!r}; allowed: text, image")
    return raw["kind"], {str(name): _task(raw["kind"], t, path, str(name)) for name, t in raw["tasks"].items()}


def load(task: Described, name: str) -> base.Task:
    """Reads a described task: ``{"raw"}`` or ``{"text"}`` rows, `held_out` empty unless the description has some."""
    if task.format == "npz":
        made = images.npz(task.home / task.file, name)
        return made._replace(classes=_same_number(task.classes, made.classes, name) if task.classes else made.classes)
    if task.format == "jsonl" and task.file:
        return text.jsonl(task.home / task.file, name)
    first = _table(task, task.train, task.classes)
    known = first.classes or task.classes
    if not known and first.labels.dtype.kind != "f":
        known = tuple(map(str, range(int(first.labels.max(initial=-1)) + 1)))
    # Folders carry their own names; the description's stand for them in the same order.
    given = first.classes if task.format == "folder" else known
    classes = _same_number(task.classes, known, name) if task.classes else known
    key = "raw" if isinstance(first.rows, sources.Images) else "text"
    split = lambda table: base.Split({key: table.rows}, table.labels)
    train = split(first)
    test, held = (split(_table(task, at, given)) if at else None for at in (task.test, task.held_out))
    made = base.Task(name, classes, train, held or base.take(train, np.arange(0)), test)
    base.check(made, may_be_empty=("held_out",))
    return made


def digest(task: Described) -> str:
    """A digest of a task's files: contents of small ones, names and sizes of folders and of files above 64 MB."""
    made = hashlib.sha256(repr(dataclasses.replace(task, home=pathlib.Path())).encode())
    for at in filter(None, (task.file, task.train, task.test, task.held_out)):
        if task.format == "tfds":
            continue
        for top in _paths(task, at):
            for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
                if file.is_file():
                    made.update(
                        f"{file.relative_to(task.home) if file.is_relative_to(task.home) else file.name}".encode()
                    )
                    small = top.is_file() and file.stat().st_size < 64 << 20
                    made.update(file.read_bytes() if small else str(file.stat().st_size).encode())
    return made.hexdigest()[:8]


def _task(kind: str, raw: Any, path: pathlib.Path, name: str) -> Described:
    where = f"{path}, task {name}"
    unknown = sorted(set(raw) - set(_KEYS)) if isinstance(raw, dict) else [str(raw)[:40]]
    if unknown:
        raise ValueError(f"{where}: unknown keys {', '.join(unknown)}; allowed: {', '.join(_KEYS)}")
    form = raw.get("format")
    if form not in FORMATS or (kind == "text" and form in ("folder", "npz")):
        raise ValueError(f"{where}: format is {form!r}; allowed for {kind}: {', '.join(FORMATS)}")
    whole = form == "npz" or (form == "jsonl" and "file" in raw)
    missing = [key for key in (("file",) if whole else ("train", "test")) if not raw.get(key)]
    if missing:
        raise ValueError(f"{where}: no {', '.join(missing)}")
    given = {key: _names(raw.get(key), path.parent, where, key) for key in ("classes", "templates")}
    bad = [t for t in given["templates"] if t.count("{}") != 1]
    if bad:
        raise ValueError(f"{where}: template {bad[0]!r} must have {{}} once, for the class")
    columns = _columns(kind, raw.get("columns") or {}, where)
    rest = {key: raw[key] for key in ("train", "test", "held_out", "file", "data_dir") if raw.get(key)}
    return Described(form, path.parent, columns=columns, **given, **rest)


def _columns(kind: str, raw: Any, where: str) -> sources.Columns:
    allowed = (kind, "label")
    if not isinstance(raw, dict) or set(raw) - set(allowed):
        raise ValueError(f"{where}: columns {raw!r}; allowed: {', '.join(allowed)}")
    label = raw.get("label", "label")
    if kind == "image":
        return sources.Columns(image=raw.get("image", "image"), label=label)
    names = raw.get("text", "text")
    names = (names,) if isinstance(names, str) else tuple(names)
    if len(names) not in (1, 2):
        raise ValueError(f"{where}: text columns {names}; want one or two")
    return sources.Columns(text=names, label=label)


def _names(value: Any, home: pathlib.Path, where: str, key: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        file = home / value
        if not file.is_file():
            raise FileNotFoundError(f"{where}: {key} file {file} does not exist")
        return tuple(line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return tuple(map(str, value))


def _paths(task: Described, at: Any) -> list[pathlib.Path]:
    found = []
    for pattern in [at] if isinstance(at, str) else at:
        path = str(task.home / pathlib.Path(pattern).expanduser())
        matches = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
        if not matches:
            raise FileNotFoundError(f"{path}: no file matches")
        found += map(pathlib.Path, matches)
    return found


def _table(task: Described, at: Any, classes: tuple[str, ...]) -> sources.Table:
    if task.format == "tfds":
        name, _, split = at.rpartition(":")
        if not name:
            raise ValueError(f"tfds source {at!r}: want NAME:SPLIT")
        return sources.tfds(name, split, task.columns, task.data_dir, classes)
    paths = _paths(task, at)
    if task.format == "parquet":
        return sources.parquet(paths, task.columns, classes)
    if len(paths) != 1:
        raise ValueError(f"format {task.format} takes one {at!r}, found {len(paths)}")
    if task.format == "folder":
        order = sources.folder_order(paths[0], task.classes) if at == task.train else classes
        return sources.image_folder(paths[0], order)
    return sources.jsonl(paths[0], task.columns, classes)


def _same_number(wanted: tuple[str, ...], found: tuple[str, ...], name: str) -> tuple[str, ...]:
    if len(wanted) != len(found):
        raise ValueError(f"task {name}: {len(wanted)} class names are described, the data have {len(found)} classes")
    return wanted
