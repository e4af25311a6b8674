"""Fine-tuning one expert: what a config says of it, as functions of the library; used for a cache and for folders."""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from taskvec import host, models
from taskvec.data import batches, preprocessing
from taskvec.data.base import Task
from taskvec.io import peft
from taskvec.io.checkpoints import Checkpoint
from taskvec.io.progress import bar
from taskvec.training import finetune as finetune_lib, lora, sparse, trainable
from taskvec.training.recipes import Recipe
from taskvec.training.trainable import Trainable
from taskvec.tree import Tree

# What can be trained (``config.trainable.kind``) and its settings; rank and targets of FusionBench's LoRA (q and v).
_LORA = {"rank": 16, "alpha": 32.0, "targets": r"attention/(query|value)/kernel$"}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "matching": {"include": ".", "exclude": ""},
    "attention": {"biases": False},
    "tangent": {},
    "lora": _LORA,
    "l_lora": _LORA,
    "lt_sft": {"density": 0.08, "exclude": "norm"},
}
HEADS = ("class_means", "prompts", "answers", "trained")


class Tuner(NamedTuple):
    """How the experts of a config are trained.

    Attributes:
      apply_fn: ``(params, batch) -> outputs``, in the config's precision.
      recipe: steps may depend on the task.
      trainable: what is trained.
      make: ``recipe -> finetune``, compiled once a number of steps.
      settings: of the config.
    """

    apply_fn: Callable[..., Any]
    recipe: Recipe
    trainable: Trainable
    make: Callable[[Recipe], Callable[..., Tree]]
    settings: Any


class Expert(NamedTuple):
    """Fine-tuned params and, of low-rank training, the factors."""

    params: Tree
    factors: Tree | None


def make_tuner(config: Any, model: models.Model) -> Tuner:
    """The tuner of a config; raises `ValueError` for settings that do not fit each other or the model."""
    recipe, what = Recipe(**config.finetune), make_trainable(config.trainable, model)
    check_length(config, model)
    if config.heads not in HEADS:
        raise ValueError(f"config.heads={config.heads!r}; allowed: {', '.join(HEADS)}")
    options = {key: value for key, value in config.compute.items() if value}
    if "dtype" in options:
        options["dtype"] = jnp.dtype(options["dtype"])
    apply_fn = functools.partial(model.apply, **options) if options else model.apply
    objective, trained = finetune_lib.classify, apply_fn
    if config.heads == "answers":
        if model.steps is None:
            raise ValueError(
                f"config.heads='answers' is for models that write text (text-to-text, decoders), not {model.name}"
            )
        objective = finetune_lib.answer
        start = getattr(model.config, "decoder_start_token_id", None)
        trained = None if start is None else finetune_lib.teacher_forced(apply_fn, start)

    @functools.cache
    def make(settled: Recipe) -> Callable[..., Tree]:
        if trained is None:
            raise ValueError(
                f"answers are taught to text-to-text models (t5), the model is {model.name}: name experts that exist "
                "in config.checkpoints"
            )
        return finetune_lib.make_finetune(trained, settled, trainable=what, objective=objective)

    return Tuner(apply_fn, recipe, what, make, config)


def check_length(config: Any, model: models.Model) -> None:
    """Raises `ValueError` if the widest batch of the suite's texts is too wide for the model: it is tried on shapes."""
    if config.suite.kind != "text" or not hasattr(model.config, "vocab_size"):
        return
    shape = (1, batches.round_up(config.suite.max_length))
    batch = {"ids": jax.ShapeDtypeStruct(shape, jnp.int32), "mask": jax.ShapeDtypeStruct(shape, bool)}
    writes = config.heads == "answers" and model.steps is not None
    run = (lambda *inputs: model.steps.start(*inputs, config.max_new_tokens)) if writes else model.apply
    try:
        jax.eval_shape(run, model.abstract, batch)
    except ValueError as error:
        more = f" and answers of {config.max_new_tokens}" if writes else ""
        raise ValueError(
            f"config.suite.max_length={config.suite.max_length}, in batches of {shape[1]} tokens{more}: {error}. Set "
            "it to a multiple of 16 that is small enough"
        ) from error


def make_trainable(settings: Mapping[str, Any], model: models.Model) -> Trainable:
    """What is trained, tried on the shapes of the model; raises `ValueError` for what cannot be."""
    settings = dict(settings)
    kind = settings.pop("kind")
    if kind not in KINDS or settings.keys() != KINDS[kind].keys():
        known = "; ".join(f"{name} ({', '.join(of)})" if of else name for name, of in KINDS.items())
        raise ValueError(f"config.trainable is {kind} with {', '.join(settings) or 'no settings'}; allowed: {known}")
    makers = {
        "full": trainable.full,
        "matching": trainable.matching,
        "attention": trainable.attention_only,
        "tangent": trainable.tangent,
        "lora": functools.partial(lora.lora, scanned=model.scanned),
        "l_lora": functools.partial(lora.lora, scanned=model.scanned, train_a=False),
        "lt_sft": lambda density, exclude: trainable.masked(),
    }
    made = makers[kind](**settings)
    jax.eval_shape(made.init, model.abstract)
    if kind == "lt_sft":
        trainable.chosen(model.abstract, ".", settings["exclude"])
        if not 0 < settings["density"] <= 1:
            raise ValueError(f"config.trainable.density={settings['density']}, must be in (0, 1]")
    return made


def settled(tuner: Tuner, task: Task) -> Recipe:
    """The recipe with the steps that it has for a task of the config's suite."""
    return tuner.recipe.for_task(task.name, len(task.train.labels), tuner.settings.suite.get("family", ""))


def train(
    tuner: Tuner,
    pretrained: Tree,
    task: Task,
    head: tuple,
    seed: int,
    *,
    place: pathlib.Path | None = None,
    record: Callable[[int, dict[str, np.ndarray], float], None] | None = None,
) -> Expert:
    """Fine-tunes for one task.

    Args:
      tuner: of `make_tuner`.
      pretrained: left intact.
      task: encoded.
      head: kernel, mask and scale of the task.
      seed: of the batches.
      place: folder for checkpoints, from which a killed run goes on.
      record: called with (steps done, metrics of the last ones ``{name: [n]}``, rows per second).
    """
    host.alone(f"fine-tuning {task.name}")
    config, recipe = tuner.settings, settled(tuner, task)
    sparse_kind, phases = config.trainable.kind == "lt_sft", 1 + (config.trainable.kind == "lt_sft")
    make = training_batches(tuner, task, recipe.batches, seed)
    open_ = lambda i: None if place is None else Checkpoint(place / f"phase{i}", config.checkpoint_every)
    checkpoints = [open_(i) for i in range(phases)]
    finetune = tuner.make(recipe)
    rest = (*head, batches.prefetched(make, recipe.batches))
    with bar(f"fine-tuning {task.name}, seed {seed}", phases * recipe.batches) as update:
        show = shown(update, recipe.batch_size, record)
        if sparse_kind:
            chosen = {"density": config.trainable.density, "exclude": config.trainable.exclude}
            tuned = sparse.lt_sft(
                finetune, pretrained, *rest, **chosen, checkpoints=tuple(checkpoints), steps=recipe.batches, seed=seed,
                on_chunk=show,
            )  # fmt: skip
        else:
            tuned = finetune(pretrained, *rest, seed=seed, checkpoint=checkpoints[0], on_chunk=show)
    for checkpoint in checkpoints:
        if checkpoint is not None:
            checkpoint.close()
    return Expert(tuned, None) if sparse_kind else finished(tuner, pretrained, tuned)


def training_batches(tuner: Tuner, task: Task, count: int, seed: int) -> Callable[[int], batches.Batch]:
    """Batches of a task's training rows, pictures cropped at random where the config says so."""
    config = tuner.settings
    split = preprocessing.augmented(task.train, config.suite.image_size) if config.augment else task.train
    return batches.training_batches(split, config.finetune.batch_size, count, seed)


def finished(tuner: Tuner, pretrained: Tree, learnables: Tree) -> Expert:
    """What the learnables make of the pretrained params."""
    _, fixed = tuner.trainable.init(pretrained)
    low_rank = tuner.settings.trainable.kind in ("lora", "l_lora")
    return Expert(tuner.trainable.weights(learnables, fixed), lora.factors(learnables, fixed) if low_rank else None)


def save(folder: pathlib.Path, model: models.Model, expert: Expert, config: Any, source: pathlib.Path, about: dict):
    """Writes an expert: the model's folder, ``adapter`` of low-rank training, and ``expert.json`` with `about`."""
    home = source if source.is_dir() else None
    models.save(folder, model, expert.params, source=home)
    if expert.factors is not None:
        base = str(source.absolute())
        peft.save_adapter(folder / "adapter", model.table, expert.factors, config.trainable.alpha, base)
    (folder / "expert.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def shown(update: Callable, batch_size: int, record: Callable | None) -> Callable:
    """An ``on_chunk`` that shows and records a chunk with its rows per second (of the first, compiling included)."""
    last = time.perf_counter()

    def show(step: int, metrics: dict[str, np.ndarray]) -> None:
        nonlocal last
        now = time.perf_counter()
        rate = batch_size * len(metrics["loss"]) / max(now - last, 1e-9)
        last = now
        update(step, f"loss {metrics['loss'][-1]:.3f}, accuracy {metrics['accuracy'].mean():.0%}, {rate:.0f} rows/s")
        if record is not None:
            record(step, metrics, rate)

    return show
