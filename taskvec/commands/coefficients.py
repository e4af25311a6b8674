"""`taskvec merge --method coefficients`: from a file of learned coefficients to the names of a checkpoint."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from taskvec.commands.request import Request
from taskvec.io import coefficients, names
from taskvec.io.folders import Model
from taskvec.messages import some

METHOD = "coefficients"
# Of a model's folder: whole, or the part that was merged; see `taskvec.models.load`.
_PARTS = (None, "vision_projected", "vision", "text", "body")


def read(request: Request) -> Request:
    """The request with the table of its file, whose columns are in the order of the experts.

    Raises:
      ValueError: no file is given; the experts are not the tasks of the file; more than coefficients was learned, or
        it is not known of which vectors.
      FileNotFoundError: the file is not there.
    """
    if request.method != METHOD or request.settings.get("table"):
        return request
    settings = dict(request.settings)
    if not settings.get("file"):
        raise ValueError("--method coefficients needs --set file=PATH, as taskvec.io.coefficients.save writes it")
    found = coefficients.load(settings["file"])
    if beside := _beside(found.method):
        raise ValueError(
            f"the coefficients are of {found.method}, whose result is not theta0 + sum of coefficient x task vector "
            f"({beside}): save the merged model itself"
        )
    if found.method == "adamerging" and "plus_plus" not in {**found.settings, **settings}:
        raise ValueError(
            f"{settings['file']} does not say whether the coefficients are of AdaMerging++ (trimmed vectors) or not: "
            "add --set plus_plus=True or False"
        )
    settings["file"] = str(pathlib.Path(settings["file"]).expanduser().absolute())
    order = _order(found.tasks, [label for label, _ in request.experts])
    found = found._replace(values=found.values[:, order])
    settings["table"] = found.table()
    if found.drawn:
        settings["parts"] = found.drawn
    settings.setdefault("plus_plus", found.settings.get("plus_plus", False))
    return dataclasses.replace(request, settings=settings)


def _beside(method: str) -> str:
    """What a method learns beside its coefficients."""
    # Imported late: few merges are by a file.
    import taskvec.modular  # noqa: F401
    from taskvec.adaptive import registry

    return registry.get(method).card.beside if method in registry.methods() else ""


def _order(tasks: tuple[str, ...], labels: list[str]) -> list[int]:
    """The column of every expert: by name, or as they come if no expert is called like a task."""
    if len(tasks) != len(labels):
        raise ValueError(f"the coefficients are of {len(tasks)} tasks ({', '.join(tasks)}), but {len(labels)} experts")
    if set(tasks) == set(labels):
        return [tasks.index(label) for label in labels]
    if set(tasks) & set(labels):
        raise ValueError(
            f"the coefficients are of {', '.join(tasks)}, the experts are {', '.join(labels)}: call each by its task, "
            "--expert TASK=MODEL"
        )
    return list(range(len(tasks)))


def named(request: Request, models: Mapping[str, Model]) -> Request:
    """The request with the table in the names of the base's tensors.

    Raises:
      ValueError: the table names tensors that the base does not have, under no name.
    """
    base = next(iter(models.values()))
    table = request.settings["table"]
    place_of = _places(base, [row[0] for row in table])
    missing = sorted(row[0] for row in table if row[0] not in place_of)
    if missing:
        raise ValueError(
            f"{base.ref} has no tensor {some(missing)} of the coefficients: they are of another model, or of another "
            "part of it"
        )
    settings = dict(request.settings) | {"table": tuple(_row(row, *place_of[row[0]]) for row in table)}
    return dataclasses.replace(request, settings=settings)


def _row(row: Sequence[Any], name: str, op: str) -> tuple:
    """A row of the table under the name in the base; where it tells of axes, in their order there."""
    if len(row) == 2:
        return name, row[1]
    _, weights, path, strides = row
    return name, weights, path, tuple(strides[i] for i in names.file_axes(op, len(strides)))


def _places(base: Model, table: Iterable[str]) -> dict[str, tuple[str, str]]:
    """``{path in the table: (name in the base, op)}``; the names themselves where the table has those."""
    wanted, best = set(table), {name: (name, "none") for name in base.specs}
    for part in _PARTS if base.home is not None and not wanted <= best.keys() else ():
        paths = _paths(base, part)
        if len(wanted & paths.keys()) > len(wanted & best.keys()):
            best = paths
    return best


def _paths(base: Model, part: str | None) -> dict[str, tuple[str, str]]:
    # Imported late: a merge needs no model but for this.
    from taskvec import models

    try:
        described = models.describe(base.home, part=part)
        places = names.places(described.table, base.specs)
    except (ValueError, AttributeError):  # no such part, no such family, no table
        return {}
    return {place.path: (name, place.op) for name, place in places.items()}


def takes(request: Request) -> Callable[[str], bool]:
    """What of the model takes part: what the table names, as far as ``--include`` has it."""
    known = {row[0] for row in request.settings["table"]}
    rest = request.settings.get("rest", 0.0)
    return lambda name: bool((rest or name in known) and re.search(request.include, name))
