"""How what a model gives for the rows of a task becomes a score: features under heads, numbers, generated answers.

A `Scorer` is two functions. The first runs a model over a task's rows; what it gives can be kept, and corrected where
it is features. The second needs labels and no model. `taskvec.evaluation.evaluate.scored` takes any of them.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from taskvec.training import heads as heads_lib
from taskvec.training.heads import Heads
from taskvec.tree import Tree

Array = jax.Array
Batch = dict[str, np.ndarray]

_NOT_INPUTS = ("label", "weight", "index")
_NO_TEXT = b"\xff"


class NotFinite(ValueError):
    """Rows cannot be scored, because a model gives NaN, infinity or features whose squares overflow; names the first.

    An arg max over such numbers is class 0, so that their score would look like chance.

    Attributes:
      task: number of the rows' task.
    """

    def __init__(self, task: int, bad: np.ndarray, what: str):
        rows = np.flatnonzero(bad)
        super().__init__(
            f"task number {task} (from 0): the model's output for {len(rows)} of {len(bad)} rows is {what}, first for "
            f"row {rows[0]}; the weights have diverged, or hold such numbers"
        )
        self.task = task


class Scorer(NamedTuple):
    """How the rows of T tasks are scored.

    Attributes:
      outputs: ``(params, batches, num_rows) -> [N, ...]``, one entry a row in the order of the split; see `by_row`.
      score: ``(task, outputs [N, ...], labels [N]) -> [N]``, one number a row, whose mean is the score of the task:
        true or false where rows are right or wrong. Raises `NotFinite`.
      tasks: T.
    """

    outputs: Callable[[Tree, Iterable[Batch], int | None], np.ndarray]
    score: Callable[[int, np.ndarray, np.ndarray], np.ndarray]
    tasks: int


def of_heads(apply_fn: Callable, heads: Heads) -> Scorer:
    """Features ``[N, d]`` of ``apply_fn(params, inputs)["features"]`` under fixed heads; a row is right or wrong."""

    def score(task: int, z_Nxd: np.ndarray, labels: np.ndarray) -> np.ndarray:
        _check_finite(task, z_Nxd)
        return np.asarray(heads_lib.task_logits(heads, task, z_Nxd).argmax(-1)) == np.asarray(labels)

    return Scorer(functools.partial(encode, apply_fn), score, heads.kernel.shape[0])


def of_classifiers(apply_fn: Callable, classifiers: Sequence[Callable[[np.ndarray], np.ndarray]]) -> Scorer:
    """The same features under a classifier a task, ``[N, d] -> [N, C]``.

    A classifier of one column is for labels that are numbers, and is scored by rank correlation.
    """

    def score(task: int, z_Nxd: np.ndarray, labels: np.ndarray) -> np.ndarray:
        _check_finite(task, z_Nxd)
        logits_NxC = np.asarray(classifiers[task](z_Nxd))
        if np.asarray(labels).dtype.kind == "f":
            return rank_products(logits_NxC[:, 0], labels)
        return logits_NxC.argmax(-1) == np.asarray(labels)

    return Scorer(functools.partial(encode, apply_fn), score, len(classifiers))


def of_answers(
    generate: Callable[[Tree, Batch], Sequence[str | None]],
    answers: Sequence[Sequence[str]],
    numbers: Callable[[list[str]], np.ndarray],
) -> Scorer:
    """Texts that a model writes: right where they are, letter for letter, the answer of the row's class.

    Args:
      generate: ``(params, inputs) -> B texts``; None where the model's logits are NaN or infinite.
      answers: for each task those of its classes; empty where labels are numbers, scored by rank correlation.
      numbers: texts -> ``[N]``, for those tasks.
    """

    def outputs(params: Tree, batches: Iterable[Batch], num_rows: int | None) -> np.ndarray:
        return by_row(lambda inputs: np.array(generate(params, inputs), object), batches, num_rows)

    def score(task: int, texts_N: np.ndarray, labels: np.ndarray) -> np.ndarray:
        if (bad := np.array([written is None for written in texts_N])).any():
            raise NotFinite(task, bad, "NaN or infinite")
        if np.asarray(labels).dtype.kind == "f":
            return rank_products(numbers(list(texts_N)), labels)
        return texts_N == np.array(answers[task], object)[labels]

    return Scorer(outputs, score, len(answers))


def _check_finite(task: int, z_Nxd: np.ndarray) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        bad = ~np.isfinite(np.einsum("nd,nd->n", z_Nxd, z_Nxd))
    if bad.any():
        raise NotFinite(task, bad, "NaN, infinite or too large for float32")


def rank_products(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Float64 ``[N]`` whose mean is Spearman's rank correlation: products of the standardised ranks; 0 if constant."""
    x, y = (_centred_ranks(np.asarray(a)) for a in (predicted, labels))
    scale = np.sqrt(np.mean(x * x) * np.mean(y * y))
    return x * y / scale if scale else np.zeros(len(x))


def _centred_ranks(x_N: np.ndarray) -> np.ndarray:
    """Ranks around 0, equal values share their mean."""
    _, at, counts = np.unique(x_N, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[at]
    return ranks - ranks.mean()


@functools.partial(jax.jit, static_argnums=0)
def _features(apply_fn: Callable, params: Tree, inputs: Batch) -> Array:
    return apply_fn(params, inputs)["features"]


def encode(apply_fn: Callable, params: Tree, batches: Iterable[Batch], num_rows: int | None) -> np.ndarray:
    """Features of a split in the order of its rows, ``[N, d]`` float32.

    The compiled forward pass is kept for `apply_fn`, so that further weights and tasks of equal shapes compile nothing.

    Args:
      apply_fn: ``(params, inputs) -> {"features": [B, d], ...}``.
      params: weights.
      batches, num_rows: as in `by_row`.

    Raises:
      ValueError: rows are missing or occur twice.
    """
    return by_row(functools.partial(_features, apply_fn, params), batches, num_rows).astype(np.float32, copy=False)


def by_row(function: Callable[[Batch], Array], batches: Iterable[Batch], num_rows: int | None) -> np.ndarray:
    """What a function gives for every row of a split, in the order of its rows.

    Args:
      function: inputs of B rows -> ``[B, ...]``.
      batches: inputs with ``index`` ``[B]``, the row in the split or -1 for padding; of several processes each has its
        part (`taskvec.data.batches.eval_batches`), and all get the whole back.
      num_rows: N; None for as many as there are.

    Raises:
      ValueError: rows are missing or occur twice.
    """
    parts, index = [], [np.zeros(0, np.int32)]
    for batch in batches:
        parts.append(function({key: x for key, x in batch.items() if key not in _NOT_INPUTS}))
        index.append(batch["index"])
    index = of_processes(np.concatenate(index))
    rows = np.flatnonzero(index >= 0)
    num_rows = len(rows) if num_rows is None else num_rows
    if not np.array_equal(np.sort(index[rows]), np.arange(num_rows)):
        raise ValueError(
            f"batches must hold each of {num_rows} rows once, found {len(rows)} (an iterator is used up after one pass)"
        )
    return of_processes(np.concatenate([np.asarray(part) for part in parts]))[rows[np.argsort(index[rows])]]


def of_processes(x_N: np.ndarray) -> np.ndarray:
    """The rows of all processes, which have as many each, in the order of the processes; every process must call it."""
    if jax.process_count() == 1:
        return x_N
    if x_N.dtype != object:
        return np.asarray(multihost_utils.process_allgather(x_N, tiled=True))
    # Texts, which may be of another length elsewhere, or None: a byte that is no text.
    raw_N = np.array([_NO_TEXT if text is None else text.encode() for text in x_N])
    longest = int(of_processes(np.array([raw_N.dtype.itemsize], np.int32)).max())
    codes_NxM = raw_N.astype(f"S{longest}").view(np.uint8).reshape(len(raw_N), longest)
    gathered = of_processes(codes_NxM).view(f"S{longest}").ravel()
    return np.array([None if raw == _NO_TEXT else raw.decode() for raw in gathered], object)
