"""The rows of the merge benchmark: what is merged, with which settings, on either side."""

import pathlib
import re
from typing import Any, NamedTuple

MEMORY = "memory"  # part (a): models already in memory, against FusionBench
DISK = "disk"  # part (b): folders to a folder, whole processes, against MergeKit


class Row(NamedTuple):
    """One comparison.

    Attributes:
      part: `MEMORY` or `DISK`.
      name: of the row; unique within a part.
      method: registered name of ours (in part (b) the recipe names the method).
      settings: ours, equal to the peer's.
      peer: name of the peer's script and its environment assignments, or ``None`` where the peer has no such method.
      known: norm that the peer gives on the checkpoints of its own script.
      goal: how many times faster than the peer this should be; ``None`` if the goal is the floor.
      note: what a reader must know of the row.
    """

    part: str
    name: str
    method: str
    settings: dict[str, Any]
    peer: str | None = None
    known: float | None = None
    goal: float | None = None
    note: str = ""


MEMORY_ROWS = (
    Row(MEMORY, "average", "weight_average", {}, "avg", 226.433306, 1),
    Row(MEMORY, "task arithmetic", "task_arithmetic", {"scale": 0.3}, "ta", 226.548493, 1),
    Row(MEMORY, "MagMax", "magmax", {"scale": 0.5}, "magmax", 226.575449, 1),
    Row(MEMORY, "DARE", "dare", {"density": 0.5, "scale": 0.3}, "dare", None, 1, "random: norms agree roughly"),
    Row(
        MEMORY,
        "TIES",
        "ties",
        {"density": 0.2, "scale": 0.3, "aggregate": "sum", "rule": "released", "zero": "majority"},
        "ties",
        226.540420,
        7,
        "ours in the form of the released code, which the peer has",
    ),
    Row(
        MEMORY,
        "TALL",
        "tall_masks",
        {"threshold": 0.6},
        "tallfix",
        None,
        2,
        "as shipped the peer raises; patched, its masks follow another rule, and it builds all task models",
    ),
    Row(
        MEMORY,
        "EMR",
        "emr",
        {"rescale": "released"},
        "emr",
        None,
        2,
        "the peer's norm is that of all parts of its result",
    ),
    Row(MEMORY, "TSV-M", "tsv_m", {"scale": 1.0}, "tsvm", 226.835044, 2),
    Row(MEMORY, "Iso-C", "iso_c", {"scale": 1.0}, "isoc", 227.701444, 1.5),
    Row(MEMORY, "Iso-CTS", "iso_cts", {"scale": 1.0, "common": 0.8}, "isocts"),
    Row(MEMORY, "WUDI, 5 steps", "wudi", {"steps": 5}, "wudi WUDI_IT=5", None, None, "of 300 as published"),
    Row(MEMORY, "WUDI, exact", "wudi", {"solver": "exact"}),
    Row(MEMORY, "DOGE, 20 steps", "doge", {"steps": 20}, None, None, None, "of 400, which the peer cannot shorten"),
    Row(MEMORY, "PCB", "pcb", {}, None, None, None, "goal: 10 s"),
)

DISK_ROWS = (
    Row(DISK, "linear", "linear", {"weight": 0.25, "base": False}, goal=1),
    Row(DISK, "task arithmetic", "task_arithmetic", {"weight": 0.3}, goal=1),
    Row(DISK, "TIES", "ties", {"weight": 1.0, "density": 0.2}, goal=7),
    Row(DISK, "Breadcrumbs", "breadcrumbs", {"weight": 0.3, "density": 0.9, "gamma": 0.01}, goal=7),
    Row(DISK, "DELLA", "della", {"weight": 0.3, "density": 0.5, "epsilon": 0.15}, goal=7, note="random"),
    Row(DISK, "DARE-TIES", "dare_ties", {"weight": 0.3, "density": 0.5}, goal=5, note="random"),
    Row(DISK, "model stock", "model_stock", {}, goal=5),
    Row(DISK, "Karcher", "karcher", {"base": False}, goal=5),
)

ROWS = (*MEMORY_ROWS, *DISK_ROWS)


def chosen(part: str | None, only: list[str]) -> list[Row]:
    """The rows of a part (of both if ``None``) whose name or method is in `only` (all if empty), e.g. ``wudi_exact``.

    Raises:
      ValueError: a name in `only` fits no row.
    """
    rows = [row for row in ROWS if part in (None, row.part)]
    plain = lambda name: re.sub(r"\W+", "_", name.lower())
    wanted = {plain(name) for name in only}
    unknown = wanted - {plain(name) for row in rows for name in (row.name, row.method)}
    if unknown:
        raise ValueError(f"no row {', '.join(sorted(unknown))}; there are {', '.join(plain(r.name) for r in rows)}")
    return [row for row in rows if not wanted or wanted & {plain(row.name), plain(row.method)}]


def recipe(row: Row, models: pathlib.Path, dtype: str, experts: int = 4) -> dict[str, Any]:
    """A MergeKit recipe of a row of part (b), which both sides read."""
    parameters = {name: value for name, value in row.settings.items() if name != "base"}
    each = lambda: {"parameters": dict(parameters)} if parameters else {}  # a copy each, or YAML writes references
    made = {
        "merge_method": row.method,
        "dtype": dtype,
        "models": [{"model": str(models / f"ft{i}"), **each()} for i in range(experts)],
    }
    return made if row.settings.get("base") is False else {**made, "base_model": str(models / "base")}


def inputs(row: Row, models: pathlib.Path, experts: int = 4) -> list[pathlib.Path]:
    """The model folders that a recipe names."""
    base = [] if row.settings.get("base") is False else [models / "base"]
    return [*base, *(models / f"ft{i}" for i in range(experts))]
