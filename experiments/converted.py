"""OpenCLIP's files as models: they become Hugging Face folders in the cache, once."""

import hashlib
import pathlib

from taskvec import host
from taskvec.io import open_clip
from taskvec.io.atomic import published
from taskvec.io.progress import say

SUFFIXES = (".pt", ".safetensors")


def beside(name: str) -> pathlib.Path | None:
    """The file or folder of a path, if there is one; safetensors stand for a ``.pt`` file."""
    path = pathlib.Path(name)
    found = [path, path.with_suffix(".safetensors")] if path.suffix == ".pt" else [path]
    return next((each for each in found if each.exists()), None)


def folder(path: pathlib.Path) -> pathlib.Path:
    """The folder of a model: of an OpenCLIP file its conversion (`taskvec.io.open_clip`), else what was given."""
    if path.suffix not in SUFFIXES or path.is_dir():
        return path
    about = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:12]
    made = host.cache() / "converted" / f"{path.parent.name}-{path.stem}-{key}"
    if not (made / "config.json").is_file():
        say(f"converting {path}")
        with published(made) as partial:
            open_clip.convert(path, partial)
    return made
