"""What a task is, checks that name the row at fault, and the choice of rows."""

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from taskvec.data.lazy import Images

log = logging.getLogger(__name__)


class Split(NamedTuple):
    """Rows with labels.

    Attributes:
      inputs: arrays with a leading row axis. Model-ready: ``{"ids": int32 [N, M], "mask": bool [N, M]}`` (see
        `text.encode`) or ``{"image": uint8 [N, H, W, 3]}``. Before encoding: ``{"text": object [N]}`` (``[N, 2]``
        for pairs) or ``{"raw": uint8 [N, h, w]}``, also with a last axis of 3. Images may be `lazy.Images` instead of
        arrays.
      labels: int32 ``[N]``; float32 ``[N]`` for a regression task.
    """

    inputs: dict[str, np.ndarray | Images]
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
    some = lambda array: array.take(rows) if isinstance(array, Images) else array[rows]
    return Split({key: some(array) for key, array in split.inputs.items()}, split.labels[rows])


def task(name: str, classes: Iterable[Any], train: tuple[Any, Any], test: tuple[Any, Any], key: str) -> Task:
    """Makes a checked task with an empty `held_out` from ``(rows, labels)`` of the training and of the test set."""

    def split(rows, labels):
        if not isinstance(rows, Images):
            rows = np.array(rows, object) if key == "text" else np.asarray(rows)
        labels = np.asarray(labels)
        return Split({key: rows}, labels.astype(np.float32 if labels.dtype.kind == "f" else np.int32))

    train, test = split(*train), split(*test)
    made = Task(name, tuple(map(str, classes)), train, take(train, np.arange(0)), test)
    check(made, may_be_empty=("held_out",))
    return made


def check(task: Task, may_be_empty: tuple[str, ...] = ()) -> None:
    """Raises `ValueError`, naming task, split and row, if a task cannot be used.

    Checked: at least two classes; no empty split; as many labels as rows; every label in ``0..C-1``. Regression tasks
    (float labels) need no classes, and finite labels.
    """
    if len(task.classes) < 2 and task.train.labels.dtype.kind != "f":
        raise ValueError(f"task {task.name}: needs at least 2 classes, has {task.classes}")
    for which in SPLITS:
        inputs, labels = getattr(task, which)
        lengths = {key: len(array) for key, array in inputs.items()}
        if any(n != len(labels) for n in lengths.values()):
            raise ValueError(f"task {task.name}: {which} has {len(labels)} labels but rows {lengths}")
        if not len(labels) and which not in may_be_empty:
            raise ValueError(f"task {task.name}: {which} is empty; give it at least one row")
        if labels.dtype.kind == "f":
            if not np.isfinite(labels).all():
                raise ValueError(
                    f"task {task.name}: {which} row {np.flatnonzero(~np.isfinite(labels))[0]} has no number"
                )
            continue
        bad = np.flatnonzero((labels < 0) | (labels >= len(task.classes)))
        if len(bad):
            raise ValueError(
                f"task {task.name}: {which} row {bad[0]} has label {labels[bad[0]]}, allowed 0 to "
                f"{len(task.classes) - 1} ({len(bad)} rows are out of range)"
            )


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Class names sorted: as numbers if all are whole numbers, else as strings, as torchvision sorts them always.

    Folders 0 to 42 (GTSRB's) are so in the order of lists of class names, and not 0, 1, 10, 11.
    """
    names = sorted(names)
    return tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else names)


def subsample(
    task: Task,
    train: int | None,
    held_out: int | None,
    test: int | None,
    seed: int,
    test_seed: int = 0,
    validation: tuple[float, int | None] = (0.1, 5000),
    apart: bool = True,
) -> Task:
    """Draws rows without replacement: `train` and `held_out` from the training rows, `test` from the test rows.

    Which training rows are used is a pure function of `seed`. The test rows do not depend on it, so that runs with
    different seeds are scored on the same rows; `test_seed` draws others. More rows asked give a superset. The training
    rows begin with one row of every class, because a head made from class means needs them.

    None stands for the published protocol: `test` all rows; `held_out` the task's own validation rows if it has some,
    else `validation_rows` with the given fraction and limit, whatever the seed; `train` all training rows left, or, if
    these are not kept `apart`, all training rows.

    Raises:
      ValueError: more rows are asked than there are (test: `test` may exceed what there is, then all are used).
    """
    if held_out is None:
        if not len(task.held_out.labels):
            rest, own = validation_rows(len(task.train.labels), *validation)
            task = task._replace(train=take(task.train, rest) if apart else task.train, held_out=take(task.train, own))
        kept = task.held_out
        drawn = subsample(task._replace(held_out=take(kept, np.arange(0))), train, 0, test, seed, test_seed)
        return drawn._replace(held_out=kept)
    have = len(task.train.labels)
    if train is None and held_out >= have:
        raise ValueError(
            f"task {task.name}: held_out={held_out} leaves none of {have} training rows to train on; allowed 0 to "
            f"{have - 1}"
        )
    train = have - held_out if train is None else train
    test = len(task.test.labels) if test is None else test
    if train + held_out > have:
        raise ValueError(
            f"task {task.name}: train={train} and held_out={held_out} ask for {train + held_out} rows, there are {have}"
        )
    if test > len(task.test.labels):
        log.warning("task %s: %d test rows asked, all %d are used", task.name, test, len(task.test.labels))
    rows = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(have)
    regression = task.train.labels.dtype.kind == "f"
    first = np.arange(0) if regression else np.unique(task.train.labels[rows], return_index=True)[1]
    rows = np.concatenate([rows[np.sort(first)], np.delete(rows, first)])
    test_rows = np.random.Generator(np.random.Philox(key=[test_seed, 1])).permutation(len(task.test.labels))
    drawn = task._replace(
        train=take(task.train, rows[:train]),
        held_out=take(task.train, rows[have - held_out :]),
        test=take(task.test, test_rows[:test]),
    )
    empty = len(task.classes) - len(np.unique(drawn.train.labels))
    if empty > 0 and not regression:
        log.warning("task %s: %d of %d classes have no training row", task.name, empty, len(task.classes))
    check(drawn, may_be_empty=() if held_out else ("held_out",))
    return drawn


def validation_rows(n: int, fraction: float = 0.1, most: int | None = 5000, seed: int = 0) -> tuple:
    """The published split of N training rows: ``(training rows, validation rows)``, the same rows as in PyTorch.

    task_vectors and its descendants draw ``random_split`` with seed 0, 10 % and at most 5000 rows; FusionBench the same
    without the limit. Their permutation: row i changes places with row ``i + u_i mod (N - i)``, u from the 32-bit
    Mersenne twister. With 60,000 rows it begins with 36044, as task_vectors asserts for MNIST.
    """
    size = int(n * fraction) if most is None else min(int(n * fraction), most)
    bits = np.random.MT19937()
    bits._legacy_seeding(seed)
    order, draws = list(range(n)), bits.random_raw(n).tolist() if n else []
    for i in range(n - 1):
        j = i + draws[i] % (n - i)
        order[i], order[j] = order[j], order[i]
    return np.array(order[: n - size], int), np.array(order[n - size :], int)


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
    if isinstance(train, Images):
        return task  # rows of files are what they are
    key = (lambda row: row if isinstance(row, str) else tuple(row)) if train.dtype == object else np.ndarray.tobytes
    known = set(map(key, train))
    kept = np.array([i for i, row in enumerate(test) if key(row) not in known], int)
    if len(kept) < len(test):
        log.warning("task %s: dropped %d test rows that stand in the training set", task.name, len(test) - len(kept))
    task = task._replace(test=take(task.test, kept))
    check(task, may_be_empty=("held_out",))
    return task
