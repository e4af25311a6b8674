"""A hub on this disk: repositories are folders, and what is asked for by patterns is copied into a snapshot."""

import fnmatch
import pathlib
import shutil
from typing import NamedTuple

COMMIT = "0123abc"


class Hub(NamedTuple):
    """`root` holds repositories as ``OWNER/NAME``, `fetched` what was fetched as ``OWNER/NAME/COMMIT``."""

    root: pathlib.Path
    fetched: pathlib.Path


def install(monkeypatch, root, fetched):
    """Stands for the hub from here on."""

    def snapshot_download(name, revision=None, repo_type=None, allow_patterns=("*",)):
        source, to = root / name, fetched / name / COMMIT
        if not source.is_dir() or revision not in (None, "main", COMMIT):
            raise FileNotFoundError(f"404: no {name} at {revision}")
        to.mkdir(parents=True, exist_ok=True)
        for path in source.rglob("*"):
            inside = path.relative_to(source).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(inside, pattern) for pattern in allow_patterns):
                (to / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to / inside)
        return str(to)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return Hub(root, fetched)
