"""The rows a method may look at, and in which order it sees them.

Whoever starts a method decides what it gets: unlabelled test rows (transductive), unlabelled held-out rows (inductive),
a few labelled rows. A method draws batches from them by the functions here, pure functions of (seed, step).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Batch = dict[str, np.ndarray]


class Rows(NamedTuple):
    """Rows of S tasks (or sets: a target and a control).

    Attributes:
      counts: number of rows of every task.
      take: ``(task, numbers of rows [B]) -> inputs``, arrays with a leading axis of B rows.
      join: makes one batch of several; by default concatenates, with tokens padded to the longest.
      labels: int arrays ``[N_t]``; ``None`` where a method may not see any.
      targets: dicts of arrays ``[N_t, ...]`` that go with the rows, such as what the experts give (`with_targets`).
    """

    counts: tuple[int, ...]
    take: Callable[[int, np.ndarray], Batch]
    join: Callable[[Sequence[Batch]], Batch] | None = None
    labels: Sequence[np.ndarray] | None = None
    targets: Sequence[Mapping[str, np.ndarray]] | None = None

    def only(self, tasks: Sequence[int]) -> "Rows":
        """The rows of some of the tasks, in that order."""
        some = lambda values: None if values is None else [values[t] for t in tasks]
        return self._replace(
            counts=tuple(self.counts[t] for t in tasks),
            take=lambda s, numbers: self.take(tasks[s], numbers),
            labels=some(self.labels),
            targets=some(self.targets),
        )

    def batch(self, numbers: Sequence[np.ndarray], tasks: Sequence[int] | None = None) -> Batch:
        """One batch of given rows: inputs, ``label`` and targets if there are, and ``tasks`` int32 ``[S]`` if given."""
        tasks_ = range(len(self.counts)) if tasks is None else tasks
        pairs = list(zip(tasks_, numbers, strict=True))
        out = (self.join or joined)([self.take(t, rows) for t, rows in pairs])
        if self.labels is not None:
            out["label"] = np.concatenate([self.labels[t][rows] for t, rows in pairs])
        if self.targets is not None:
            for name in self.targets[0]:
                out[f"target_{name}"] = np.concatenate([self.targets[t][name][rows] for t, rows in pairs])
        return out if tasks is None else out | {"tasks": np.array(list(tasks), np.int32)}


def arrays(inputs: Sequence[Mapping[str, np.ndarray]], labels: Sequence[np.ndarray] | None = None) -> Rows:
    """Rows from arrays in memory, one dict a task."""
    counts = tuple(len(next(iter(each.values()))) for each in inputs)
    return Rows(counts, lambda t, rows: {name: x[rows] for name, x in inputs[t].items()}, None, labels)


def joined(parts: Sequence[Batch]) -> Batch:
    """Concatenates rows; those of tokens ``[B, N]`` are padded with zeros to the longest."""

    def one(name: str) -> np.ndarray:
        each = [part[name] for part in parts]
        if each[0].ndim == 2:
            width = max(x.shape[1] for x in each)
            each = [np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in each]
        return np.concatenate(each)

    return {name: one(name) for name in parts[0]}


def together(rows: Rows, per_task: int, seed: int = 0) -> Callable[[int], Batch]:
    """``step -> batch`` of `per_task` rows of every task, drawn anew in every step, without replacement within it.

    AdaMerging's (arXiv 2310.02575). A task with fewer rows gives some of them twice.
    """
    _check(rows, per_task)

    def batch(step: int) -> Batch:
        rng = generator("together", seed, step)
        return rows.batch([_draw(rng, n, per_task) for n in rows.counts])

    return batch


def cyclic(rows: Rows, per_task: int, seed: int = 0) -> Callable[[int], Batch]:
    """``step -> batch`` of `per_task` rows of every task, each task going through its own rows epoch by epoch.

    What is left over at the end of an epoch begins the next, so that all batches have one shape (FusionBench's infinite
    loaders make a shorter one of it).
    """
    _check(rows, per_task)

    def take(t: int, step: int) -> np.ndarray:
        n, at = rows.counts[t], np.arange(step * per_task, (step + 1) * per_task)
        orders = {epoch: generator("cyclic", seed, epoch, t).permutation(n) for epoch in np.unique(at // n)}
        return np.array([orders[epoch][i] for epoch, i in zip(at // n, at % n, strict=True)])

    return lambda step: rows.batch([take(t, step) for t in range(len(rows.counts))])


def in_turn(rows: Rows, per_task: int, seed: int = 0) -> Callable[[int], Batch]:
    """``step -> batch`` of one task, ``tasks`` ``[1]``: rounds over all tasks, each in a random order.

    As Model Tinting's released code and online adaptation do (SyMerge's, arXiv 2412.19098, goes through the rows of a
    task in epochs); rows are drawn anew in every step, and steps count batches of one task.
    """
    _check(rows, per_task)
    num_tasks = len(rows.counts)

    def batch(step: int) -> Batch:
        round_, at = divmod(step, num_tasks)
        task = int(generator("order", seed, round_).permutation(num_tasks)[at])
        return rows.batch([_draw(generator("in turn", seed, step), rows.counts[task], per_task)], [task])

    return batch


def zipped(rows: Rows, per_task: int, seed: int = 0) -> tuple[Callable[[int], Batch], int]:
    """Epochs as long as the smallest task, `per_task` rows of every task a step; also gives their number of steps.

    Every epoch shuffles all tasks anew, and of the larger ones sees only a part (aTLAS, arXiv 2407.02880). What does
    not fill a batch is left out; a task with fewer rows than a batch has gives some of them twice.
    """
    _check(rows, per_task)
    length = max(min(rows.counts) // per_task, 1)

    def take(t: int, epoch: int, at: int) -> np.ndarray:
        order = generator("zipped", seed, epoch, t).permutation(rows.counts[t])
        return np.resize(order, max(len(order), per_task))[at * per_task : (at + 1) * per_task]

    def batch(step: int) -> Batch:
        epoch, at = divmod(step, length)
        return rows.batch([take(t, epoch, at) for t in range(len(rows.counts))])

    return batch, length


def repeated(rows: Rows, times: int) -> Rows:
    """The same rows `times` times over, so that an epoch has more batches."""
    take, counts = rows.take, rows.counts
    again = lambda values: [np.concatenate([x] * times) for x in values]
    return rows._replace(
        counts=tuple(times * n for n in counts),
        take=lambda t, numbers: take(t, numbers % counts[t]),
        labels=None if rows.labels is None else again(rows.labels),
        targets=None
        if rows.targets is None
        else [dict(zip(each, again(each.values()), strict=True)) for each in rows.targets],
    )


def chosen(rows: Rows, numbers: Sequence[np.ndarray]) -> Rows:
    """Some rows of every task, by their numbers."""
    take = rows.take
    return rows._replace(
        counts=tuple(len(n) for n in numbers),
        take=lambda t, some: take(t, numbers[t][some]),
        labels=None if rows.labels is None else [x[n] for x, n in zip(rows.labels, numbers, strict=True)],
        targets=None
        if rows.targets is None
        else [{k: x[n] for k, x in each.items()} for each, n in zip(rows.targets, numbers, strict=True)],
    )


SECOND = "second_"


def has_views(rows: Rows) -> bool:
    """Whether inputs hold two views of every row (see `views`)."""
    return any(name.startswith(SECOND) for name in rows.take(0, np.zeros(1, int)))


def views(rows: Rows) -> Rows:
    """Rows that come in twos: of every task first the B first views, then the B second ones.

    The inputs that `rows.take` gives hold both: ``x`` and ``second_x``, ``ids`` and ``second_ids``, ...: a strongly
    augmented view, the other text of a pair. Labels and targets stay B a task.

    Raises:
      ValueError: there are no second views, or they have other names than the first.
    """

    def take(t: int, numbers: np.ndarray) -> Batch:
        inputs = rows.take(t, numbers)
        second = {name.removeprefix(SECOND): x for name, x in inputs.items() if name.startswith(SECOND)}
        first = {name: x for name, x in inputs.items() if not name.startswith(SECOND)}
        if first.keys() != second.keys():
            raise ValueError(f"two views need inputs NAME and {SECOND}NAME for every NAME, found {sorted(inputs)}")
        return joined([first, second])  # plainly: what `rows.join` makes (packed texts) could not be joined again

    return rows._replace(take=take)


def whole(rows: Rows, batch_size: int, task: int) -> Iterator[Batch]:
    """All rows of one task in order, in batches of one shape: the last is filled with repeats of its first row."""
    for at in range(0, rows.counts[task], batch_size):
        numbers = np.arange(at, min(at + batch_size, rows.counts[task]))
        numbers = np.concatenate([numbers, np.full(batch_size - len(numbers), at)])
        yield rows._replace(labels=None, targets=None).batch([numbers], [task])


def split_tasks(rows: Array, num_tasks: int) -> Array:
    """``[T * B, ...] -> [T, B, ...]``; raises `ValueError` if the rows do not divide."""
    if rows.shape[0] % num_tasks:
        raise ValueError(f"a batch of {rows.shape[0]} rows does not divide among {num_tasks} tasks")
    return jnp.reshape(rows, (num_tasks, -1, *rows.shape[1:]))


_STREAMS = ("together", "cyclic", "in turn", "order", "zipped", "shots", "trusted", "choice")


def generator(stream: str, seed: int, *numbers: Any) -> np.random.Generator:
    """A stream of its own for every (purpose, seed, numbers)."""
    return np.random.default_rng([seed, _STREAMS.index(stream), *map(int, numbers)])


def _draw(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    if size <= count:
        return rng.choice(count, size, replace=False)
    return np.concatenate([rng.permutation(count) for _ in range(-(-size // count))])[:size]


def _check(rows: Rows, per_task: int) -> None:
    if per_task < 1 or not all(rows.counts):
        raise ValueError(f"{per_task} rows a task of tasks with {rows.counts} rows: each must be at least 1")
