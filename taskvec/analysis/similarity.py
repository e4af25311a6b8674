"""How task vectors relate: norms, cosines, sign conflicts, tensor by tensor and summed up.

Everything is accumulated in float64 over blocks of rows, so models of any size can be compared. Cosines are those of
``G = tau tau^T``, the Gram matrix of the T task vectors, per tensor and summed over tensors.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from taskvec.transforms.base import ModelInfo
from taskvec.transforms.order import Difference, kth_magnitude_of

ENTRIES = 1 << 18  # of each model, read at once
CACHED = 1 << 13  # of them, compared at once: few enough to stay in the cache


@dataclasses.dataclass(frozen=True)
class Similarity:
    """Sums over the entries of some tensors; two of them add up.

    Attributes:
      entries: how many.
      theta0: squared norm of the pretrained weights.
      gram: ``[T, T]`` inner products of the task vectors.
      positive: ``[T + 1, T + 1]`` histogram: entries where n task vectors are positive and m negative, at ``[n, m]``.
    """

    entries: int
    theta0: float
    gram: np.ndarray
    positive: np.ndarray

    def __add__(self, other: "Similarity") -> "Similarity":
        return Similarity(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    @property
    def norms(self) -> np.ndarray:
        """``[T]`` norms of the task vectors."""
        return np.sqrt(np.diag(self.gram))

    @property
    def relative_norms(self) -> np.ndarray:
        """``[T]`` norms divided by that of the pretrained weights (infinite where these are zero)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.norms > 0, self.norms / np.sqrt(self.theta0), 0.0)

    @property
    def cosines(self) -> np.ndarray:
        """``[T, T]``; NaN for a task vector of zeros."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.gram / np.outer(self.norms, self.norms)

    @property
    def mean_cosine(self) -> float:
        """Mean over pairs of different task vectors that are not zero; NaN if there is none."""
        pairs = self.cosines[np.triu_indices(len(self.gram), 1)]
        pairs = pairs[np.isfinite(pairs)]
        return float(pairs.mean()) if pairs.size else float("nan")

    @property
    def conflict(self) -> float:
        """Fraction of all entries in which at least one task vector is positive and at least one negative."""
        return float(self.positive[1:, 1:].sum() / max(self.entries, 1))

    @property
    def agreement(self) -> float:
        """Mean over entries of ``|n+ - n-| / (n+ + n-)``, 1 where all are zero (TIES, arXiv 2306.01708, figure 4)."""
        plus, minus = np.indices(self.positive.shape)
        ratio = np.where(plus + minus > 0, np.abs(plus - minus) / np.maximum(plus + minus, 1), 1.0)
        return float((ratio * self.positive).sum() / max(self.entries, 1))

    @property
    def influence(self) -> np.ndarray:
        """``[T + 1]`` fractions of the entries that 0, 1, ..., T task vectors change."""
        plus, minus = np.indices(self.positive.shape)
        counts = np.bincount((plus + minus).ravel(), self.positive.ravel(), len(self.positive) * 2 - 1)
        return counts[: len(self.positive)] / max(self.entries, 1)


def zero(num_tasks: int) -> Similarity:
    """The empty sum."""
    square = (num_tasks + 1, num_tasks + 1)
    return Similarity(0, 0.0, np.zeros((num_tasks, num_tasks)), np.zeros(square, np.int64))


def compare(
    theta0: np.ndarray, finetuned: Sequence[np.ndarray], thresholds: Sequence[float] | None = None
) -> Similarity:
    """Compares T versions of a tensor with the pretrained one.

    Args:
      theta0: pretrained weights, of any shape and floating-point dtype.
      finetuned: T arrays of that shape.
      thresholds: a magnitude for each task; smaller entries count as zero in the signs (norms and cosines are of all).
    """
    total = zero(len(finetuned))
    flat0, flats = np.ravel(theta0), [np.ravel(x) for x in finetuned]
    weights = len(finetuned) + 1
    for at in range(0, flat0.size, CACHED):
        base = flat0[at : at + CACHED].astype(np.float64)
        tau = np.stack([x[at : at + CACHED].astype(np.float64) for x in flats]) - base
        kept = tau if thresholds is None else np.where(np.abs(tau) >= np.asarray(thresholds)[:, None], tau, 0.0)
        counts = (kept > 0).sum(0) * weights + (kept < 0).sum(0)
        histogram = np.bincount(counts, minlength=weights * weights).reshape(weights, weights)
        total += Similarity(base.size, float(base @ base), tau @ tau.T, histogram)
    return total


def stream(
    pretrained: Any,
    finetuned: Sequence[Any],
    names: Iterable[str],
    thresholds: Sequence[float] | None = None,
    on_tensor: Callable[[str], None] = lambda name: None,
) -> dict[str, Similarity]:
    """`compare` for tensors that readers give, by rows where they are large.

    Args:
      pretrained, finetuned: readers (``specs`` and ``read(name, rows)``).
      names: of the tensors.
      thresholds: as for `compare`.
      on_tensor: called after each.
    """
    found = {}
    for name in names:
        found[name] = zero(len(finetuned))
        for rows in blocks(pretrained.specs[name].shape):
            versions = [reader.read(name, rows) for reader in finetuned]
            found[name] += compare(pretrained.read(name, rows), versions, thresholds)
        on_tensor(name)
    return found


def trim_thresholds(pretrained: Any, finetuned: Sequence[Any], names: Sequence[str], density: float) -> list[float]:
    """For each task the magnitude that its largest ``int(n density)`` entries, of all n, reach: what TIES keeps.

    Read twice, see `taskvec.transforms.order`; exact for float32 differences.
    """
    info = ModelInfo(len(finetuned), sum(int(np.prod(pretrained.specs[name].shape)) for name in names), 0, 0)
    stats: tuple = ()
    for measure in kth_magnitude_of(lambda n: n + 1 - max(1, int(n * density)), "model"):
        total = 0
        for name in names:
            for rows in blocks(pretrained.specs[name].shape):
                base = pretrained.read(name, rows)
                total += measure.host([Difference(reader.read(name, rows), base) for reader in finetuned], stats)
        stats = (*stats, measure.finish(total, info, stats))
    return [float(magnitude) for magnitude in stats[-1]]


def blocks(shape: tuple[int, ...]) -> list[slice | None]:
    """Cuts of a tensor into blocks of rows of some `ENTRIES` entries."""
    if len(shape) < 2:
        return [None]
    step = max(1, ENTRIES // max(1, int(np.prod(shape[1:]))))
    return [slice(at, min(at + step, shape[0])) for at in range(0, shape[0], step)]


def by_group(found: Mapping[str, Similarity], groups: Mapping[str, str]) -> dict[str, Similarity]:
    """Sums the tensors of each group, in the order of `groups`."""
    summed: dict[str, Similarity] = {}
    for name, group in groups.items():
        summed[group] = summed[group] + found[name] if group in summed else found[name]
    return summed
