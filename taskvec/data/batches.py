"""Batches as pure functions of (rows, seed, step), so that a run resumes exactly and two runs see the same rows.

Token rows are padded to the longest of their batch rounded up to `length_multiple`: few shapes, few compilations.
Images pass unchanged; encoded ones (`lazy.Images`) are decoded in threads. A step's batch is made when it is asked
for, or a little ahead of it (`prefetched`). Of several processes each takes its part of every batch. All is numpy.
"""

import concurrent.futures
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from taskvec.data.base import Split
from taskvec.data.lazy import Images

Batch = dict[str, np.ndarray]


def training_batches(
    split: Split,
    batch_size: int,
    steps: int,
    seed: int,
    length_multiple: int = 16,
    window: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> Callable[[int], Batch]:
    """Returns step -> batch: ``{"ids", "mask"}`` or ``{"image"}``, and ``"label"`` int32 ``[B]``.

    Rows are shuffled anew every epoch; the ``N mod B`` rows left over by whole batches are dropped, others each epoch.

    Args:
      split: N rows.
      batch_size: B, at most N.
      steps: number of batches; asking for another step raises `IndexError`.
      seed: with the epoch, keys the shuffle.
      length_multiple: token lengths are rounded up to a multiple of this.
      window: sorts rows by length within every `window` batches, so that a batch pads little. Above 1 batches are
        no longer uniform samples and lengths change often from step to step.
      process_index, process_count: this process gets rows ``[p B / P, (p + 1) B / P)`` of every batch of B, padded as
        the whole batch is; the union over processes is the batch of one process.
    """
    _check_processes(batch_size, process_index, process_count)
    n = _at_most(batch_size, len(split.labels), "batch_size")
    per_epoch = n // batch_size
    lengths = _lengths(split)

    @functools.lru_cache(maxsize=1)  # the shuffle of the epoch last asked for
    def order(epoch: int) -> np.ndarray:
        rng = _generator(seed, epoch)
        rows_SxB = rng.permutation(n)[: per_epoch * batch_size].reshape(per_epoch, batch_size)
        if window > 1 and lengths is not None:
            for at in range(0, per_epoch, window):
                block = rows_SxB[at : at + window]
                by_length = block.ravel()[np.argsort(lengths[block.ravel()], kind="stable")].reshape(block.shape)
                rows_SxB[at : at + window] = by_length[rng.permutation(len(block))]
        return rows_SxB

    def batch(step: int) -> Batch:
        _check_step(step, steps)
        epoch, at = divmod(step, per_epoch)
        rows = order(epoch)[at]
        part = rows.reshape(process_count, -1)[process_index]
        width = int(lengths[rows].max()) if lengths is not None else None
        return _collate(split, part, length_multiple, width, (seed, epoch))

    return batch


def prefetched(batch: Callable[[int], Batch], steps: int, ahead: int = 2) -> Callable[[int], Batch]:
    """The same function of the step; while one batch is used, the next `ahead` are made in a thread.

    An error in making a batch is raised when that batch is asked for.
    """
    pool = concurrent.futures.ThreadPoolExecutor(1, "batches")
    made: dict[int, concurrent.futures.Future] = {}

    def get(step: int) -> Batch:
        _check_step(step, steps)
        for wanted in range(step, min(step + ahead + 1, steps)):
            if wanted not in made:
                made[wanted] = pool.submit(batch, wanted)
        for old in [s for s in made if not step <= s <= step + ahead]:
            made.pop(old).cancel()
        return made.pop(step).result()

    return get


def eval_batches(
    split: Split, batch_size: int, length_multiple: int = 16, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Yields every row once, sorted by length, all batches of `batch_size` rows, the next ones made while one is used.

    Besides inputs and ``"label"`` a batch has ``"weight"`` float32 ``[B]`` (1 for a row, 0 for padding) and ``"index"``
    int32 ``[B]`` (row number in the split, -1 for padding). The last batch is padded with repeats of its first row.

    Of several processes each gets its part of every batch, as in `training_batches`: all get as many batches, of equal
    shapes, and together they hold every row once (`taskvec.evaluation.scorers.by_row` puts them together).
    """
    _check_processes(batch_size, process_index, process_count)
    n, lengths = len(split.labels), _lengths(split)
    order = np.arange(n) if lengths is None else np.argsort(lengths, kind="stable")

    def batch(step: int) -> Batch:
        rows = order[step * batch_size :][:batch_size]
        index = np.full(batch_size, -1, np.int32)
        index[: len(rows)] = rows
        index = index.reshape(process_count, -1)[process_index]
        width = int(lengths[rows].max()) if lengths is not None else None
        made = _collate(split, np.where(index < 0, rows[0], index), length_multiple, width)
        return made | {"weight": (index >= 0).astype(np.float32), "index": index}

    steps = -(-n // batch_size)
    yield from map(prefetched(batch, steps), range(steps))


def take(split: Split, rows: np.ndarray) -> Batch:
    """Inputs of given rows, without labels; tokens are cut to the longest of them."""
    return _rows(split, rows)


def join(parts: Sequence[Batch], length_multiple: int = 16) -> Batch:
    """One batch of several, in their order; token rows are padded to one length."""
    width = max((x["mask"].shape[1] for x in parts if "mask" in x), default=0)
    padded = [_pad(x, round_up(width, length_multiple)) for x in parts]
    return {key: np.concatenate([x[key] for x in padded]) for key in padded[0]}


def _generator(seed: int, epoch: int) -> np.random.Generator:
    """A stream of its own for every seed and epoch: Philox takes them as key."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 1]))


def _lengths(split: Split) -> np.ndarray | None:
    return split.inputs["mask"].sum(1) if "mask" in split.inputs else None


def _rows(split: Split, rows: np.ndarray, width: int | None = None, draw: tuple[int, int] = (0, 0)) -> Batch:
    """Inputs of some rows, tokens cut to `width` or to the longest of them; targets (text to text) stay whole."""
    read = lambda array: array.read(rows, *draw) if isinstance(array, Images) else array[rows]
    inputs = {key: read(array) for key, array in split.inputs.items()}
    if "mask" in inputs:
        width = int(inputs["mask"].sum(1).max()) if width is None else width
        inputs = {key: array[:, :width] if _is_text(key) else array for key, array in inputs.items()}
    return inputs


def _is_text(key: str) -> bool:
    return not key.startswith("target")


def _pad(inputs: Batch, width: int) -> Batch:
    if "mask" not in inputs:
        return inputs
    pad = lambda array: np.pad(array, ((0, 0), (0, width - array.shape[1])))
    return {key: pad(array) if _is_text(key) else array for key, array in inputs.items()}


def _collate(split: Split, rows: np.ndarray, length_multiple: int, width=None, draw=(0, 0)) -> Batch:
    inputs = _rows(split, rows, width, draw)
    width = round_up(inputs["mask"].shape[1], length_multiple) if "mask" in inputs else 0
    return _pad(inputs, width) | {"label": split.labels[rows]}


def round_up(length: int, multiple: int = 16) -> int:
    """The width of a batch whose longest text has `length` tokens."""
    return -(-length // multiple) * multiple


def _at_most(asked: int, n: int, what: str) -> int:
    if not 1 <= asked <= n:
        raise ValueError(f"{what}={asked}, but there are {n} rows; allowed 1 to {n}")
    return n


def _check_processes(batch_size: int, index: int, count: int) -> None:
    if count < 1 or not 0 <= index < count:
        raise ValueError(f"process_index={index}, process_count={count}: want 0 <= index < count")
    if batch_size % count:
        raise ValueError(f"batch_size={batch_size} is not divisible by process_count={count}")


def _check_step(step: int, steps: int) -> None:
    if not 0 <= step < steps:
        raise IndexError(f"step {step} of {steps} steps")
