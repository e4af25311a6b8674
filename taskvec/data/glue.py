"""GLUE as it is used for merging: eight tasks, for classification heads (RoBERTa, GPT-2) and text to text (Flan-T5).

Rows come from JSON lines or Parquet on disk, or from the hub's ``nyu-mll/glue``; the test split is the published
validation split (matched for MNLI), because GLUE's test labels are hidden. Prompts and targets are those of FusionBench
(tanganke/fusion_bench 54c9e8c, ``tasks/flan_t5_text_generation/glue_prompt_templates.py``), spelling included, because
the published checkpoints were trained on them. GLUE: arXiv 1804.07461.
"""

import pathlib
from typing import NamedTuple

import numpy as np

from taskvec.data import base, sources
from taskvec.data.text import encode

HUB = "nyu-mll/glue"
METRICS = ("accuracy", "matthews", "pearson", "spearman")


class GlueTask(NamedTuple):
    """One task of GLUE.

    Attributes:
      text: the one or two text columns.
      classes: names in the order of the labels; empty for STS-B, whose labels are numbers from 0 to 5.
      prompt: Flan-T5's input, with the columns' names in braces.
      targets: what Flan-T5 answers for each label; empty for STS-B: the number with one decimal.
      metrics: those usually reported, the first one is FusionBench's for Flan-T5.
      test: name of the split that is scored.
    """

    text: tuple[str, ...]
    classes: tuple[str, ...]
    prompt: str
    targets: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    test: str = "validation"


TASKS = {
    "cola": GlueTask(
        ("sentence",),
        ("unacceptable", "acceptable"),
        "Indicate if the following sentence is grammatically correct or not: \"{sentence}\". Answere 'acceptable' or "
        "'unacceptable'.",
        ("unacceptable", "acceptable"),
        ("accuracy", "matthews"),
    ),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        "Does the premise: '{premise}' logically imply, contradict, or is neutral to the hypothesis: '{hypothesis}'? "
        "Answere with 'entailment', 'contradiction', or 'neutral'.",
        ("entailment", "neutral", "contradiction"),
        test="validation_matched",
    ),
    "mrpc": GlueTask(
        ("sentence1", "sentence2"),
        ("not_equivalent", "equivalent"),
        "Are the following sentences '{sentence1}' and '{sentence2}' conveying the same meaning? Answere with 'yes' or "
        "'no'.",
        ("no", "yes"),
    ),
    "qnli": GlueTask(
        ("question", "sentence"),
        ("entailment", "not_entailment"),
        "Given the context: '{sentence}', does the question '{question}' have an answer based on the information "
        "provided? Answer with 'yes' or 'no'.",
        ("yes", "no"),
    ),
    "qqp": GlueTask(
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        "Do the questions '{question1}' and '{question2}' have the same intent? Answere with 'yes' or 'no'.",
        ("no", "yes"),
    ),
    "rte": GlueTask(
        ("sentence1", "sentence2"),
        ("entailment", "not_entailment"),
        "Does the text: '{sentence1}' entail that '{sentence2}' is true? Provide 'yes' or 'no'.",
        ("yes", "no"),
    ),
    "sst2": GlueTask(
        ("sentence",),
        ("negative", "positive"),
        "Given the sentence '{sentence}', determine the sentiment. Is it positive or negative?",
        ("negative", "positive"),
    ),
    "stsb": GlueTask(
        ("sentence1", "sentence2"),
        (),
        "Consider the sentences '{sentence1}' and '{sentence2}'. On a scale from 1 (completely different) to 5 "
        "(completely similar), rate the similarity.",
        (),
        ("spearman", "pearson"),
    ),
}


def load(name: str, source: str) -> base.Task:
    """A task with ``{"text"}`` rows (``[N, 2]`` for pairs), labels int32, or float32 for STS-B.

    Args:
      name: a key of `TASKS`.
      source: ``hub``, or a folder with ``NAME/train-*.parquet``, ``NAME/train.parquet`` or ``NAME/train.jsonl``, and
        ``validation`` (``validation_matched`` for MNLI) beside it.

    Raises:
      ValueError: unknown task, or a row at fault, by file and line.
      FileNotFoundError: no such files; the message says where they belong.
    """
    of = _known(name)
    train, test = (_table(name, split, source) for split in ("train", of.test))
    split = lambda table: base.Split(
        {"text": table.rows}, table.labels if of.classes else table.labels.astype(np.float32)
    )
    made = base.Task(name, of.classes, split(train), base.take(split(train), np.arange(0)), split(test))
    base.check(made, may_be_empty=("held_out",))
    return made


def text_to_text(name: str, split: base.Split) -> tuple[np.ndarray, np.ndarray]:
    """Flan-T5's prompts and targets of a split's rows: two object arrays ``[N]``."""
    of = _known(name)
    prompts, targets = np.empty(len(split.labels), object), np.empty(len(split.labels), object)
    for i, (row, label) in enumerate(zip(split.inputs["text"], split.labels, strict=True)):
        prompts[i] = of.prompt.format(**dict(zip(of.text, [row] if len(of.text) == 1 else row, strict=True)))
        targets[i] = of.targets[label] if of.targets else f"{label:.1f}"
    return prompts, targets


def encode_text_to_text(task: base.Task, tokenizer, max_length: int = 512) -> base.Task:
    """The task's rows as ``{"ids", "mask", "target", "target_mask"}``: int32 and bool ``[N, M]`` and ``[N, L]``.

    Targets end with the tokenizer's end token where its post-processor adds one (T5's does). A prompt that is too long
    loses its end, as in FusionBench, and with it the question; how many do is logged.
    """

    def one(which: str) -> base.Split:
        split = getattr(task, which)
        prompts, targets = text_to_text(task.name, split)
        target = encode(targets, tokenizer, max_length)
        both = encode(prompts, tokenizer, max_length, where=f"task {task.name}, {which}")
        both |= {"target": target["ids"], "target_mask": target["mask"]}
        return split._replace(inputs=both)

    return task._replace(**{which: one(which) for which in base.SPLITS})


def numbers(answers: list[str]) -> np.ndarray:
    """STS-B answers as numbers; what is not a number counts as 0, as in FusionBench."""

    def one(answer: str) -> float:
        try:
            value = float(answer)
        except ValueError:
            return 0.0
        return value if np.isfinite(value) else 0.0

    return np.array([one(answer) for answer in answers])


def metric(name: str, predicted: np.ndarray, labels: np.ndarray) -> float:
    """One of `METRICS` over ``[N]`` predictions and labels (class numbers, strings for accuracy, or numbers).

    Matthews: the correlation of the two 0/1 (or, with more classes, one-hot) labellings. Constant predictions give 0
    in all three correlations.

    Raises:
      ValueError: unknown name, other shapes, no rows.
    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.shape != labels.shape or predicted.ndim != 1 or not len(labels):
        raise ValueError(f"metric {name}: predictions {predicted.shape} and labels {labels.shape}; want [N], N > 0")
    if name == "accuracy":
        return float(np.mean(predicted == labels))
    if name == "matthews":
        classes = np.unique(np.concatenate([predicted, labels]))
        return _correlation(predicted[:, None] == classes, labels[:, None] == classes)
    if name == "pearson":
        return _correlation(predicted[:, None], labels[:, None])
    if name == "spearman":
        return _correlation(_ranks(predicted)[:, None], _ranks(labels)[:, None])
    raise ValueError(f"unknown metric {name!r}; allowed: {', '.join(METRICS)}")


def _correlation(x_NxC: np.ndarray, y_NxC: np.ndarray) -> float:
    x, y = (np.asarray(a, np.float64) - np.asarray(a, np.float64).mean(0) for a in (x_NxC, y_NxC))
    scale = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / scale) if scale else 0.0


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values share their mean."""
    _, at, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[at]


def _table(name: str, split: str, source: str) -> sources.Table:
    of = TASKS[name]
    columns = sources.Columns(text=of.text)
    if source != "hub":
        folder = pathlib.Path(source).expanduser() / name
        for file in (folder / f"{split}.jsonl", folder / f"{split}.parquet"):
            if file.is_file():
                read = sources.jsonl if file.suffix == ".jsonl" else lambda f, *a: sources.parquet([f], *a)
                return read(file, columns, of.classes)
        files = sorted(folder.glob(f"{split}-*.parquet")) or sorted(
            (pathlib.Path(source).expanduser() / HUB / name).glob(f"{split}-*.parquet")
        )
        if not files:
            raise FileNotFoundError(f"GLUE {name}: no {split}.jsonl, {split}.parquet or {split}-*.parquet in {folder}")
        return sources.parquet(files, columns, of.classes)
    from taskvec.data.clip_suites import hub_files

    return sources.parquet(hub_files(f"{HUB}:{name}", split, "hub", name), columns, of.classes)


def _known(name: str) -> GlueTask:
    if name not in TASKS:
        raise ValueError(f"unknown GLUE task {name!r}; there is {', '.join(TASKS)}")
    return TASKS[name]
