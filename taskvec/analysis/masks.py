"""What masks of a task-conditioned merge look like: how dense, how much they overlap, how many tasks use an entry."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from taskvec import tree as trees
from taskvec.merging.results import PerTask
from taskvec.transforms.stored import Masked


@dataclasses.dataclass(frozen=True)
class MaskStatistics:
    """Counts over all masks of a model.

    Attributes:
      entries: how many entries a mask has.
      density: ``{per-layer path: [T]}``, fraction of the tensor's entries that a task uses.
      by_depth: ``{block index, -1 outside the blocks: [T]}``, the same over all tensors of a block.
      common: ``[T, T]``, entries that two tasks both use (on the diagonal, that a task uses).
      used_by: ``[T + 1]``, entries that 0 (catastrophic), 1 (selfish), 2 and more (general) tasks use.
    """

    entries: int
    density: Mapping[str, np.ndarray]
    by_depth: Mapping[int, np.ndarray]
    common: np.ndarray
    used_by: np.ndarray

    @property
    def overlap(self) -> np.ndarray:
        """``[T, T]`` of ``|A and B| / min(|A|, |B|)``; NaN where a mask is empty."""
        used = np.diag(self.common)
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.common / np.minimum(used[:, None], used[None])

    @property
    def iou(self) -> np.ndarray:
        """``[T, T]`` of ``|A and B| / |A or B|``; NaN where both masks are empty."""
        used = np.diag(self.common)
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.common / (used[:, None] + used[None] - self.common)

    @property
    def fractions(self) -> dict[str, float]:
        """Of catastrophic, selfish and general entries (TALL-masks, arXiv 2405.07813, section 5)."""
        zero, one, more = self.used_by[0], self.used_by[1], self.used_by[2:].sum()
        return {name: float(n / self.entries) for name, n in zip(_KINDS, (zero, one, more), strict=True)}


_KINDS = ("catastrophic", "selfish", "general")
_BLOCK = 1 << 20  # entries counted at once: exact in float32


def mask_statistics(result: PerTask) -> MaskStatistics:
    """Goes through the masks of a result, tensor by tensor.

    Raises:
      ValueError: a tensor of the result is not stored as a mask.
    """
    tasks = result.num_tasks
    density: dict[str, np.ndarray] = {}
    of_depth: dict[int, list] = {}
    common, used_by = np.zeros((tasks, tasks)), np.zeros(tasks + 1, np.int64)
    for path, stored in result.stored.items():
        if not isinstance(stored, Masked):
            raise ValueError(f"{path} is stored as {type(stored).__name__}, not as a mask")
        for name, masks in _masks(path, stored):
            used = masks.sum(1)
            density[name] = used / masks.shape[1]
            depth = trees.depth(name)
            of_depth.setdefault(-1 if depth is None else depth, []).append((used, masks.shape[1]))
            for at in range(0, masks.shape[1], _BLOCK):
                block = masks[:, at : at + _BLOCK]
                floats = block.astype(np.float32)
                common += floats @ floats.T
                used_by += np.bincount(block.sum(0), minlength=tasks + 1)
    by_depth = {depth: sum(u for u, _ in of) / sum(n for _, n in of) for depth, of in sorted(of_depth.items())}
    return MaskStatistics(int(used_by.sum()), density, by_depth, common, used_by)


def _masks(path: str, stored: Masked):
    """Pairs of per-layer path and boolean masks ``[T, entries]``."""
    if trees.is_stacked(path):
        layers = [(trees.layer_path(path, i), np.asarray(stored.mask[i])) for i in range(stored.mask.shape[0])]
        entries = stored.merged[0].size
    else:
        layers, entries = [(path, np.asarray(stored.mask))], stored.merged.size
    for name, packed in layers:  # [rows, T, bytes]
        bits = np.unpackbits(packed, axis=-1, count=entries // packed.shape[0])
        yield name, np.moveaxis(bits, 1, 0).reshape(bits.shape[1], -1).astype(bool)
