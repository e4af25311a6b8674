"""Adaptive methods on a benchmark: which problem, rows and pairs each of them gets.

Their cards say what they learn and see. Most learn one model for all tasks. Others are about one task: a pool of the
other tasks' vectors learns it (run for every task in turn), or it is forgotten, with settings ``target`` and
``control_task``. Those that see crops take images so with the setting ``augment``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import taskvec as tv
from experiments import augment
from experiments.prepare import Bench
from taskvec import vectors
from taskvec.adaptive import registry
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.learn import Learned, Problem, heads_of
from taskvec.adaptive.rows import SECOND, Rows
from taskvec.adaptive.teachers import features_of
from taskvec.data import batches, packing
from taskvec.data.base import Split
from taskvec.io.checkpoints import Checkpoint
from taskvec.io.progress import bar
from taskvec.modular import results
from taskvec.modular.results import Merged
from taskvec.training.heads import Heads

NEGATION = ("target", "control_task")
NOT_SETTINGS = ("validation", "pool", "draw")  # rows, features and numbers that the benchmark gives
ADAPT = ("unlabelled test", "unlabelled train")  # rows beside the labelled ones, as published and inductive


class CoefficientTable(NamedTuple):
    """Coefficients ``[G, T]``, or ``[G, T, K]`` by parts of tensors, with what their axes are."""

    values: np.ndarray
    groups: Sequence[str]
    tasks: Sequence[str]


class Found(NamedTuple):
    """What a method gives on a benchmark.

    Attributes:
      merged: the result.
      coefficients: by the name of the task that they are for, or ``""`` for all; empty where none were learned.
      heads: that were trained, in place of the fixed ones.
    """

    merged: Merged
    coefficients: Mapping[str, CoefficientTable] = {}
    heads: Heads | None = None


def settings_of(name: str) -> dict[str, Any]:
    """The settings that a config may give a method, with their defaults; `ADAPT` for rows that are a setting.

    ``pieces`` is that of `Loop`: a step in so many pieces takes less memory.
    """
    card = registry.get(name).card
    more = {"pieces": 1} if card.pieces else {}
    more |= dict.fromkeys(NEGATION, "") if card.learns == "target and control" else {}
    given = {key: value for key, value in registry.get(name).defaults.items() if key not in NOT_SETTINGS}
    if "adapt" in given:
        more["adapt"] = ADAPT[0]
    if "crops" in card.sees:
        more["augment"] = False
    return {**given, **more}


def learn(
    bench: Bench,
    name: str,
    data: str,
    settings: dict[str, Any],
    checkpoint: Checkpoint | None = None,
    teacher: Sequence[np.ndarray] | None = None,
) -> Found:
    """Runs a registered adaptive method.

    Args:
      bench: with its experts.
      name: of the method.
      data: which rows it may look at.
      settings: of the method, and those of `settings_of`.
      checkpoint: where it goes on.
      teacher: features of every task's rows by its expert, where they are known.
    """
    names, card = [task.name for task in bench.tasks], registry.get(name).card
    if card.learns == "one target":
        each = _one_by_one(bench, name, data, dict(settings), checkpoint)
        tables = {}
        for task, found in zip(names, each, strict=True):
            tables |= _tables(found, [other for other in names if other != task], task)
        return Found(results.per_task([found.params for found in each]), tables)
    whole_texts = "tokens" in card.sees or settings.get("pieces", 1) > 1
    given = rows(bench, data, packed=not whole_texts)
    if teacher is not None:
        given = given._replace(targets=[{"features": features_Nxd} for features_Nxd in teacher])
    whole = given
    if settings.get("augment"):
        given = cropped(bench, name, given, splits(bench, data))
    watched = {"validation": whole} if settings.get("augment") else {}
    settings = {key: value for key, value in settings.items() if key != "augment"}
    if card.learns == "target and control":
        target, control = (names.index(settings[key]) for key in NEGATION)
        rest = {key: value for key, value in settings.items() if key not in NEGATION}
        rest |= {key: rows_.only([target, control]) for key, rows_ in watched.items()}
        pair = negation(problem(bench), target, control), given.only([target, control])
        found = _run(bench, name, *pair, rest, checkpoint)
        return Found(results.static(found.params), _tables(found, [names[target]]))
    if "pairs" in card.sees:
        given = pairs(given, bench.seed)
    if "adapt" in (known := settings_of(name)):
        settings = {**settings, "adapt": rows(bench, settings.get("adapt", known["adapt"]))}
    found = _run(bench, name, problem(bench), given, {**settings, **watched}, checkpoint)
    merged = found.merged or results.static(found.params)
    if found.heads is not None:  # one encoder, but every task needs its own trained head
        merged = merged._replace(kind="task-conditioned")
    return Found(merged, _tables(found, names), found.heads)


def _tables(found: Learned, tasks: Sequence[str], name: str = "") -> dict[str, CoefficientTable]:
    return {} if found.coefficients is None else {name: CoefficientTable(found.coefficients, found.groups, tasks)}


def _one_by_one(
    bench: Bench, name: str, data: str, settings: dict[str, Any], checkpoint: Checkpoint | None
) -> list[Learned]:
    """Each task's own result, learned from the other tasks' vectors.

    Where the best epoch is kept, rows are drawn from the training rows and the epoch is chosen on the held-out ones.
    """
    crops, best = settings.pop("augment", False), settings.get("keep") == "best"
    taken = [task.train for task in bench.tasks] if best else splits(bench, data)
    given = plain = rows(bench, data, packed=settings.get("pieces", 1) == 1, taken=taken)
    if crops:
        given = cropped(bench, name, given, taken)
    if settings.get("select") == "feature":
        whole = problem(bench)
        features = [features_of(whole, whole.theta0, plain, t) for t in range(whole.num_tasks)]
        del whole  # the task vectors are made anew, less one, for every task
    each = []
    for t in range(len(bench.tasks)):
        more = {"validation": rows(bench, data).only([t])} if best else {}
        if settings.get("select") == "random":
            more["draw"] = t
        if settings.get("select") == "feature":
            more["pool"] = [z_Nxd for s, z_Nxd in enumerate(features) if s != t]
        own = checkpoint and checkpoint.part(f"without_{bench.tasks[t].name}")
        whole = one_out(problem(bench), t)
        each.append(_run(bench, name, whole, given.only([t]), {**settings, **more}, own))
    return each


def _run(
    bench: Bench, name: str, problem: Problem, given: Rows, settings: dict[str, Any], checkpoint: Checkpoint | None
) -> Learned:
    with bar(f"{name}, seed {bench.seed}") as update:
        begin = lambda steps: update(0, total=steps)
        show = lambda step, metrics: update(step, f"objective {metrics['loss'][-1]:.3f}")
        kept = checkpoint if registry.get(name).card.steps else None
        phase = lambda what, done, of: update(None, f"{what}: {done} of {of}")
        pieces = settings.get("pieces", 1)
        loop = Loop(checkpoint=kept, on_start=begin, on_chunk=show, on_phase=phase, pieces=pieces)
        of_method = {key: value for key, value in settings.items() if key != "pieces"}
        found = registry.get(name)(problem, given, seed=bench.seed, loop=loop, **of_method)
        jax.block_until_ready(found.params)
    return found


def problem(bench: Bench) -> Problem:
    """What adaptive methods merge."""
    model, theta0 = bench.base.model, bench.base.pretrained
    tau = tv.task_vectors(theta0, bench.experts, bench.config.tau_dtype)
    return Problem(bench.base.tuner.apply_fn, theta0, tau, bench.heads, model.scanned)


def one_out(whole: Problem, task: int) -> Problem:
    """The other tasks' vectors, and the head of one."""
    others = [t for t in range(whole.num_tasks) if t != task]
    return whole._replace(tau=vectors.take(whole.tau, others), heads=heads_of(whole.heads, [task]))


def negation(whole: Problem, target: int, control: int) -> Problem:
    """One task's vector, and the heads of that task and of a control task."""
    return whole._replace(tau=vectors.take(whole.tau, [target]), heads=heads_of(whole.heads, [target, control]))


def splits(bench: Bench, data: str) -> list[Split]:
    """What a data access allows to look at: of every task the test set, or held-out training rows."""
    return [task.test if data == "unlabelled test" else task.held_out for task in bench.tasks]


def rows(bench: Bench, data: str, packed: bool = True, taken: Sequence[Split] | None = None) -> Rows:
    """The rows that a data access allows (`splits`, unless others are `taken`), with labels where it does.

    Texts stand several in a row where the model takes that, unless they shall not be `packed`.
    """
    taken = splits(bench, data) if taken is None else taken
    counts = tuple(len(split.labels) for split in taken)
    labels = [split.labels for split in taken] if data == "few labelled" else None
    join = batches.join
    if packed and bench.base.model.packs:
        lengths = [split.inputs["mask"].sum(1) for split in taken]
        join = packing.joiner(lengths, bench.config.suite.max_length)
    return Rows(counts, lambda t, numbers: batches.take(taken[t], numbers), join, labels)


def cropped(bench: Bench, name: str, given: Rows, taken: Sequence[Split]) -> Rows:
    """The rows as a method with random crops is published to see them."""
    return given._replace(take=augment.take(name, taken, bench.config.suite.image_size, bench.seed))


def pairs(given: Rows, seed: int) -> Rows:
    """Every row with another one of its class, drawn once: positives for a contrastive loss.

    Raises:
      ValueError: rows have no labels.
    """
    if given.labels is None:
        raise ValueError("pairs are rows of one class: they need labels, data='few labelled'")
    other = [_partners(labels, np.random.default_rng([seed, t])) for t, labels in enumerate(given.labels)]

    def take(t: int, numbers: np.ndarray) -> dict[str, np.ndarray]:
        first, second = given.take(t, numbers), given.take(t, other[t][numbers])
        width = max((x.shape[1] for x in (*first.values(), *second.values()) if x.ndim == 2), default=0)
        pad = lambda x: np.pad(x, ((0, 0), (0, width - x.shape[1]))) if x.ndim == 2 else x
        return {k: pad(x) for k, x in first.items()} | {SECOND + k: pad(x) for k, x in second.items()}

    return given._replace(take=take, labels=None)


def _partners(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For every row the number of another row of its class (its own where it is the only one)."""
    out = np.arange(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        out[members] = np.roll(members, 1)
    return out


def check(label: str, name: str, settings: dict[str, Any], suite: Any) -> None:
    """Raises `ValueError` for what an adaptive method cannot do, or not on a benchmark of this suite."""
    tasks, card, known = suite.tasks, registry.get(name).card, registry.get(name).defaults
    try:
        registry.get(name).check(**{key: value for key, value in settings.items() if key in known})
    except ValueError as error:
        raise ValueError(f"config.settings.{label}: {error}") from None
    size = "per_task" if "per_task" in known else "batch_size"
    pieces, count = settings.get("pieces", 1), {**known, **settings}.get(size, 0)
    if not isinstance(pieces, int) or isinstance(pieces, bool) or pieces < 1 or count % pieces:
        raise ValueError(f"{label}: pieces={pieces!r} must be a whole number that divides {size}, {count}")
    if settings.get("augment") and suite.kind != "image":
        raise ValueError(f"{name}: augment is for images; texts have no crops, leave it False (one view of every row)")
    if name == "atlas_few_shot" and settings.get("budget") is not None and settings["budget"] >= len(tasks):
        raise ValueError(f"{name}: budget={settings['budget']}, but the other tasks are {len(tasks) - 1}")
    if card.learns == "one target" and len(tasks) < 2:
        raise ValueError(f"{name} learns a task from the others' vectors: it needs two tasks or more, got {tasks}")
    if settings.get("adapt", ADAPT[0]) not in ADAPT:
        raise ValueError(f"adapt is {settings['adapt']!r}; allowed: {', '.join(ADAPT)}")
    if card.learns == "target and control":
        chosen = [settings.get(key) for key in NEGATION]
        if not set(chosen) <= set(tasks) or chosen[0] == chosen[1]:
            raise ValueError(f"{name} takes two tasks, target and control_task, of {', '.join(tasks)}: {chosen}")
