"""What a task is, checks that name the row at fault, and the choice of rows."""

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

log = logging.getLogger(__name__)


class Split(NamedTuple):
    """Rows with labels.

    Attributes:
      inputs: arrays with a leading row axis. Model-ready: ``{"ids": int32 [N, M], "mask": bool [N, M]}`` or
        ``{"image": uint8 [N, H, W, 3]}``. Before encoding: ``{"text": object [N]}`` or
        ``{"raw": uint8 [N, h, w]}``, also with a last axis of 3.
      labels: int32 ``[N]``.
    """

    inputs: dict[str, np.ndarray]
    labels: np.ndarray


class Task(NamedTuple):
    """A classification task; `held_out` are rows of the training set (choice of scale, inductive adaptation)."""

    name: str
    classes: tuple[str, ...]
    train: Split
    held_out: Split
    test: Split


SPLITS = ("train", "held_out", "test")


def take(split: Split, rows: np.ndarray) -> Split:
    """The given rows of a split."""
    return Split({key: array[rows] for key, array in split.inputs.items()}, split.labels[rows])


def task(name: str, classes: Iterable[Any], train: tuple[Any, Any], test: tuple[Any, Any], key: str) -> Task:
    """Makes a checked task with an empty `held_out` from ``(rows, labels)`` of the training and of the test set."""

    def split(rows, labels):
        rows = np.array(rows, object) if key == "text" else np.asarray(rows)
        return Split({key: rows}, np.asarray(labels, np.int32))

    train, test = split(*train), split(*test)
    made = Task(name, tuple(map(str, classes)), train, take(train, np.arange(0)), test)
    check(made, may_be_empty=("held_out",))
    return made


def check(task: Task, may_be_empty: tuple[str, ...] = ()) -> None:
    """Raises `ValueError`, naming task, split and row, if a task cannot be used.

    Checked: at least two classes; no empty split; as many labels as rows; every label in ``0..C-1``.
    """
    if len(task.classes) < 2:
        raise ValueError(f"task {task.name}: needs at least 2 classes, has {task.classes}")
    for which in SPLITS:
        inputs, labels = getattr(task, which)
        lengths = {key: len(array) for key, array in inputs.items()}
        if any(n != len(labels) for n in lengths.values()):
            raise ValueError(f"task {task.name}: {which} has {len(labels)} labels but rows {lengths}")
        if not len(labels) and which not in may_be_empty:
            raise ValueError(f"task {task.name}: {which} is empty; give it at least one row")
        bad = np.flatnonzero((labels < 0) | (labels >= len(task.classes)))
        if len(bad):
            raise ValueError(
                f"task {task.name}: {which} row {bad[0]} has label {labels[bad[0]]}, allowed 0 to "
                f"{len(task.classes) - 1} ({len(bad)} rows are out of range)"
            )


def subsample(task: Task, train: int, held_out: int, test: int, seed: int, test_seed: int = 0) -> Task:
    """Draws rows without replacement: `train` and `held_out` from the training rows, `test` from the test rows.

    Which training rows are used is a pure function of `seed`. The test rows do not depend on it, so that runs with
    different seeds are scored on the same rows; `test_seed` draws others. More rows asked give a superset. The training
    rows begin with one row of every class, because a head made from class means needs them.

    Raises:
      ValueError: more rows are asked than there are (test: `test` may exceed what there is, then all are used).
    """
    have = len(task.train.labels)
    if train + held_out > have:
        raise ValueError(
            f"task {task.name}: train={train} and held_out={held_out} ask for {train + held_out} rows, there are {have}"
        )
    if test > len(task.test.labels):
        log.warning("task %s: %d test rows asked, all %d are used", task.name, test, len(task.test.labels))
    rows = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(have)
    _, first = np.unique(task.train.labels[rows], return_index=True)
    rows = np.concatenate([rows[np.sort(first)], np.delete(rows, first)])
    test_rows = np.random.Generator(np.random.Philox(key=[test_seed, 1])).permutation(len(task.test.labels))
    drawn = task._replace(
        train=take(task.train, rows[:train]),
        held_out=take(task.train, rows[have - held_out :]),
        test=take(task.test, test_rows[:test]),
    )
    empty = len(task.classes) - len(np.unique(drawn.train.labels))
    if empty:
        log.warning("task %s: %d of %d classes have no training row", task.name, empty, len(task.classes))
    check(drawn, may_be_empty=() if held_out else ("held_out",))
    return drawn


def divide(labels: np.ndarray, test_fraction: float, groups: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The fixed split into training and test rows: stratified by label, groups kept whole, no seed.

    Args:
      labels: int ``[N]``.
      test_fraction: of every class, about this many rows go to the test set.
      groups: int ``[N]``; rows of one group (near copies, one speaker's turn, one film) never stand on both sides.
        A group counts for its most frequent label. Default: every row for itself.

    Returns:
      (train rows, test rows), each sorted.
    """
    names, labels = np.unique(np.asarray(labels), return_inverse=True)
    groups = np.arange(len(labels)) if groups is None else np.asarray(groups)
    members, group_of = np.unique(groups, return_inverse=True)
    counts_GxC = np.zeros((len(members), len(names)), int)
    np.add.at(counts_GxC, (group_of, labels), 1)
    sizes, label_of = counts_GxC.sum(1), counts_GxC.argmax(1)
    is_test = np.zeros(len(members), bool)
    rng = np.random.Generator(np.random.Philox(key=[0, 2]))
    for label in range(len(names)):
        order = rng.permutation(np.flatnonzero(label_of == label))
        filled = np.cumsum(sizes[order])
        is_test[order[filled <= test_fraction * sizes[order].sum()]] = True
    return np.flatnonzero(~is_test[group_of]), np.flatnonzero(is_test[group_of])


def unique_rows(keys: Iterable[Any], labels: Iterable[int]) -> np.ndarray:
    """Row numbers that are left when repeats go: the first of equal rows, none of equal rows whose labels disagree."""
    first: dict[Any, int] = {}
    seen: dict[Any, set[int]] = {}
    for row, (key, label) in enumerate(zip(keys, labels, strict=True)):
        first.setdefault(key, row)
        seen.setdefault(key, set()).add(label)
    return np.array([row for key, row in first.items() if len(seen[key]) == 1], int)


def drop_overlap(task: Task) -> Task:
    """Drops the test rows that also stand in the training set (before encoding); how many is logged."""
    (train,), (test,) = task.train.inputs.values(), task.test.inputs.values()
    key = (lambda row: row) if train.dtype == object else (lambda row: row.tobytes())
    known = set(map(key, train))
    kept = np.array([i for i, row in enumerate(test) if key(row) not in known], int)
    if len(kept) < len(test):
        log.warning("task %s: dropped %d test rows that stand in the training set", task.name, len(test) - len(kept))
    task = task._replace(test=take(task.test, kept))
    check(task, may_be_empty=("held_out",))
    return task
