"""The plan of a merge and its progress, on the terminal."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from taskvec import tree as trees
from taskvec.commands.job import Job
from taskvec.io import progress
from taskvec.merging import merge
from taskvec.merging.stream_plan import nbytes
from taskvec.transforms import chain, sum_tasks

# Transforms that make of every entry a weighted sum with the same weights throughout a tensor, and reductions of them.
_REDUCE = {"sum_tasks", "mean_tasks", "mean_of", "swap_layers"}
_LINEAR = _REDUCE | {"weigh", "scale", "scale_by_depth", "norm_weighting"}


def table(title: str, *columns: str) -> Table:
    """A table in the house style; columns after the first are right-aligned."""
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return made


def gigabytes(count: float) -> str:
    """A size in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} bytes"


def plan(job: Job, console: Console, need: int, free: int | None) -> None:
    """Prints what a job will do."""
    request = job.request
    console.print(_inputs(job))
    if job.rows:
        console.print(_recipe(job.rows))
    else:
        console.print(_coefficients(job.parts[0], list(job.models)))
    passes = max(part.streaming.passes for part in job.parts)
    peak = max(part.streaming.peak_bytes for part in job.parts)
    largest = max(job.parts, key=lambda part: part.streaming.peak_bytes).streaming.largest
    facts = table("Plan", "", "")
    facts.show_header, facts.columns[1].justify = False, "left"
    rows = {
        "method": request.method or "recipe",
        "settings": ", ".join(f"{k}={_brief(v)}" for k, v in request.settings.items()) or "none",
        "passes over the inputs": str(passes),
        "read, all passes": gigabytes(job.read_bytes),
        "written": f"{gigabytes(job.write_bytes)} in {len(job.specs)} tensors",
        "memory of blocks in flight": f"{gigabytes(peak)} of {gigabytes(request.memory)} allowed; most for {largest}",
        "disk": f"{gigabytes(need)} needed" + (f", {gigabytes(free)} free" if free is not None else ""),
    }
    for name, value in rows.items():
        facts.add_row(name, value)
    console.print(facts)
    for note in job.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _brief(value: Any) -> str:
    """A setting; of a table its length."""
    rows = isinstance(value, list | tuple) and len(value) > 4 and all(isinstance(each, list | tuple) for each in value)
    return f"({len(value)} rows)" if rows else repr(value)


def _inputs(job: Job) -> Table:
    made = table("Inputs", "", "kind", "tensors", "size", "dtypes", "path")
    for label, model in job.inputs.items():
        dtypes = ", ".join(sorted({str(spec.dtype) for spec in model.specs.values()}))
        size = sum(nbytes(spec) for spec in model.specs.values())
        made.columns[-1].justify = "left"
        made.add_row(label, model.kind, str(len(model.specs)), gigabytes(size), dtypes, str(model.path))
    return made


def _recipe(rows: Sequence[Any]) -> Table:
    """What `taskvec.recipes` tells of its groups: tensors, model, coefficients of the model, shared settings."""
    made = table("What is merged", "tensors", "count", "model", "its settings", "settings of all")
    for row in rows:
        name, count, model, own, shared = row
        written = (", ".join(f"{key}={value!r}" for key, value in each.items()) for each in (own, shared))
        made.add_row(escape(name), str(count), escape(model), *map(escape, written))
    for column in made.columns[2:]:
        column.justify = "left"
    return made


def _coefficients(part: Any, labels: list[str]) -> Table:
    """Leaf group x expert x coefficient; neighbouring blocks with the same numbers share a row."""
    experts = labels[-len(part.finetuned) :]
    taken = part.streaming.plan.tensors
    specs = (part.pretrained or part.finetuned[0]).specs
    groups = block_of({name: specs[name] for name in taken})
    stages = part.streaming.transform.stages
    found, linear = coefficients(part, groups), all(stage.name in _LINEAR for stage in stages)
    rest = "measured" if linear else "by tensor" if [s.name for s in stages] == ["sum_by_name"] else "by entry"
    whole = linear and not any(stage.measures for stage in stages)
    made = table("What is merged", "group", "tensors", "entries", *experts)
    rows: list[tuple[list[str], list[str]]] = []
    for group in dict.fromkeys(groups.values()):
        names = [name for name, its in groups.items() if its == group]
        entries = sum(int(np.prod(specs[name].shape)) for name in names)
        numbers = [f"{x:.4g}" if whole else rest if x == 1 else f"{x:.4g} x {rest}" for x in found[group]]
        cells = [str(len(names)), f"{entries:,}", *numbers]
        if rows and rows[-1][1] == cells and group != "outside":
            rows[-1][0].append(group)
        else:
            rows.append(([group], cells))
    for names, cells in rows:
        made.add_row(names[0] if len(names) == 1 else f"{names[0]} to {names[-1].rpartition('.')[2]}", *cells)
    left = specs.keys() - taken.keys()
    if left:
        entries = sum(int(np.prod(specs[name].shape)) for name in left)
        made.add_row("copied from the base", str(len(left)), f"{entries:,}", *["-"] * len(experts))
    return made


def block_of(specs: Mapping[str, Any]) -> dict[str, str]:
    """``{tensor: its block}`` in the order of the network: what has no block first; stacked leaves are one group."""
    named = trees.groups({name: spec for name, spec in specs.items() if not trees.is_stacked(name)}, "block")
    groups = {name: named.names[int(number)] for name, number in trees.flatten(named.ids).items()}
    groups |= {name: "stacked blocks" for name in specs if trees.is_stacked(name)}

    def place(name: str) -> tuple:
        block = trees.depth(name)
        stack = groups[name].rpartition(str(block))[0]
        return (block is not None, "decoder" in stack, stack, block or 0)

    return {name: groups[name] for name in sorted(groups, key=place)}


def coefficients(part: Any, groups: Mapping[str, str]) -> dict[str, list[float]]:
    """``{group: factor of each task vector}``, found by merging numbers.

    Where a method is no weighted sum with known weights, it is the factor by which the other transforms' share of a
    task vector is multiplied: what scales and weights give.
    """
    known = [stage for stage in part.streaming.transform.stages if stage.name in _LINEAR and not stage.measures]
    if not any(stage.name in _REDUCE for stage in known):
        known.append(sum_tasks())
    sample = {group: name for name, group in reversed(groups.items())}
    layers = {name: part.streaming.plan.tensors[name] for name in sample.values()}
    like = lambda value: {n: np.full(t.depth.shape if t.stacked else (), value, np.float32) for n, t in layers.items()}
    count = len(part.finetuned)
    merged = [merge(chain(*known), like(0), [like(s == t) for s in range(count)]) for t in range(count)]
    flat = [trees.flatten(each) for each in merged]
    return {group: [float(np.ravel(each[name])[-1]) for each in flat] for group, name in sample.items()}


@contextlib.contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar in bytes on standard error; yields ``update(done, total)``."""
    # Imported late: only a merge that runs needs it.
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=28), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=progress.console, refresh_per_second=4) as shown:
        task = shown.add_task(what, total=total)
        yield lambda done, total: shown.update(task, completed=done, total=total)
