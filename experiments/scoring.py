"""How the rows of a benchmark are scored, by ``config.heads``: fixed heads, heads trained with experts, answers."""

import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from taskvec import models
from taskvec.data import glue, suites, text
from taskvec.evaluation import scorers
from taskvec.models import classifiers, decoding
from taskvec.training.heads import Heads

# Methods that are no data-free merges and work without fixed heads.
ALLOWED = {"answers": ("pretrained", "individual"), "trained": ("pretrained", "individual", "surgery")}
# The scale of fixed heads where a config sets none; CLIP's own with prompts.
SCALES = {"prompts": None, "class_means": 20.0}
# How checkpoints are called, on the hub or in a folder, that were published for a family of suites.
PUBLISHED = {
    "task_vectors": r"\w+/finetuned\.\w+",
    "tall_masks": r"\w+Val/nonlinear_finetuned\.\w+",
    "fusion_bench": r"clip-vit-\w+-patch\d+_[\w-]+",
    "glue_text_to_text": r"flan-t5-\w+_glue-\w+(_lora-16)?",
    "glue": r"(gpt2_\w+|roberta-base_lr1e-05)",
}


def check(config: Any, name: str) -> None:
    """Raises `ValueError` for a method, not a data-free one, that needs the fixed heads which `config` lacks."""
    allowed = ALLOWED.get(config.heads)
    if allowed is not None and name not in allowed:
        raise ValueError(
            f"{name} needs fixed heads; with config.heads={config.heads!r} there are data-free methods and "
            f"{', '.join(allowed)}"
        )


def protocol(config: Any) -> str:
    """The suite's tag (`suites.protocol`), the heads, and where the experts come from.

    Heads are ``config.heads``, with a scale or text model that the config sets: ``prompts-x20-NAME``. Experts are
    ``own`` (all trained by the config), ``published`` (all called as those of the suite's family) or ``given``.
    """
    heads = config.heads
    if heads in SCALES and config.head_scale not in (None, SCALES[heads]):
        heads += f"-x{config.head_scale:g}"
    if heads.startswith("prompts") and config.text_model:
        heads += f"-{pathlib.PurePath(config.text_model).name}"
    return f"{suites.protocol(config.suite)}/{heads}/{_experts(config)}"


def _experts(config: Any) -> str:
    spec = suites.parse(config.suite)
    places = [config.checkpoints.get(task, "") for task in spec.tasks]
    called = PUBLISHED.get(spec.family)
    if called and all(re.search(f"(^|/){called}/?$", place) for place in places):
        return "published"
    return "given" if any(places) else "own"


def make(bench: Any, heads: Heads | None, place: Callable[[str], pathlib.Path]) -> scorers.Scorer:
    """The scorer of a `prepare.Bench`.

    Args:
      bench: with its tasks.
      heads: the fixed ones.
      place: of a checkpoint that the config names.
    """
    base, config = bench.base, bench.config
    if config.heads == "answers":
        return scorers.of_answers(
            generator(base.folder, base.model, config.max_new_tokens), answers(bench), glue.numbers
        )
    if config.heads == "trained":
        missing = [task.name for task in bench.tasks if task.name not in config.checkpoints]
        if missing:
            raise ValueError(
                f"config.heads='trained' takes the heads from experts: set config.checkpoints for {', '.join(missing)}"
            )
        folders = [place(config.checkpoints[task.name]) for task in bench.tasks]
        return scorers.of_classifiers(base.model.apply, [classifiers.load(f, base.model.name) for f in folders])
    return scorers.of_heads(base.model.apply, heads)


def answers(bench: Any) -> list[tuple[str, ...]]:
    """For each task what stands for its classes: GLUE's published answers, else the names of the classes."""
    published = bench.config.suite.get("family") == "glue_text_to_text"
    return [glue.TASKS[task.name].targets if published else tuple(map(str, task.classes)) for task in bench.tasks]


def generator(folder: pathlib.Path, model: models.Model, most: int) -> Callable[..., list[str | None]]:
    """``(params, inputs) -> texts``: the greedy answers of a model, of at most so many tokens; None at NaN or infinity.

    Encoder-decoders end their answers; of a decoder's, which may go on, the first line counts, without white space
    around it.
    """
    tokenizer, alone = text.load_tokenizer(folder), not hasattr(model.config, "decoder_start_token_id")

    def generate(params: Any, inputs: dict[str, np.ndarray]) -> list[str | None]:
        prompt = {key: inputs[key] for key in ("ids", "mask")}
        found = decoding.generate(model, params, prompt, most)
        rows = [ids[mask].tolist() for ids, mask in zip(np.asarray(found.ids), np.asarray(found.mask), strict=True)]
        texts = tokenizer.decode_batch(rows, skip_special_tokens=True)
        texts = [written.strip().partition("\n")[0].strip() for written in texts] if alone else texts
        return [written if ok else None for written, ok in zip(texts, np.isfinite(found.score), strict=True)]

    return generate
