"""One function a kind of method: each takes a `Bench` and settings and returns what to score and what to record."""

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import taskvec as tv
import taskvec.modular.surgery as surgery_lib
from experiments.prepare import Bench
from taskvec.adaptive.adamerging import adamerging
from taskvec.data import batches
from taskvec.evaluation.evaluate import evaluate
from taskvec.io.progress import bar, say
from taskvec.merging import registry
from taskvec.modular import results
from taskvec.modular.results import Merged

Features = list[np.ndarray]


class Outcome(NamedTuple):
    """What a run gives.

    Attributes:
      merged: the result: static or task-conditioned.
      test: its features of every task's test rows, ``[N_t, d]``.
      held_out: a function that gives those of the held-out rows (computed only if somebody asks).
      settings: all settings, resolved.
      seconds: of merging or adapting, a search on held-out rows included; scoring on test rows is not.
      data_access: as in a result row.
      coefficients: ``(groups, [G, T])`` of an adaptive method.
    """

    merged: Merged
    test: Features
    held_out: Callable[[], Features]
    settings: dict[str, Any]
    seconds: float
    data_access: str = "none"
    coefficients: tuple | None = None


def run(bench: Bench, label: str, settings: Mapping[str, Any], done: Mapping[str, Outcome]) -> Outcome:
    """Runs the method named in `settings` (by default the label itself)."""
    settings = dict(settings)
    name = settings.pop("method", label)
    if name in KINDS:
        return KINDS[name](bench, settings, done)
    return static(bench, name, settings)


def _evaluated(bench: Bench, merged: Merged, **fields) -> Outcome:
    features = lambda split: (
        evaluate(
            bench.base.model.apply, merged, [bench.batches(t, split) for t in range(len(bench.tasks))], bench.heads
        ).features
    )
    return Outcome(merged=merged, test=features("test"), held_out=lambda: features("held_out"), **fields)


def pretrained(bench: Bench, settings: dict, done: Mapping) -> Outcome:
    """The pretrained model under the fixed heads."""
    return _evaluated(bench, results.static(bench.base.pretrained), settings=settings, seconds=0.0)


def individual(bench: Bench, settings: dict, done: Mapping) -> Outcome:
    """Every task by its own expert: the upper row of the table."""
    return _evaluated(bench, results.per_task(bench.experts), settings=settings, seconds=0.0)


def grid_of(settings: Mapping[str, Any]) -> dict[str, tuple]:
    """The settings given as tuples, which are searched; ``weights`` is a tuple by nature."""
    return {k: tuple(v) for k, v in settings.items() if isinstance(v, tuple | list) and k != "weights"}


def static(bench: Bench, name: str, settings: dict) -> Outcome:
    """A registered data-free method; settings given as tuples are searched on held-out rows, never on test rows."""
    start = time.perf_counter()
    grid = grid_of(settings)
    fixed = {k: v for k, v in settings.items() if k not in grid}
    best, best_score, merged = {}, -1.0, None
    for values in itertools.product(*grid.values()):
        trial = dict(zip(grid, values, strict=True))
        merge = tv.merge(name, bench.base.pretrained, bench.experts, **fixed, **trial)
        params = jax.block_until_ready(merge)
        found = 0.0
        if grid:
            held_out = [bench.batches(t, "held_out") for t in range(len(bench.tasks))]
            scores = evaluate(bench.base.model.apply, results.static(params), held_out, bench.heads)
            found = float(scores.accuracy.mean())
        if found > best_score:  # the first of equals: the smallest value
            best, best_score, merged = trial, found, params
    if best:
        say(f"  {name}: {', '.join(f'{k}={v}' for k, v in best.items())} is best on held-out rows ({best_score:.1%})")
    seconds = time.perf_counter() - start
    data = "few labelled" if grid else registry.get(name).card.data
    resolved = {**registry.get(name).defaults, **fixed, **best, **{f"searched_{k}": v for k, v in grid.items()}}
    return _evaluated(bench, results.static(merged), settings=resolved, seconds=seconds, data_access=data)


def adaptive(bench: Bench, settings: dict, done: Mapping) -> Outcome:
    """AdaMerging; ``data`` says whether it adapts to the test rows (transductive) or to held-out rows (inductive)."""
    data, per_task, steps = settings["data"], settings["per_task"], settings["steps"]
    rows = [task.test if data == "unlabelled test" else task.held_out for task in bench.tasks]
    make = batches.unlabelled_batches(rows, per_task, steps, bench.seed)
    start = time.perf_counter()
    with bar(f"AdaMerging, seed {bench.seed}", steps) as update:
        found = adamerging(
            bench.base.model.apply,
            bench.base.pretrained,
            tv.task_vectors(bench.base.pretrained, bench.experts),
            bench.heads,
            make,
            scanned=bench.base.model.scanned,
            on_chunk=lambda step, metrics: update(step, f"entropy {metrics['loss'][-1]:.3f}"),
            **{k: v for k, v in settings.items() if k not in ("data", "per_task")},
        )
    return _evaluated(
        bench,
        results.static(found.params),
        settings=settings,
        seconds=time.perf_counter() - start,
        data_access=data,
        coefficients=(found.groups, found.coefficients),
    )


def surgery(bench: Bench, settings: dict, done: Mapping) -> Outcome:
    """Representation Surgery on the merged model of an earlier run, ``on``; features are computed once and cached."""
    settings = dict(settings)
    data, on = settings.pop("data"), settings.pop("on")
    if on not in done:
        raise ValueError(f"surgery on {on!r} needs that run before it in config.methods; done so far: {list(done)}")
    transductive = data == "unlabelled test"
    start = time.perf_counter()
    merged = done[on].test if transductive else done[on].held_out()
    teacher = done["individual"].test if transductive else done["individual"].held_out()
    with bar(f"Surgery on {on}, seed {bench.seed}", settings["steps"]) as update:
        show = lambda step, metrics: update(step, f"l1 {metrics['loss'][-1]:.3f}")
        adapters = surgery_lib.train(merged, teacher, seed=bench.seed, on_chunk=show, **settings)
    correct = lambda features: [np.asarray(surgery_lib.apply(adapters, t, z)) for t, z in enumerate(features)]
    return Outcome(
        merged=results.corrected(done[on].merged, lambda t, z: surgery_lib.apply(adapters, t, z)),
        test=correct(done[on].test),
        held_out=lambda: correct(done[on].held_out()),
        settings={"on": on, **settings},
        seconds=time.perf_counter() - start,
        data_access=data,
    )


KINDS = {"pretrained": pretrained, "individual": individual, "adamerging": adaptive, "surgery": surgery}
