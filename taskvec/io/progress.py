"""Progress on the terminal for anything that takes more than a few seconds."""

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)
LINE_SECONDS = 60.0  # between two lines of a log


@contextlib.contextmanager
def bar(what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Shows a bar with elapsed and remaining time; yields ``update(done, note="", total=None)``.

    A total that is known only later comes by the first update; ``None`` for `done` leaves that as it is.

    Where standard error is no terminal (a log file), lines are printed instead: by the first update after every minute,
    and at the end.
    """
    if not console.is_terminal:
        lines = _Lines(what, total)
        try:
            yield lines.update
        finally:
            lines.show()
        return
    columns = [
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        task = progress.add_task(what, total=total, note="")
        yield lambda done, note="", total=None: progress.update(task, completed=done, note=note, total=total)


class _Lines:
    """What a bar would show, line by line."""

    def __init__(self, what: str, total: int | None):
        self._what, self._done, self._total, self._note = what, 0, total, ""
        self._start = self._last = time.monotonic()

    def update(self, done: int | None, note: str = "", total: int | None = None) -> None:
        self._done, self._note = self._done if done is None else done, note
        self._total = self._total if total is None else total
        if time.monotonic() - self._last >= LINE_SECONDS:
            self.show()

    def show(self) -> None:
        self._last = time.monotonic()
        elapsed = datetime.timedelta(seconds=round(self._last - self._start))
        total = "?" if self._total is None else self._total
        text = f"{self._what}  {self._done}/{total}  {elapsed}  {self._note}".rstrip()
        console.print(text, markup=False, soft_wrap=True)


def say(text: str) -> None:
    """One line to standard error, past any bar."""
    console.print(text)
