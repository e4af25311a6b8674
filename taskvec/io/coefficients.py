"""Learned coefficients as a result: ``NAME.npz`` with the numbers, ``NAME.json`` with what they belong to."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from taskvec import tree as trees
from taskvec._version import __version__
from taskvec.io.safetensors_format import temporary_name, write_text
from taskvec.tree import Tree

PathLike = str | os.PathLike


class Coefficients(NamedTuple):
    """Coefficients of T tasks over G groups of tensors.

    Attributes:
      values: ``[G, T]`` float32, factors of the task vectors.
      groups: G names.
      tasks: T names.
      tensors: ``{per-layer path of the model: number of its group}``, of all tensors.
      method: that learned them.
      settings: of that method.
    """

    values: np.ndarray
    groups: tuple[str, ...]
    tasks: tuple[str, ...]
    tensors: Mapping[str, int]
    method: str = ""
    settings: Mapping[str, Any] = {}

    def table(self) -> tuple[tuple[str, tuple[float, ...]], ...]:
        """Pairs of a tensor's path and its T coefficients, as ``merge("coefficients", table=...)`` takes them."""
        return tuple((name, tuple(self.values[group].tolist())) for name, group in self.tensors.items())


def of(
    params: Tree,
    values: np.ndarray,
    groups: Sequence[str],
    tasks: Sequence[str],
    method: str,
    settings: Mapping[str, Any],
) -> Coefficients:
    """Coefficients of a run, from what `taskvec.adaptive.learn.Learned` holds.

    Method and settings have no default: they tell which vectors the coefficients multiply (AdaMerging++'s are trimmed).

    Args:
      params: of the model, or their shapes; which groups its tensors are in follows from the names of the groups.
      values: ``[G, T]``.
      groups: names as `taskvec.tree.groups` gives them.
      tasks: names, in order of the columns.
      method, settings: as in the result of the run, ``found.method, found.settings``.

    Raises:
      ValueError: no way to group this model's tensors gives these names; shapes do not fit; NaN or infinity.
    """
    values = np.asarray(values, np.float32)
    if values.shape != (len(groups), len(tasks)):
        raise ValueError(f"values have shape {values.shape}; [{len(groups)} groups, {len(tasks)} tasks] is needed")
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
    return Coefficients(values, tuple(groups), tuple(tasks), tensors, method, dict(settings))


def save(path: PathLike, coefficients: Coefficients) -> None:
    """Writes ``PATH.npz`` (``values`` ``[G, T]``, ``table`` ``[P, T]`` by tensor) and ``PATH.json`` (names, settings).

    Whatever suffix the path has of the two; each file appears whole or not at all.
    """
    numbers, names = _files(path)
    numbers.parent.mkdir(parents=True, exist_ok=True)
    group_P = np.array(list(coefficients.tensors.values()), np.int32)
    temporary = temporary_name(numbers)
    with open(temporary, "wb") as file:
        np.savez(file, values=coefficients.values, group=group_P, table=coefficients.values[group_P])
    os.replace(temporary, numbers)
    fields = {
        "method": coefficients.method,
        "settings": dict(coefficients.settings),
        "tasks": coefficients.tasks,
        "groups": coefficients.groups,
        "tensors": list(coefficients.tensors),
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
        method, settings = fields["method"], fields["settings"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{numbers} and {names.name} are no coefficients, or damaged: {error}") from error
    fits = values.shape == (len(groups), len(tasks)) and group_P.shape == (len(tensors),)
    if not fits or not ((group_P >= 0) & (group_P < len(groups))).all() or not np.isfinite(values).all():
        raise ValueError(f"{numbers} and {names.name} do not belong together, or hold NaN or infinity")
    return Coefficients(values, groups, tasks, dict(zip(tensors, group_P.tolist(), strict=True)), method, settings)


def _files(path: PathLike) -> tuple[pathlib.Path, pathlib.Path]:
    path = pathlib.Path(path).expanduser()
    stem = path.name.removesuffix(".npz").removesuffix(".json")
    return path.with_name(f"{stem}.npz"), path.with_name(f"{stem}.json")


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else repr(value)
