"""Fine-tunes one expert per task and seed, each written as a model folder that `taskvec merge` and `models.load` take.

Or one model for all tasks of a suite: ``train=joint`` (``joint+pcgrad``: with that balancer), ``atm``, ``forkmerge``.

    python -m experiments.finetune --config=configs/finetune_clip.py:model=CLIP,suite=clip8 --workdir=results/experts

Leaves ``pretrained``, ``seedS/TASK`` or ``seedS/joint`` (with ``expert.json``: settings and test accuracies; with
``adapter`` where factors were trained), ``seedS/heads.npz`` and ``metrics.jsonl``, a line per step. A run that was
killed goes on from its last checkpoint and ends with the same bits; what is finished is left alone.
"""

import json
import pathlib
import shutil
import time
from typing import Any

import numpy as np
from absl import app

from experiments import experts, memory, prepare, setup, together
from experiments.prepare import Base, Bench, Job
from taskvec import host, models
from taskvec.data import suites
from taskvec.evaluation import scorers
from taskvec.io.atomic import published, write_text
from taskvec.io.progress import say
from taskvec.training.trainable import linearised
from taskvec.tree import Tree


def main(argv):
    """Fine-tunes the experts of a config."""
    memory.keep_freed()
    finetune(*setup.start(argv))


def finetune(config: Any, workdir: pathlib.Path) -> None:
    """The experts of all seeds and tasks of a config in a folder."""
    check(config, workdir)
    base = prepare.load_base(config)
    if not (workdir / "pretrained" / "config.json").is_file():
        source = base.folder if base.folder.is_dir() else None
        models.save(workdir / "pretrained", base.model, base.pretrained, source=source)
    for seed in config.seeds:
        bench = prepare.load_tasks(config, base, seed)
        jobs = _jobs(bench)
        if bench.heads is not None:
            _save_heads(workdir / f"seed{seed}" / "heads.npz", bench)
        for job in jobs:
            _one(bench, job, workdir)


def _jobs(bench: Bench) -> list[Job]:
    """What a seed is to train: one model for all tasks where the config says so, else an expert of each."""
    if found := together.of_config(bench.config):
        return [together.job(bench, *found)]
    for task in bench.tasks:
        experts.settled(bench.base.tuner, task)
    return [prepare.job(bench, t) for t in range(len(bench.tasks))]


def check(config: Any, workdir: pathlib.Path) -> None:
    """Raises before weights or rows are read what would fail later: settings, model, suite, folders."""
    host.alone("fine-tuning")
    spec = suites.parse(config.suite)
    if found := together.of_config(config):
        together.check(config, *found)
    if "pretrain" not in config:  # else the model is made first
        _check_model(config, spec)
    if config.heads == "prompts":
        prepare.text_folder(config)
        suites.classes_and_templates(config.suite)
    if config.heads == "trained":
        raise ValueError("config.heads='trained' is of published experts; here heads are fixed before training")
    if (config.heads == "answers") != (spec.family == "glue_text_to_text"):
        raise ValueError("config.heads='answers' and config.suite.family='glue_text_to_text' need each other")
    whole = (spec.preprocess or "square") == "square" and not spec.family
    if config.augment and (spec.kind != "image" or whole):
        raise ValueError("config.augment crops images as they are read: set config.suite.preprocess='clip'")
    if config.checkpoint_every < 1:
        raise ValueError(f"config.checkpoint_every={config.checkpoint_every}, must be at least 1 step")
    if spec.train is not None and config.finetune.batch_size > spec.train:
        raise ValueError(f"config.finetune.batch_size={config.finetune.batch_size}, but tasks have {spec.train} rows")
    workdir.mkdir(parents=True, exist_ok=True)


def _check_model(config: Any, spec: suites.Spec) -> None:
    folder = prepare.model_folder(config.model)
    model = models.describe(folder, part=config.part or None)
    experts.make_tuner(config, model)
    if spec.kind == "text" and not folder.is_dir():
        raise ValueError(f"{folder} is a model of images, and config.suite is of kind text")
    size = getattr(model.config, "image_size", None)
    if spec.kind == "image" and size not in (None, spec.image_size):
        raise ValueError(f"config.suite.image_size={spec.image_size}, but {folder} takes {size} pixels")


def _one(bench: Bench, job: Job, workdir: pathlib.Path) -> None:
    """Trains, scores and writes one model, or sees that it is there."""
    base, config = bench.base, bench.config
    folder, place = (workdir / at / f"seed{bench.seed}" / job.name for at in ("", "checkpoints"))
    if (folder / "expert.json").is_file():
        _same(folder / "expert.json", job.key)
        say(f"{folder}: finished before")
        return
    about = _about(bench, job)
    cached = prepare.cached(job)  # a benchmark may have trained it
    with published(folder) as partial:
        if (cached / "config.json").is_file():
            shutil.copytree(cached, partial)
            params = models.load(partial, part=config.part or None)[1]
        else:
            made, about["seconds"] = _trained(job, place, Log(workdir / "metrics.jsonl", job.name, bench.seed))
            experts.save(partial, base.model, made, config, base.folder, about)
            params = made.params
        if bench.heads is not None:
            found = {"pretrained": base.pretrained, "expert": params}
            about["accuracy"] = {who: scores(bench, job, weights) for who, weights in found.items()}
        write_text(partial / "expert.json", json.dumps(about, indent=1) + "\n")
    shutil.rmtree(place, ignore_errors=True)
    mean = {who: f"{np.mean(list(found.values())):.1%}" for who, found in about.get("accuracy", {}).items()}
    say(f"wrote {folder}" + (": test accuracy " + " -> ".join(mean.values()) if mean else ""))


def _trained(job: Job, place: pathlib.Path, log: "Log") -> tuple[experts.Expert, float]:
    """The model and the seconds that it took; goes on from the checkpoints in `place` if they are of this run."""
    place.mkdir(parents=True, exist_ok=True)
    if (place / "run.json").is_file():
        _same(place / "run.json", job.key)
    write_text(place / "run.json", json.dumps({"key": job.key}))
    start = time.perf_counter()
    made = job.train(place=place, record=log)
    return made, round(time.perf_counter() - start, 1)


def scores(bench: Bench, job: Job, params: Tree) -> dict[str, float]:
    """Scores on the test rows of the tasks of a job, by name."""
    return {bench.tasks[t].name: score(bench, t, params) for t in job.tasks}


def score(bench: Bench, t: int, params: Tree) -> float:
    """Score on the test rows of a task; of the linear model, where that was trained."""
    task, base, scorer, weights = bench.tasks[t], bench.base, bench.scorer, params
    if bench.config.trainable.kind == "tangent":
        scorer, weights = scorers.of_heads(_of_tangent(base), bench.heads), (base.pretrained, params)
    outputs = scorer.outputs(weights, bench.batches(t, "test"), len(task.test.labels))
    return float(scorer.score(t, outputs, task.test.labels).mean())


def _of_tangent(base: Base) -> Any:
    return lambda both, batch: linearised(base.tuner.apply_fn, both[0])(both[1], batch)


class Log:
    """Appends a line per step to ``metrics.jsonl``; steps that a killed run had beyond its checkpoint come anew."""

    def __init__(self, path: pathlib.Path, task: str, seed: int):
        self._path, self._who, self._started = path, {"task": task, "seed": seed}, False

    def __call__(self, step: int, metrics: dict[str, np.ndarray], rows_per_second: float) -> None:
        """Takes metrics ``{name: [n]}``, or ``[n, T]`` of T tasks, of the last n of `step` steps."""
        n = len(metrics["loss"])
        if not self._started:
            self._forget(step - n)
            self._started = True
        with self._path.open("a", encoding="utf-8") as file:
            for i in range(n):
                values = {name: np.round(np.asarray(x[i], np.float64), 6).tolist() for name, x in metrics.items()}
                line = {**self._who, "step": step - n + i + 1, **values, "rows_per_second": round(rows_per_second, 1)}
                file.write(json.dumps(line) + "\n")

    def _forget(self, after: int) -> None:
        if not self._path.is_file():
            return
        # The last line of a killed run may be cut short.
        lines = [x for x in self._path.read_text(encoding="utf-8").splitlines() if x.endswith("}")]
        mine = lambda x: {key: x[key] for key in self._who} == self._who and x["step"] > after
        write_text(self._path, "".join(line + "\n" for line in lines if not mine(json.loads(line))))


def _about(bench: Bench, job: Job) -> dict[str, Any]:
    config = bench.config.to_dict()
    settings = {name: config[name] for name in ("model", "part", "heads", "finetune", "trainable", "augment")}
    settings |= {} if job.settings is None else {"together": job.settings}
    protocol = suites.protocol({**config["suite"], "tasks": tuple(bench.tasks[t].name for t in job.tasks)})
    return {"task": job.name, "seed": bench.seed, "key": job.key, "protocol": protocol, **settings}


def _same(file: pathlib.Path, key: str) -> None:
    if json.loads(file.read_text(encoding="utf-8")).get("key") != key:
        raise ValueError(
            f"{file.parent} is of a run with other settings, rows or weights; choose another workdir, or remove it"
        )


def _save_heads(path: pathlib.Path, bench: Bench) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {f"classes_{task.name}": np.array(task.classes) for task in bench.tasks}
    with published(path) as partial, open(partial, "wb") as file:
        np.savez(
            file, kernel=bench.heads.kernel, class_mask=bench.heads.class_mask, scale=np.float32(bench.heads.scale),
            tasks=np.array([task.name for task in bench.tasks]), **names,
        )  # fmt: skip


if __name__ == "__main__":
    app.run(main)
