"""Progress on the terminal for anything that takes more than a few seconds."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


@contextlib.contextmanager
def bar(what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Shows a bar with elapsed and remaining time; yields ``update(done, note="", total=None)``.

    A total that is known only later comes by the first update.

    Where standard error is no terminal (a log file), one line is printed at the end instead.
    """
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


def say(text: str) -> None:
    """One line to standard error, past any bar."""
    console.print(text)
