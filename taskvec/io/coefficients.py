"""Learned coefficients as a result: ``NAME.npz`` with the numbers, ``NAME.json`` with what they belong to."""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from taskvec import tree as trees
from taskvec._version import __version__
from taskvec.io.atomic import published, write_text
from taskvec.tree import Tree

PathLike = str | os.PathLike


class Parts(NamedTuple):
    """Random parts of tensors, of aTLAS x K: what they are drawn from.

    Attributes:
      seed: of the draw.
      shared: whether tensors of equal shape have equal parts.
      shapes: of all tensors of `Coefficients`, in their order.
    """

    seed: int
    shared: bool
    shapes: tuple[tuple[int, ...], ...]


class Coefficients(NamedTuple):
    """Coefficients of T tasks over G groups of tensors, and of K random parts of every tensor.

    Attributes:
      values: ``[G, T]`` float32, factors of the task vectors; ``[G, T, K]`` with parts.
      groups: G names.
      tasks: T names.
      tensors: ``{per-layer path of the model: number of its group}``, of all tensors that are merged.
      method: that learned them.
      settings: of that method.
      parts: with K parts of every tensor.
    """

    values: np.ndarray
    groups: tuple[str, ...]
    tasks: tuple[str, ...]
    tensors: Mapping[str, int]
    method: str = ""
    settings: Mapping[str, Any] = {}
    parts: Parts | None = None

    @property
    def drawn(self) -> tuple[int, ...]:
        """K, seed and whether parts are shared, as ``merge("coefficients", parts=...)`` takes them; or nothing."""
        return () if self.parts is None else (self.values.shape[2], self.parts.seed, int(self.parts.shared))

    def table(self) -> tuple[tuple, ...]:
        """Pairs of a tensor's path and its T coefficients, as ``merge("coefficients", table=...)`` takes them.

        With parts all ``T K`` coefficients, the path once more, and how far apart neighbours of each axis lie.
        """
        rows = [(name, tuple(self.values[group].ravel().tolist())) for name, group in self.tensors.items()]
        if self.parts is None:
            return tuple(rows)
        strides = [tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))) for shape in self.parts.shapes]
        return tuple((*row, row[0], own) for row, own in zip(rows, strides, strict=True))


def of(
    params: Tree,
    values: np.ndarray,
    groups: Sequence[str],
    tasks: Sequence[str],
    method: str,
    settings: Mapping[str, Any],
    seed: int | None = None,
) -> Coefficients:
    """Coefficients of a run, from what `taskvec.adaptive.learn.Learned` holds.

    Method and settings have no default: they tell which vectors the coefficients multiply (AdaMerging++'s are trimmed).

    Args:
      params: of the model, or their shapes; which groups its tensors are in follows from the names of the groups.
      values: ``[G, T]``; ``[G, T, K]`` of aTLAS x K.
      groups: names as `taskvec.tree.groups` gives them.
      tasks: names, in order of the columns.
      method, settings: as in the result of the run, ``found.method, found.settings``.
      seed: of the run, which the K parts are drawn from.

    Raises:
      ValueError: no way to group this model's tensors gives these names; shapes do not fit; NaN or infinity.
    """
    values = np.asarray(values, np.float32)
    if values.shape[:2] != (len(groups), len(tasks)) or values.ndim > 3:
        raise ValueError(f"values have shape {values.shape}; [{len(groups)} groups, {len(tasks)} tasks] is needed")
    if values.ndim == 3 and seed is None:
        raise ValueError("coefficients by random parts of tensors: give the seed of the run, which they are drawn from")
    if not np.isfinite(values).all():
        raise ValueError("the coefficients hold NaN or infinity")
    for mode in trees.GROUP_MODES:
        found = trees.groups(params, mode)
        if found.names == tuple(groups):
            break
    else:
        raise ValueError(f"groups {', '.join(list(groups)[:3])}, ... are none of this model's ({trees.GROUP_MODES})")
    ids = {path: np.asarray(number) for path, number in trees.flatten(found.ids).items()}
    tensors = {
        name: int(ids[path] if layer is None else ids[path][layer])
        for name, (path, layer) in trees.tensors(params).items()
    }
    made = Coefficients(values, tuple(groups), tuple(tasks), tensors, method, dict(settings))
    if values.ndim == 2:
        return made
    flat, matrices = trees.flatten(params), settings.get("partitioned") == "matrices"
    shapes = {
        name: flat[path].shape[0 if layer is None else 1 :] for name, (path, layer) in trees.tensors(params).items()
    }
    shapes = {name: shape for name, shape in shapes.items() if len(shape) == 2 or not matrices}
    merged = {name: tensors[name] for name in shapes}
    return made._replace(tensors=merged, parts=Parts(seed, matrices, tuple(shapes.values())))


def save(path: PathLike, coefficients: Coefficients) -> None:
    """Writes ``PATH.npz`` (``values`` ``[G, T]``, ``table`` ``[P, T]`` by tensor) and ``PATH.json`` (names, settings).

    With parts both have K for a last axis. Whatever suffix the path has of the two; each file appears whole or not at
    all.
    """
    numbers, names = _files(path)
    numbers.parent.mkdir(parents=True, exist_ok=True)
    group_P = np.array(list(coefficients.tensors.values()), np.int32)
    with published(numbers) as temporary, open(temporary, "wb") as file:
        np.savez(file, values=coefficients.values, group=group_P, table=coefficients.values[group_P])
    fields = {
        "method": coefficients.method,
        "settings": dict(coefficients.settings),
        "tasks": coefficients.tasks,
        "groups": coefficients.groups,
        "tensors": list(coefficients.tensors),
        "parts": None if coefficients.parts is None else coefficients.parts._asdict(),
        "version": __version__,
    }
    write_text(names, json.dumps(fields, indent=1, default=_plain) + "\n")


def load(path: PathLike) -> Coefficients:
    """Reads what `save` wrote; the path may end in ``.npz``, ``.json`` or neither.

    Raises:
      FileNotFoundError: one of the two files is not there.
      ValueError: they do not belong together, or are damaged.
    """
    numbers, names = _files(path)
    for file in (numbers, names):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there; coefficients are two files, {numbers.name} and {names.name}")
    try:
        fields = json.loads(names.read_text(encoding="utf-8"))
        with np.load(numbers, allow_pickle=False) as arrays:
            values, group_P = arrays["values"], arrays["group"]
        tasks, groups, tensors = (tuple(fields[name]) for name in ("tasks", "groups", "tensors"))
        method, settings, parts = fields["method"], fields["settings"], fields.get("parts")
        parts = parts and Parts(parts["seed"], parts["shared"], tuple(tuple(shape) for shape in parts["shapes"]))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{numbers} and {names.name} are no coefficients, or damaged: {error}") from error
    fits = values.shape[:2] == (len(groups), len(tasks)) and group_P.shape == (len(tensors),)
    fits = fits and values.ndim == (2 if parts is None else 3)
    fits = fits and (parts is None or len(parts.shapes) == len(tensors))
    if not fits or not ((group_P >= 0) & (group_P < len(groups))).all() or not np.isfinite(values).all():
        raise ValueError(f"{numbers} and {names.name} do not belong together, or hold NaN or infinity")
    numbered = dict(zip(tensors, group_P.tolist(), strict=True))
    return Coefficients(values, groups, tasks, numbered, method, settings, parts)


def _files(path: PathLike) -> tuple[pathlib.Path, pathlib.Path]:
    path = pathlib.Path(path).expanduser()
    stem = path.name.removesuffix(".npz").removesuffix(".json")
    return path.with_name(f"{stem}.npz"), path.with_name(f"{stem}.json")


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else repr(value)
