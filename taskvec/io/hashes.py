"""SHA-256 of files, computed beside other work. Imports no jax, so that it can begin before jax is there."""

import collections
import hashlib
import os
import pathlib
import threading
from collections.abc import Iterable, Mapping

# Bytes read and hashed at once: for each block a thread waits for the interpreter's lock, which imports hold for long.
_BLOCK = 1 << 23


class Hashes:
    """SHA-256 of files, by threads of low priority.

    Files may be begun before it is sure that they are wanted; `want` says which are, at last.
    """

    def __init__(self, files: Iterable[pathlib.Path] = ()):
        self._lock = threading.Lock()
        self._wanted: set[pathlib.Path] = set()
        self._begun: set[pathlib.Path] = set()
        self._found: dict[pathlib.Path, str | OSError] = {}
        self._left: collections.deque[pathlib.Path] = collections.deque()
        self._threads: list[threading.Thread] = []
        self.want(files)

    def want(self, files: Iterable[pathlib.Path]) -> None:
        """These files and no others; what was begun of others is given up."""
        with self._lock:
            self._wanted = {path.resolve() for path in files}
            self._left = collections.deque(sorted(self._wanted - self._begun))
            fresh = [
                threading.Thread(target=self._run, daemon=True)
                for _ in range(min(4, os.cpu_count() or 1, len(self._left)))
            ]
        for thread in fresh:
            thread.start()
        self._threads += fresh

    def result(self) -> Mapping[pathlib.Path, str]:
        """Waits; ``{resolved path: hexadecimal digest}`` of the files that are wanted.

        Raises:
          OSError: one of them cannot be read.
        """
        for thread in self._threads:
            thread.join()
        wanted = {path: self._found[path] for path in sorted(self._wanted)}
        if errors := [found for found in wanted.values() if isinstance(found, OSError)]:
            raise errors[0]
        return wanted

    def _run(self) -> None:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while path := self._next():
            try:
                digest = self._digest(path)
            except OSError as error:
                digest = error
            with self._lock:
                if digest:
                    self._found[path] = digest
                else:
                    self._begun.discard(path)

    def _next(self) -> pathlib.Path | None:
        with self._lock:
            path = self._left.popleft() if self._left else None
            if path:
                self._begun.add(path)
            return path

    def _digest(self, path: pathlib.Path) -> str | None:
        """``None`` if the file is not wanted any more."""
        digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(block):
                if path not in self._wanted:
                    return None
                digest.update(block[:size])
        return digest.hexdigest()


def weights_of(names: Iterable[str]) -> list[pathlib.Path]:
    """Weight files of the models in a list of texts, as far as they are plainly there; what is no model is left out."""
    found = []
    for name in names:
        path = pathlib.Path(name).expanduser()
        try:
            if path.suffix == ".safetensors" and path.is_file():
                found.append(path)
            elif path.is_dir():
                found += [*path.glob("model*.safetensors"), *path.glob("adapter_model.safetensors")]
        except (OSError, ValueError):  # a text that can be no path
            continue
    return found
