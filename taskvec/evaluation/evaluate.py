"""Accuracy of a merge result on every task. Features come first: heads, Surgery and scores are made from them."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from taskvec.modular.results import Merged
from taskvec.training import heads as heads_lib
from taskvec.training.heads import Heads
from taskvec.tree import Tree

Array = jax.Array
Batch = dict[str, np.ndarray]

_NOT_INPUTS = ("label", "weight", "index")


class Evaluation(NamedTuple):
    """Scores of T tasks.

    Attributes:
      accuracy: ``[T]`` float64.
      correct: T bool arrays ``[N_t]``, in the order of the split's rows.
      features: T float32 arrays ``[N_t, d]``, corrected where the result corrects them; not normalised.
    """

    accuracy: np.ndarray
    correct: list[np.ndarray]
    features: list[np.ndarray]


@functools.partial(jax.jit, static_argnums=0)
def _features(apply_fn: Callable, params: Tree, inputs: Batch) -> Array:
    return apply_fn(params, inputs)["features"]


def encode(apply_fn: Callable, params: Tree, batches: Iterable[Batch], num_rows: int) -> np.ndarray:
    """Features of a split in the order of its rows, ``[N, d]`` float32.

    The compiled forward pass is kept for `apply_fn`, so that further weights and tasks of equal shapes compile nothing.

    Args:
      apply_fn: ``(params, inputs) -> {"features": [B, d], ...}``.
      params: weights.
      batches: inputs with ``index`` ``[B]``, the row in the split or -1 for padding.
      num_rows: N.

    Raises:
      ValueError: rows are missing or occur twice.
    """
    parts, index = [], [np.zeros(0, np.int32)]
    for batch in batches:
        inputs = {key: x for key, x in batch.items() if key not in _NOT_INPUTS}
        parts.append(_features(apply_fn, params, inputs))
        index.append(batch["index"])
    index = np.concatenate(index)
    rows = np.flatnonzero(index >= 0)
    if not np.array_equal(np.sort(index[rows]), np.arange(num_rows)):
        raise ValueError(
            f"batches must hold each of {num_rows} rows once, found {len(rows)} (an iterator is used up after one pass)"
        )
    return np.concatenate([np.asarray(part, np.float32) for part in parts])[rows[np.argsort(index[rows])]]


def accuracy(
    heads: Heads, features: Sequence[np.ndarray], labels: Sequence[np.ndarray]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Accuracy ``[T]`` and correctness, T bool arrays ``[N_t]``, from features ``[N_t, d]`` and labels ``[N_t]``."""
    correct = []
    for t, (z, y) in enumerate(zip(features, labels, strict=True)):
        logits = heads_lib.logits(heads.kernel[t], heads.class_mask[t], heads.scale, z)
        correct.append(np.asarray(logits.argmax(-1)) == np.asarray(y))
    return np.array([c.mean() for c in correct]), correct


def evaluate(
    apply_fn: Callable, merged: Merged, batches_per_task: Sequence[Iterable[Batch]], heads: Heads
) -> Evaluation:
    """Scores a static, task-conditioned or input-conditioned result.

    Args:
      apply_fn: ``(params, inputs) -> {"features": [B, d], ...}``.
      merged: from `taskvec.modular.results`.
      batches_per_task: T iterables of batches: inputs, ``label`` ``[B]`` and ``index`` ``[B]`` as in `encode`.
      heads: of the T tasks.

    Raises:
      ValueError: the number of tasks differs from that of the heads, or rows are missing.
    """
    if len(batches_per_task) != heads.kernel.shape[0]:
        raise ValueError(f"batches of {len(batches_per_task)} tasks but heads of {heads.kernel.shape[0]}")
    features, labels = [], []
    for t, batches in enumerate(batches_per_task):
        batches = list(batches)
        index = np.concatenate([batch["index"] for batch in batches])
        label = np.concatenate([batch["label"] for batch in batches])
        labels.append(label[index >= 0][np.argsort(index[index >= 0])])
        z = encode(apply_fn, merged.params_for(t), batches, len(labels[t]))
        features.append(np.asarray(merged.features_for(t, z), np.float32))
    return Evaluation(*accuracy(heads, features, labels), features)
