"""Files and folders never half there: hidden names beside them, and what to do with those of killed processes."""

import contextlib
import glob
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

PathLike = str | os.PathLike
_PROCESS = re.compile(r"\d+(-\d+)?")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file under a temporary name and renames it, so that it is never half there."""
    with published(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def published(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A hidden name for the file or folder that the block writes; it takes the place of `path` once that ended well.

    What killed processes left of the same goes first. If the block fails, what it wrote goes too.
    """
    remove_stale(path.parent, glob.escape(path.name))
    temporary = temporary_name(path)
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():  # a folder can be renamed onto an empty one only
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise


def temporary_name(path: pathlib.Path) -> pathlib.Path:
    """A hidden name beside `path`, on the same file system so that a rename is atomic."""
    return path.with_name(f".{path.name}.{this_process()}.tmp")


def remove_stale(folder: pathlib.Path, pattern: str) -> None:
    """Deletes what killed processes left under temporary names for files or folders that match a pattern of `glob`."""
    for temporary in folder.glob(f".{pattern}.*.tmp"):
        process = temporary.name.split(".")[-2]
        if _PROCESS.fullmatch(process) and process != this_process() and not alive(process):
            _remove(temporary)


def _remove(path: pathlib.Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def this_process() -> str:
    """What this process is known by: ``PID-START`` where the time of its start can be told, else ``PID``."""
    pid = os.getpid()
    return "-".join(filter(None, (str(pid), _started(pid))))


def alive(process: str) -> bool:
    """Whether another process of this machine still runs, by what it was known by.

    Numbers come again, in containers at every start. So one that is our own was another's before, and where both times
    of start are known they must agree.
    """
    if not _PROCESS.fullmatch(process):
        return False
    pid, _, start = process.partition("-")
    if int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    now = _started(int(pid))
    return not start or not now or now == start


def _started(pid: int) -> str:
    """When a process started, in clock ticks since the machine did; "" where this cannot be told."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The second field is the program's name in brackets, and may hold spaces and brackets; this is the 22nd.
    state, *more = fields.rpartition(")")[2].split()
    return "ended" if state in "ZX" else more[18]
