"""Scores of a merge result on every task. Outputs come first: corrections (Surgery) and scores are made from them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from taskvec.evaluation import scorers
from taskvec.evaluation.scorers import Scorer
from taskvec.modular.results import Merged
from taskvec.training.heads import Heads

Batch = dict[str, np.ndarray]


class Evaluation(NamedTuple):
    """Scores of T tasks.

    Attributes:
      accuracy: ``[T]`` float64; for labels that are numbers a correlation.
      correct: T arrays ``[N_t]``, bool (float where labels are numbers), in the order of the split's rows.
      outputs: T arrays ``[N_t, ...]`` of the scorer: features (float32, corrected where the result corrects them, not
        normalised) or texts.
    """

    accuracy: np.ndarray
    correct: list[np.ndarray]
    outputs: list[np.ndarray]


def accuracy(
    scorer: Scorer, outputs: Sequence[np.ndarray], labels: Sequence[np.ndarray]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Scores ``[T]`` and those of rows, T arrays ``[N_t]``, from outputs ``[N_t, ...]`` and labels ``[N_t]``."""
    correct = [scorer.score(t, z, y) for t, (z, y) in enumerate(zip(outputs, labels, strict=True))]
    return np.array([c.mean() for c in correct]), correct


def evaluate(
    apply_fn: Callable, merged: Merged, batches_per_task: Sequence[Iterable[Batch]], heads: Heads
) -> Evaluation:
    """Scores a static, task-conditioned or input-conditioned result under fixed heads.

    Args:
      apply_fn: ``(params, inputs) -> {"features": [B, d], ...}``.
      merged: from `taskvec.modular.results`.
      batches_per_task: T iterables of batches: inputs, ``label`` ``[B]`` and ``index`` ``[B]`` as in `scorers.by_row`.
        They are gone through once, a task after the other, and no batch is kept.
      heads: of the T tasks.

    Raises:
      ValueError: the number of tasks differs from that of the heads, or rows are missing.
    """
    return scored(scorers.of_heads(merged.apply_fn or apply_fn, heads), merged, batches_per_task)


def scored(scorer: Scorer, merged: Merged, batches_per_task: Sequence[Iterable[Batch]]) -> Evaluation:
    """The same by any scorer."""
    if len(batches_per_task) != scorer.tasks:
        raise ValueError(f"batches of {len(batches_per_task)} tasks but heads of {scorer.tasks}")
    outputs, labels = [], []
    for t, batches in enumerate(batches_per_task):
        seen: list[Batch] = []
        z = scorer.outputs(merged.params_for(t), _noting(batches, seen), None)
        index, label = (
            scorers.of_processes(np.concatenate([part[key] for part in seen])) for key in ("index", "label")
        )
        labels.append(label[index >= 0][np.argsort(index[index >= 0])])
        outputs.append(np.asarray(merged.features_for(t, z)))
    return Evaluation(*accuracy(scorer, outputs, labels), outputs)


def _noting(batches: Iterable[Batch], seen: list[Batch]) -> Iterator[Batch]:
    """The same batches, one by one: a test set of pictures may be larger than memory. What scores need is noted."""
    for batch in batches:
        seen.append({key: batch[key] for key in ("index", "label")})
        yield batch
