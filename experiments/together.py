"""One model for all tasks of a suite, by joint training, ATM or ForkMerge, as a config says; kept as experts are.

A config with ``config.joint``, ``config.atm`` or ``config.forkmerge`` is one for `experiments.finetune`; in a benchmark
the same settings are those of a row. Steps and batch size are those of an expert, a task: a step of joint training
takes ``batch_size`` rows of each, a step of ATM or of a branch of ForkMerge those of one.
"""

import contextlib
import functools
import inspect
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from experiments import experts, keys, prepare
from experiments.prepare import Bench, Job
from taskvec import host
from taskvec.adaptive.fit import Loop
from taskvec.data import batches, suites
from taskvec.io.checkpoints import Checkpoint
from taskvec.io.progress import bar
from taskvec.merging import registry
from taskvec.training import atm, balancers, branches, forkmerge, multitask, recipes
from taskvec.training.recipes import Recipe
from taskvec.tree import Tree

# Settings by default. `joint` takes those of its balancer too; `atm` those of the method that merges, the mean without;
# ForkMerge's `targets` are names of tasks, `merges` and `evaluations` numbers in a run, as published for images.
KINDS: dict[str, dict[str, Any]] = {
    "joint": {"balancer": "equal", "tasks_at_once": 1},
    "atm": {"rounds": 10, "merge": "task_arithmetic"},
    "forkmerge": {"targets": (), "branches": (0, 1, 2), "merges": 4, "evaluations": 20},
}
# Of `experts.KINDS` what can be trained so. ATM makes a model of every round, ForkMerge averages what is trained.
_WHOLE = ("full", "matching", "attention")
TRAINABLE = {
    "joint": (*_WHOLE, "tangent", "lora", "l_lora"),
    "atm": (*_WHOLE, "lora", "l_lora"),
    "forkmerge": _WHOLE,
}


def settings_of(train: str) -> tuple[str, dict[str, Any]] | None:
    """A kind and its settings from ``joint``, ``joint+BALANCER`` (with that balancer's), ``atm``, ``forkmerge``."""
    kind, _, name = train.partition("+")
    if kind not in KINDS:
        return None
    if name and kind != "joint":
        raise ValueError(f"train={train!r}: only joint takes a balancer, as in joint+pcgrad")
    return kind, resolved(kind, {"balancer": name} if name else {})


def of_config(config: Any) -> tuple[str, dict[str, Any]] | None:
    """The kind that a config for `experiments.finetune` names, and its settings."""
    return next(((kind, config[kind].to_dict()) for kind in KINDS if kind in config), None)


def resolved(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings, with those of a balancer that a config can hold."""
    given = {**KINDS[kind], **settings}
    if kind != "joint":
        return given
    own = {name: p.default for name, p in inspect.signature(_balancer(given["balancer"])).parameters.items()}
    return {name: x for name, x in own.items() if isinstance(x, int | float | str)} | given


def _balancer(name: str) -> Callable[..., balancers.Balancer]:
    balancers.get(name)  # raises for an unknown one
    return balancers.BALANCERS[name]


def check(config: Any, kind: str, settings: Mapping[str, Any]) -> None:
    """Raises `ValueError` before weights or rows are read for what would fail later."""
    given, names, what = resolved(kind, settings), suites.parse(config.suite).tasks, config.trainable.kind
    if config.heads not in prepare.FIXED:
        raise ValueError(
            f"{kind} trains under fixed heads: config.heads={config.heads!r}; allowed: class_means, prompts"
        )
    if what not in TRAINABLE[kind]:
        raise ValueError(f"{kind} with config.trainable.kind={what!r}; allowed: {', '.join(TRAINABLE[kind])}")
    if kind in names:
        raise ValueError(f"a task named {kind!r} would have the same folder as the model of all tasks")
    odd = [name for name in ("dropout", "label_smoothing") if kind != "atm" and config.finetune.get(name)]
    if odd:
        raise ValueError(f"{kind} has no {odd[0]}: set config.finetune.{odd[0]}=0")
    {"joint": _check_joint, "atm": _check_atm, "forkmerge": _check_forkmerge}[kind](config, given, names)


def _of_part(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not of the kind but of its balancer or merge."""
    return {name: value for name, value in given.items() if name not in KINDS[kind]}


def _check_joint(config: Any, given: Mapping[str, Any], names: Sequence[str]) -> None:
    own, known = _of_part("joint", given), inspect.signature(_balancer(given["balancer"])).parameters
    if own.keys() - known.keys():
        allowed = ", ".join((*KINDS["joint"], *known))
        raise ValueError(f"joint with balancer {given['balancer']} and {', '.join(own)}; allowed: {allowed}")
    if balancers.get(given["balancer"], **own).needs_validation and config.suite.held_out == 0:
        raise ValueError(f"{given['balancer']} weighs tasks by losses on held-out rows: set config.suite.held_out")


def _check_atm(config: Any, given: Mapping[str, Any], names: Sequence[str]) -> None:
    method = registry.get(given["merge"])
    method(**_of_part("atm", given))
    method.card.check(method.name, len(names), True, ())
    if method.card.result != "static" or method.card.data != "none":
        raise ValueError(f"atm merges every round into one model by weights alone, which {method.name} does not")
    atm.budget(config.finetune.steps or recipes.OTHERS, given["rounds"])


def _check_forkmerge(config: Any, given: Mapping[str, Any], names: Sequence[str]) -> None:
    if extra := _of_part("forkmerge", given):
        raise ValueError(f"forkmerge has no {', '.join(extra)}; allowed: {', '.join(KINDS['forkmerge'])}")
    targets = tuple(given["targets"])
    if not targets or set(targets) - set(names):
        raise ValueError(f"forkmerge with targets={targets}, want some of {', '.join(names)}; the others help them")
    if not given["branches"] or not 0 <= min(given["branches"]) <= max(given["branches"]) <= len(names) - len(targets):
        raise ValueError(
            f"forkmerge with branches={tuple(given['branches'])}: numbers of tasks that help, of the "
            f"{len(names) - len(targets)} that are no targets"
        )
    if config.suite.held_out == 0:
        raise ValueError("forkmerge chooses by held-out rows: set config.suite.held_out")


def job(bench: Bench, kind: str, settings: Mapping[str, Any]) -> Job:
    """One model for all tasks of a seed."""
    given, every = resolved(kind, settings), range(len(bench.tasks))
    about = {"kind": kind, **given, "tasks": [task.name for task in bench.tasks]}
    heads = [bench.head(t) for t in every]
    key = keys.of_run(bench.config, bench.base.folder, bench.tasks, heads, bench.seed, about)
    return Job(kind, tuple(every), key, functools.partial(train, bench, kind, given), about)


def train(
    bench: Bench,
    kind: str,
    settings: Mapping[str, Any],
    *,
    place: pathlib.Path | None = None,
    record: Callable[[int, dict[str, np.ndarray], float], None] | None = None,
) -> experts.Expert:
    """Trains one model for all tasks; `place` and `record` as in `experts.train`, steps counted over all of the run."""
    host.alone(kind)
    recipe, tasks = bench.base.tuner.recipe.for_task(kind, 0), len(bench.tasks)
    rows, total = recipe.batch_size, recipe.batches
    if kind == "joint":
        rows *= tasks
    elif kind == "atm":
        total *= tasks
    else:
        rank = _lengths(settings, recipe)["rank_steps"]
        total = forkmerge.total_steps(tasks - len(settings["targets"]), len(settings["branches"]), total, rank)
    runner = {"joint": _joint, "atm": _atm, "forkmerge": _forkmerge}[kind]
    with bar(f"{kind}, seed {bench.seed}", total) as update:
        return runner(bench, settings, recipe, place, experts.shown(update, rows, record))


def _joint(bench: Bench, settings: Mapping[str, Any], recipe: Recipe, place: Any, show: Callable) -> experts.Expert:
    tuner, pretrained, steps = bench.base.tuner, bench.base.pretrained, recipe.batches
    balancer = balancers.get(settings["balancer"], **_of_part("joint", settings))
    batch = multitask.concatenated(_batches(bench, steps))
    if balancer.needs_validation:
        rows = min(recipe.batch_size, *(len(task.held_out.labels) for task in bench.tasks))
        held_out = [batches.training_batches(task.held_out, rows, steps, bench.seed) for task in bench.tasks]
        batch = _with_validation(batch, multitask.concatenated(held_out))
    joint = multitask.make_joint(
        tuner.apply_fn, _optimiser(recipe), balancer, trainable=tuner.trainable,
        tasks_at_once=settings["tasks_at_once"], sam_rho=recipe.sam_rho,
    )  # fmt: skip
    with _opened(place, "joint", bench.config.checkpoint_every) as checkpoint:
        done = joint(
            pretrained, bench.heads, batches.prefetched(batch, steps), steps, seed=bench.seed,
            loop=Loop(checkpoint=checkpoint, on_chunk=show),
        )  # fmt: skip
    return experts.finished(tuner, pretrained, done.learnables)


def _atm(bench: Bench, settings: Mapping[str, Any], recipe: Recipe, place: Any, show: Callable) -> experts.Expert:
    """A killed run goes on within a task of a round."""
    tuner, tasks, n = bench.base.tuner, len(bench.tasks), recipe.accumulate
    streams = [batches.prefetched(batch, recipe.batches) for batch in _batches(bench, recipe.batches)]

    def train(params: Tree, t: int, first: int, steps: int) -> Tree:
        finetune, before = tuner.make(recipe.with_steps(steps)), (tasks * first + t * steps) * n
        with _opened(place, f"rounds/{first}/{bench.tasks[t].name}", bench.config.checkpoint_every) as checkpoint:
            tuned = finetune(
                params, *bench.head(t), lambda i: streams[t](first * n + i), seed=bench.seed, checkpoint=checkpoint,
                on_chunk=lambda step, metrics: show(before + step, metrics),
            )  # fmt: skip
        return tuner.trainable.weights(tuned, tuner.trainable.init(params)[1])

    with _opened(place, "merged", 1) as merged:

        def keep(rounds: int, params: Tree) -> None:
            if merged is not None:
                merged.save(rounds, {"params": params})
                shutil.rmtree(place / "rounds", ignore_errors=True)

        saved = merged and merged.restore({"params": bench.base.pretrained})
        done, start = (saved[0], saved[1]["params"]) if saved else (0, bench.base.pretrained)
        found = atm.atm(
            train, start, tasks, steps=recipe.steps, rounds=settings["rounds"], method=settings["merge"],
            settings=_of_part("atm", settings) or None, done=done, on_round=keep,
        )  # fmt: skip
    return experts.Expert(found, None)


def _forkmerge(bench: Bench, settings: Mapping[str, Any], recipe: Recipe, place: Any, show: Callable) -> experts.Expert:
    tuner, names = bench.base.tuner, [task.name for task in bench.tasks]
    targets = [names.index(name) for name in settings["targets"]]
    start, fixed = tuner.trainable.init(bench.base.pretrained)
    trainer = branches.make_branches(
        tuner.apply_fn, _optimiser(recipe), bench.heads, _batches(bench, recipe.batches), trainable=tuner.trainable,
        fixed=fixed, sam_rho=recipe.sam_rho, seed=bench.seed,
    )  # fmt: skip

    def evaluate(learnables: Tree) -> float:
        params, found = tuner.trainable.weights(learnables, fixed), []
        for t in targets:
            rows, labels = bench.batches(t, "held_out"), bench.tasks[t].held_out.labels
            found.append(bench.scorer.score(t, bench.scorer.outputs(params, rows, len(labels)), labels).mean())
        return float(np.mean(found))

    with _opened(place, "forkmerge", bench.config.checkpoint_every, keep=1) as checkpoint:
        done = forkmerge.forkmerge(
            trainer, evaluate, start, num_tasks=len(names), targets=targets, steps=recipe.batches,
            branches=settings["branches"], checkpoint=checkpoint, on_chunk=show, **_lengths(settings, recipe),
        )  # fmt: skip
    return experts.finished(tuner, bench.base.pretrained, done.params)


def _lengths(settings: Mapping[str, Any], recipe: Recipe) -> dict[str, int]:
    """ForkMerge's numbers of merges and evaluations as steps; it ranks for as long as between two evaluations."""
    interval, every = (math.ceil(recipe.batches / settings[name]) for name in ("merges", "evaluations"))
    return {"interval": interval, "evaluate_every": every, "rank_steps": every}


def _optimiser(recipe: Recipe) -> optax.GradientTransformation:
    """The recipe's, as one that is given every batch's gradients."""
    made = recipe.optimiser()
    return optax.MultiSteps(made, recipe.accumulate) if recipe.accumulate > 1 else made


def _batches(bench: Bench, count: int) -> list[Callable[[int], batches.Batch]]:
    return [experts.training_batches(bench.base.tuner, task, count, bench.seed) for task in bench.tasks]


def _with_validation(batch: Callable, held_out: Callable) -> Callable[[int], dict[str, Any]]:
    return lambda step: batch(step) | {"validation": held_out(step)}


def _opened(place: pathlib.Path | None, name: str, every: int, keep: int = 2) -> contextlib.AbstractContextManager:
    """A checkpoint, or None where there is no place for one."""
    return contextlib.nullcontext() if place is None else Checkpoint(place / name, every, keep)
