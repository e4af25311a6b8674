"""Where rows of a benchmark that learn keep their state, so that a killed benchmark goes on within them.

A row that had ended gives what it gave. Everything lies under the folder of results, in ``rows``, until the whole
benchmark has ended.
"""

import contextlib
import functools
import json
import pathlib
import shutil
import time
from collections.abc import Iterator

import jax

from experiments import keys
from experiments.prepare import Bench
from taskvec.io.atomic import write_text
from taskvec.io.checkpoints import Checkpoint

SECONDS = 300.0  # between two checkpoints of a row; the state of a mask is as large as three models


class Seed:
    """The rows of a seed. Their folders are named by all that they depend on: no other row would take one."""

    def __init__(self, workdir: pathlib.Path, bench: Bench):
        self._workdir, self._bench = workdir, bench

    @functools.cached_property
    def _folder(self) -> pathlib.Path:
        return self._workdir / "rows" / f"seed{self._bench.seed}-{keys.of_bench(self._bench)}"

    def folder(self, label: str) -> pathlib.Path | None:
        """Where a row keeps its state; nowhere in one of several processes, each of which learns all of it."""
        return self._folder / label if jax.process_count() == 1 else None


class Row:
    """One row.

    Attributes:
      checkpoint: of its fits; None where nothing is kept.
    """

    def __init__(self, folder: pathlib.Path | None):
        self._clock, self._start, self.checkpoint = None, time.perf_counter(), None
        if folder is not None:
            self.checkpoint = Checkpoint(folder, every=1, keep=1, seconds=SECONDS, on_save=self._note)
            self._clock = folder / "seconds.json"
            if self._clock.is_file():
                self._start -= json.loads(self._clock.read_text(encoding="utf-8"))

    @property
    def seconds(self) -> float:
        """Since it began; of a killed run those up to its last checkpoint."""
        return time.perf_counter() - self._start

    def _note(self) -> None:
        write_text(self._clock, json.dumps(self.seconds))


@contextlib.contextmanager
def row(folder: pathlib.Path | None) -> Iterator[Row]:
    """The row that keeps its state in a folder, and its checkpoint open as long."""
    made = Row(folder)
    try:
        yield made
    finally:
        if made.checkpoint is not None:
            made.checkpoint.close()


def forget(workdir: pathlib.Path) -> None:
    """Deletes what all rows kept."""
    shutil.rmtree(workdir / "rows", ignore_errors=True)
