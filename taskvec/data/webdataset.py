"""Image sets in tar files (webdataset): a row is the files of one name, ``KEY.cls`` with its label and ``KEY.jpg``."""

import os
import pathlib
import tarfile
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from taskvec.data.lazy import Images
from taskvec.data.sources import SUFFIXES, Table


class _Member(NamedTuple):
    """Where a file of a tar file lies in it."""

    tar: pathlib.Path
    start: int
    size: int

    def read(self) -> bytes:
        with open(self.tar, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)


def read(paths: Sequence[str | os.PathLike], classes: Sequence[str] = ()) -> Table:
    """Rows of tar files in order; images stay in them until they are asked for.

    Args:
      paths: tar files that are not compressed.
      classes: names in the order of the labels.

    Raises:
      FileNotFoundError: no files.
      ValueError: names the file that is no tar file or is cut short, or the row that lacks its image or its label.
    """
    if not paths:
        raise FileNotFoundError("no tar files")
    rows = [(path, key, files) for path in map(pathlib.Path, paths) for key, files in _rows(path).items()]
    labels = np.array([_label(files, f"{path}, row {key}", len(classes)) for path, key, files in rows], np.int32)
    images = [_image(files, f"{path}, row {key}") for path, key, files in rows]
    where = lambda row: f"{rows[row][0]}, row {rows[row][1]}"
    return Table(Images(lambda row: images[row].read(), where, np.arange(len(rows))), labels, tuple(classes))


def in_order(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """Shards as they are numbered: 2.tar before 10.tar."""
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def _rows(path: pathlib.Path) -> dict[str, dict[str, _Member]]:
    """Key -> suffix -> file; a key is a file's name up to the first dot after its folders."""
    rows: dict[str, dict[str, _Member]] = {}
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("it is cut short")
                folder, slash, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                rows.setdefault(folder + slash + key, {})[f".{suffix.lower()}"] = _Member(
                    path, member.offset_data, member.size
                )
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a readable tar file ({error}); fetch it again") from error
    return rows


def _label(files: dict[str, _Member], where: str, classes: int) -> int:
    if ".cls" not in files:
        raise ValueError(f"{where}: no label (.cls); it has {', '.join(files)}")
    text = files[".cls"].read().strip()
    if not text.isdigit() or (classes and int(text) >= classes):
        allowed = f"0 to {classes - 1}" if classes else "0 or more"
        raise ValueError(f"{where}: label {text[:40]!r}, allowed {allowed}")
    return int(text)


def _image(files: dict[str, _Member], where: str) -> _Member:
    found = [member for suffix, member in files.items() if suffix in SUFFIXES]
    if len(found) != 1:
        raise ValueError(f"{where}: {len(found)} images; want one ({', '.join(SUFFIXES)}) beside the label")
    return found[0]
