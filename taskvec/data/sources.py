"""Where rows come from: image folders, JSON lines, Parquet files, tensorflow-datasets. Each gives a `Table`.

Images stay encoded (`lazy.Images`); texts and labels are read at once. Whatever is wrong with a row is said with its
file and line or row.
"""

import functools
import json
import os
import pathlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from taskvec.data import base
from taskvec.data.lazy import Images

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
IN_MEMORY = 4 << 30  # bytes of Parquet files whose decoded row groups are all kept


class Table(NamedTuple):
    """One split as a source gives it.

    Attributes:
      rows: `Images`, or texts: object ``[N]``, or ``[N, 2]`` for pairs.
      labels: int32 ``[N]``, or float32 ``[N]`` where labels are numbers with a fraction.
      classes: names in the order of the labels; empty if the source does not know them.
    """

    rows: Any
    labels: np.ndarray
    classes: tuple[str, ...]


class Columns(NamedTuple):
    """Names of columns: one of `image` and `text` (one or two names), and the label."""

    image: str = ""
    text: tuple[str, ...] = ()
    label: str = "label"


def image_folder(folder: str | os.PathLike, classes: Sequence[str] = ()) -> Table:
    """Images in ``FOLDER/CLASS/**/*.png``; classes are the folders' names in order (`base.in_order`).

    Args:
      folder: with one subfolder a class.
      classes: folder names known from another split; a folder that is not among them is an error.

    Raises:
      FileNotFoundError: no such folder, no class in it, or a class of `classes` without an image.
      ValueError: a folder is not among `classes`.
    """
    folder = pathlib.Path(folder).expanduser()
    found = _class_folders(folder)
    if not found:
        raise FileNotFoundError(f"{folder}: no class folders; want {folder}/CLASS/*.png")
    names = tuple(classes) or found
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise ValueError(f"{folder}: unknown class {', '.join(unknown)}; the training set has {', '.join(names)}")
    files, labels = [], []
    for label, name in enumerate(names):
        inside = [os.path.join(at, f) for at, _, all_files in sorted(os.walk(folder / name)) for f in sorted(all_files)]
        inside = [f for f in inside if f.lower().endswith(SUFFIXES)]
        if not inside and not classes:
            raise FileNotFoundError(f"{folder / name}: no images ({', '.join(SUFFIXES)})")
        files += inside
        labels += [label] * len(inside)
    images = Images(lambda row: files[row], lambda row: files[row], np.arange(len(files)))
    return Table(images, np.array(labels, np.int32), names)


def _class_folders(folder: pathlib.Path) -> tuple[str, ...]:
    return base.in_order(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else ()


def label_order(found: Sequence[str], names: Sequence[str], where: str) -> list[int] | None:
    """For every found class the number of the name that it is called like; None if most are called otherwise.

    Case and punctuation do not count. Found classes of which some are called otherwise are taken as they stand if all
    others stand where their names do (a source may call one flower otherwise); else the order is not to be trusted.

    Raises:
      ValueError: some classes are called like names, in another order, and some like none.
    """
    plain = lambda name: "".join(c for c in name.split(",")[0].casefold() if c.isalnum())
    number = {plain(name): i for i, name in enumerate(names)}
    order = [number.get(plain(name)) for name in found]
    unknown = [name for name, at in zip(found, order, strict=True) if at is None]
    if not found or 2 * len(unknown) > len(found):
        return None
    if len(found) == len(names) and all(at in (None, i) for i, at in enumerate(order)):
        return list(range(len(names)))
    if unknown or len(set(order)) < len(names):
        missing = [name for i, name in enumerate(names) if i not in order]
        raise ValueError(f"{where}: unknown class {', '.join(unknown) or '-'}; none for {', '.join(missing) or '-'}")
    return order


def folder_order(folder: pathlib.Path, names: Sequence[str]) -> tuple[str, ...]:
    """Class folders in the order of `names` where they are called so (`label_order`), else empty: `base.in_order`."""
    found = _class_folders(folder)
    order = label_order(found, names, str(folder))
    return tuple(found[i] for i in np.argsort(order)) if order is not None else ()


def jsonl(path: str | os.PathLike, columns: Columns, classes: Sequence[str] = ()) -> Table:
    """Rows of a file with one JSON object a line; image columns hold paths, relative to the file's folder.

    Raises:
      FileNotFoundError: no such file.
      ValueError: names the file and the line that is not such an object, or lacks a column or a label.
    """
    path = pathlib.Path(path).expanduser()
    rows, lines = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: want an object, found {str(row)[:80]}")
            rows.append(row)
            lines.append(number)
    where = lambda i: f"{path}, line {lines[i]}"
    labels, names = _labels([row.get(columns.label) for row in rows], classes, where, columns.label)
    if columns.image:
        values = _strings([row.get(columns.image) for row in rows], where, columns.image)
        files = [path.parent / value for value in values]
        return Table(
            Images(lambda i: files[i], lambda i: f"{where(i)}: {files[i]}", np.arange(len(rows))), labels, names
        )
    return Table(_texts([[row.get(c) for row in rows] for c in columns.text], where, columns.text), labels, names)


def parquet(paths: Sequence[str | os.PathLike], columns: Columns, classes: Sequence[str] = ()) -> Table:
    """Rows of Parquet files in order, as Hugging Face writes them: image columns are ``{"bytes": ..., "path": ...}``.

    Images are read row group by row group when asked for; up to 4 GB of files all stay in memory, of larger ones the
    last 8 row groups. Class names come from `classes`, else from the features stored in the file.

    Raises:
      ImportError: pyarrow is not installed.
      FileNotFoundError: no files.
      ValueError: names the file and the column or row at fault.
    """
    arrow = _import("pyarrow.parquet", "reading Parquet files needs pyarrow: pip install pyarrow")
    if not paths:
        raise FileNotFoundError("no Parquet files")
    files = [_open_parquet(arrow, path) for path in paths]
    wanted = [columns.label, *([columns.image] if columns.image else columns.text)]
    for path, file in zip(paths, files, strict=True):
        missing = [name for name in wanted if name not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}")
    sizes = [file.metadata.num_rows for file in files]
    first = np.concatenate([[0], np.cumsum(sizes)])

    def where(i: int) -> str:
        at = int(np.searchsorted(first, i, "right")) - 1
        return f"{paths[at]}, row {i - first[at]}"

    column = lambda name: [v for file in files for v in file.read(columns=[name]).column(0).to_pylist()]
    names = tuple(classes) or _feature_names(files[0], columns.label)
    labels, names = _labels(column(columns.label), names, where, columns.label)
    if columns.image:
        images = Images(_blobs(files, paths, columns.image), where, np.arange(first[-1]))
        return Table(images, labels, names)
    return Table(_texts([column(name) for name in columns.text], where, columns.text), labels, names)


def tfds(name: str, split: str, columns: Columns, data_dir: str | None = None, classes: Sequence[str] = ()) -> Table:
    """Rows of a prepared tensorflow-datasets builder, read as array_record without TensorFlow.

    Labels are read once, without decoding the images.

    Raises:
      ImportError: tensorflow-datasets is not installed.
      FileNotFoundError: the set is not prepared; the message has the command that prepares it.
      ValueError: the builder has no such split or column.
    """
    lib = _import("tensorflow_datasets", "this source needs tensorflow-datasets: pip install tensorflow-datasets")
    builder = lib.builder(name, data_dir=data_dir, file_format="array_record")
    if split not in (builder.info.splits or {}):
        have = f"; prepared splits: {', '.join(builder.info.splits)}" if builder.info.splits else ""
        at = f", data_dir={data_dir!r}" if data_dir else ""
        raise FileNotFoundError(
            f"{name}: split {split} is not prepared{have}. Prepare it (some sets need TensorFlow for this) with\n"
            f"    python -c \"import tensorflow_datasets as t; t.builder('{name}', file_format='array_record'{at})"
            '.download_and_prepare()"'
        )
    features = builder.info.features
    missing = [c for c in (columns.image, *columns.text, columns.label) if c and c not in features]
    if missing:
        raise ValueError(f"{name}: no column {', '.join(missing)}; it has {', '.join(features)}")
    skip = {columns.image: lib.decode.SkipDecoding()} if columns.image else None
    source = builder.as_data_source(split=split, decoders=skip)
    where = lambda i: f"tfds {name}/{split}, row {i}"
    names = tuple(classes) or tuple(getattr(features[columns.label], "names", None) or ())
    records = [source[i] for i in range(len(source))] if columns.text else None
    labels = [r[columns.label] for r in records] if records else [source[i][columns.label] for i in range(len(source))]
    labels, names = _labels([x.item() if isinstance(x, np.generic) else x for x in labels], names, where, columns.label)
    if columns.image:
        return Table(Images(lambda i: source[i][columns.image], where, np.arange(len(source))), labels, names)
    text = lambda value: value.decode() if isinstance(value, bytes) else value
    return Table(_texts([[text(r[c]) for r in records] for c in columns.text], where, columns.text), labels, names)


def _import(module: str, remedy: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{remedy} ({error})") from error


def _open_parquet(arrow, path):
    try:
        return arrow.ParquetFile(path, memory_map=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # pyarrow raises its own kinds, which are not imported here
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error


def _feature_names(file, column: str) -> tuple[str, ...]:
    """Class names from the ``huggingface`` entry of a Parquet schema; empty if it has none."""
    entry = (file.schema_arrow.metadata or {}).get(b"huggingface")
    feature = json.loads(entry).get("info", {}).get("features", {}).get(column, {}) if entry else {}
    return tuple(feature.get("names") or ()) if isinstance(feature, dict) else ()


def _blobs(files, paths, name: str) -> Callable[[int], bytes]:
    """Row -> encoded image, through a cache of row groups."""
    groups = [(f, g) for f, file in enumerate(files) for g in range(file.num_row_groups)]
    ends = np.cumsum([files[f].metadata.row_group(g).num_rows for f, g in groups])
    lock = threading.Lock()  # a ParquetFile is not made for several threads
    size = sum(os.path.getsize(path) for path in paths)

    @functools.lru_cache(None if size <= IN_MEMORY else 8)
    def group(number: int):
        f, g = groups[number]
        return files[f].read_row_group(g, columns=[name]).column(0)

    def blob(row: int) -> Any:
        number = int(np.searchsorted(ends, row, "right"))
        with lock:
            column = group(number)
        value = column[row - int(ends[number]) + len(column)].as_py()
        return value.get("bytes") if isinstance(value, dict) else value

    return blob


def _labels(values: list, classes: Sequence[str], where, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as numbers, and the class names in their order."""
    for i, value in enumerate(values):
        if value is None:
            raise ValueError(f"{where(i)}: no label (column {column!r})")
        if not isinstance(value, int | float | str):
            raise ValueError(f"{where(i)}: label must be a number or a string, found {value!r}")
    if any(isinstance(value, str) for value in values):
        classes = tuple(classes) or base.in_order(set(map(str, values)))
        number_of = {name: i for i, name in enumerate(classes)}
        for i, value in enumerate(values):
            if value not in number_of:
                raise ValueError(f"{where(i)}: unknown class {value!r}; there is {', '.join(classes)}")
        return np.array([number_of[value] for value in values], np.int32), tuple(classes)
    if any(isinstance(value, float) for value in values):
        return np.array(values, np.float32), tuple(classes)
    labels = np.array(values, np.int64)
    bad = np.flatnonzero((labels < 0) | (labels >= (len(classes) or np.inf)))
    if len(bad):
        allowed = f"0 to {len(classes) - 1}" if classes else "0 or more"
        raise ValueError(f"{where(int(bad[0]))}: label {labels[bad[0]]}, allowed {allowed}")
    return labels.astype(np.int32), tuple(classes)


def _strings(values: list, where, column: str) -> list[str]:
    for i, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where(i)}: column {column!r} must be a string that is not empty, found {value!r}")
    return values


def _texts(columns: list[list], where, names: Sequence[str]) -> np.ndarray:
    """Object ``[N]`` of one column, or ``[N, 2]`` of two."""
    made = np.empty((len(columns[0]), len(columns)), object)
    for j, (values, name) in enumerate(zip(columns, names, strict=True)):
        made[:, j] = _strings(values, where, name)
    return made[:, 0] if len(columns) == 1 else made
