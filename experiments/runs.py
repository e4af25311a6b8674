"""One function a kind of method: each takes a `Bench` and settings and returns what to score and what to record."""

import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import taskvec as tv
import taskvec.modular.surgery as surgery_lib
from experiments import collected, few_shot_heads, learning, prepare, resume, together
from experiments.prepare import Bench
from taskvec.adaptive import registry as adaptive_registry
from taskvec.adaptive.fit import Loop
from taskvec.analysis import storage
from taskvec.evaluation import scorers
from taskvec.evaluation.evaluate import scored
from taskvec.io.progress import bar, say
from taskvec.merging import registry
from taskvec.merging.results import PerTask
from taskvec.modular import results
from taskvec.modular.results import Merged
from taskvec.training.heads import Heads

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
      coefficients: of an adaptive method, see `learning.Found`.
      heads: trained in place of the fixed ones.
      classifiers: functions from features to logits in place of heads, one per task.
      storage_bits: of a merge, as in a result row.
    """

    merged: Merged
    test: Features
    held_out: Callable[[], Features]
    settings: dict[str, Any]
    seconds: float
    data_access: str = "none"
    coefficients: Mapping[str, learning.CoefficientTable] = {}
    heads: Heads | None = None
    classifiers: list[Callable] | None = None
    storage_bits: int | None = None

    @property
    def head_trained(self) -> bool:
        return self.heads is not None or self.classifiers is not None

    def scorer(self, bench: Bench) -> scorers.Scorer:
        """What scores its features."""
        if self.classifiers is not None:
            return scorers.of_classifiers(bench.base.model.apply, self.classifiers)
        return bench.scorer if self.heads is None else scorers.of_heads(bench.base.model.apply, self.heads)


def run(
    bench: Bench,
    label: str,
    settings: Mapping[str, Any],
    done: Mapping[str, Outcome],
    kept: resume.Seed | None = None,
) -> Outcome:
    """Runs the method named in `settings` (by default the label itself); adaptive ones go on where `kept` has them."""
    settings = dict(settings)
    name = settings.pop("method", label)
    if name in few_shot_heads.SETTINGS:
        return few_shot_head(bench, name, settings, done)
    if name in KINDS:
        return KINDS[name](bench, settings, done)
    if name in adaptive_registry.methods():
        return adaptive(bench, name, settings, done, kept and kept.folder(label))
    return merge(bench, name, settings)


def _evaluated(bench: Bench, merged: Merged, **fields) -> Outcome:
    rows = lambda split: [bench.batches(t, split) for t in range(len(bench.tasks))]
    scorer = bench.scorer if merged.apply_fn is None else scorers.of_heads(merged.apply_fn, bench.heads)
    outputs = lambda split: scored(scorer, merged, rows(split)).outputs
    return Outcome(merged=merged, test=outputs("test"), held_out=functools.cache(lambda: outputs("held_out")), **fields)


def pretrained(bench: Bench, settings: dict, done: Mapping) -> Outcome:
    """The pretrained model under the fixed heads."""
    return _evaluated(bench, results.static(bench.base.pretrained), settings=settings, seconds=0.0)


def individual(bench: Bench, settings: dict, done: Mapping) -> Outcome:
    """Every task by its own expert: the upper row of the table."""
    return _evaluated(bench, results.per_task(bench.experts), settings=settings, seconds=0.0)


def trained(kind: str, bench: Bench, settings: dict, done: Mapping) -> Outcome:
    """One model trained on all tasks together: joint training is the other upper row of the table."""
    params, seconds = prepare.obtain(bench, together.job(bench, kind, settings))
    return _evaluated(
        bench,
        results.static(params),
        settings=together.resolved(kind, settings),
        seconds=seconds,
        data_access="labelled train",
    )


def grid_of(settings: Mapping[str, Any]) -> dict[str, tuple]:
    """The settings given as tuples, which are searched; ``weights`` is a tuple by nature."""
    return {k: tuple(v) for k, v in settings.items() if isinstance(v, tuple | list) and k != "weights"}


def merge(bench: Bench, name: str, settings: dict) -> Outcome:
    """A registered merge; settings given as tuples are searched on held-out rows, never on test rows.

    One that needs statistics of data has settings for these too, see `collected`. A task-conditioned one is scored on
    every task by that task's own model.
    """
    start = time.perf_counter()
    method, own = registry.get(name), collected.settings_of(name)
    data = settings.pop("data", method.card.data) if own else method.card.data
    grid = grid_of(settings)
    fixed = {**own, **{k: v for k, v in settings.items() if k not in grid}}
    extras_for = collected.collector(bench, name, data)
    best, best_score, found = {}, -np.inf, None
    for values in itertools.product(*grid.values()):
        trial = dict(zip(grid, values, strict=True))
        extras = extras_for({**fixed, **trial})
        of_method = {k: v for k, v in {**fixed, **trial}.items() if k not in own}
        merged = tv.merge(name, bench.base.pretrained, bench.experts, extras=extras, **of_method)
        jax.block_until_ready(merged.stored if isinstance(merged, PerTask) else merged)
        score = 0.0
        if grid:
            held_out = [bench.batches(t, "held_out") for t in range(len(bench.tasks))]
            score = float(scored(bench.scorer, results.of_merge(merged), held_out).accuracy.mean())
        if score > best_score:  # the first of equals: the smallest value
            best, best_score, found = trial, score, merged
    if best:
        say(f"  {name}: {', '.join(f'{k}={v}' for k, v in best.items())} is best on held-out rows ({best_score:.1%})")
    seconds = time.perf_counter() - start
    return _evaluated(
        bench,
        results.of_merge(found),
        settings={**method.defaults, **fixed, **best, **{f"searched_{k}": v for k, v in grid.items()}},
        seconds=seconds,
        data_access=seen(data, *(["few labelled"] if grid else [])),
        storage_bits=storage.bits_of(found),
    )


def adaptive(bench: Bench, name: str, settings: dict, done: Mapping, folder: pathlib.Path | None = None) -> Outcome:
    """A registered adaptive method; ``data`` says which rows it may look at, by default those of its card.

    ``on`` of those that have it (SurgeryV2) is an earlier run, or a data-free method with its published settings.
    What is taught by the experts' features takes those of the row ``individual``. `folder` is where it keeps its state.
    """
    data, on = settings.pop("data", adaptive_registry.get(name).card.data), settings.get("on")
    given = {**settings, "on": done[on].merged.params_for(0)} if on in done else settings
    teacher = None
    if "teacher" in adaptive_registry.get(name).card.sees and "individual" in done:
        teacher = done["individual"].test if data == "unlabelled test" else done["individual"].held_out()
    with resume.row(folder) as row:
        found = learning.learn(bench, name, data, given, row.checkpoint, teacher)
        seconds = row.seconds
    known = {**learning.settings_of(name), **settings}
    adapts = "adapt" in known and known.get("objective") != "cross_entropy"  # which looks at labelled rows alone
    access = [data, known["adapt"]] if adapts else [data]
    return _evaluated(
        bench,
        found.merged,
        settings=known,
        seconds=seconds,
        data_access=seen(*access, *([done[on].data_access] if on in done else [])),
        coefficients=found.coefficients,
        heads=found.heads,
    )


def seen(*access: str) -> str:
    """The access of a result that stands on another: whoever saw test rows is transductive, then labels count."""
    order = ("unlabelled test", "labelled train", "few labelled", "unlabelled train", "none")
    return next(each for each in order if each in access)


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
    with bar(f"Surgery on {on}, seed {bench.seed}") as update:
        begin = lambda steps: update(0, total=steps)
        show = lambda step, metrics: update(step, f"l1 {metrics['loss'][-1]:.3f}")
        loop = Loop(on_start=begin, on_chunk=show)
        found = surgery_lib.train(merged, teacher, seed=bench.seed, loop=loop, **settings)
    correct = lambda features: [np.asarray(found(t, z)) for t, z in enumerate(features)]
    return Outcome(
        merged=results.corrected(done[on].merged, found),
        test=correct(done[on].test),
        held_out=lambda: correct(done[on].held_out()),
        settings={"on": on, **STANDING["surgery"], **settings},
        seconds=time.perf_counter() - start,
        data_access=seen(data, done[on].data_access),
    )


def few_shot_head(bench: Bench, name: str, settings: dict, done: Mapping) -> Outcome:
    """Tip-Adapter or LP++ on the features of an earlier run, ``on``."""
    data, on = settings.pop("data"), settings.pop("on")
    if on not in done:
        raise ValueError(f"{name} on {on!r} needs that run before it in config.methods; done so far: {list(done)}")
    start = time.perf_counter()
    below = done[on]
    held_out = below.data_access == "few labelled" and below.settings.get("keep") != "best"
    return Outcome(
        merged=below.merged,
        test=below.test,
        held_out=below.held_out,
        classifiers=few_shot_heads.train(bench, name, below.merged, settings, held_out),
        settings={"on": on, **few_shot_heads.SETTINGS[name], **settings},
        seconds=time.perf_counter() - start,
        data_access=seen(data, below.data_access),
    )


KINDS = {
    "pretrained": pretrained,
    "individual": individual,
    "surgery": surgery,
    **{kind: functools.partial(trained, kind) for kind in together.KINDS},
}
# Settings, but `data` and `on`, of what stands on an earlier run and comes after all that do not.
_SURGERY = {key: value for key, value in adaptive_registry.get("surgery").defaults.items() if key != "on"}
STANDING = {"surgery": _SURGERY, **few_shot_heads.SETTINGS}
