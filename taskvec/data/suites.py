"""A suite: several tasks of one kind, rows chosen and encoded, from the packages' sets or from a folder of files."""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from taskvec.data import base, images, text, text_registry

# Part of the protocol tag: raise it when rows, cleaning or split of any registry task change.
REGISTRY_VERSION = 1

KINDS = {"text": ("text_", ".jsonl", text.jsonl), "image": ("image_", ".npz", images.npz)}
REGISTRY: dict[str, dict[str, Callable[[], base.Task]]] = {"text": text_registry.TASKS, "image": images.TASKS}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What makes a suite; configs give it as a mapping with these keys.

    Attributes:
      kind: ``text`` or ``image``.
      tasks: names, in order.
      source: ``registry`` (sets that PyPI packages carry), or a folder with ``text_NAME.jsonl`` / ``image_NAME.npz``.
      train, held_out, test: rows a task; held_out are taken from the training set.
      max_length: tokens, text only.
      image_size: pixels, images only.
      seed: which training and held-out rows; the test rows do not depend on it.
    """

    kind: str
    tasks: tuple[str, ...]
    source: str = "registry"
    train: int = 512
    held_out: int = 128
    test: int = 500
    max_length: int = 48
    image_size: int = 64
    seed: int = 0


def load_suite(spec: Mapping[str, Any], tokenizer_folder: str | os.PathLike | None = None) -> list[base.Task]:
    """Loads the tasks of a suite, draws their rows, and encodes them.

    Args:
      spec: the keys of `Spec` (a dict or an ml_collections ConfigDict).
      tokenizer_folder: the text model's folder, for its ``tokenizer.json``; not used for images.

    Raises:
      ValueError: an unknown key, kind or task name (the message lists what there is), or too few rows.
      FileNotFoundError: the source folder does not exist.
      taskvec.data.wheels.Unavailable: a package could not be fetched.
    """
    spec = parse(spec)
    makers = _makers(spec)
    if spec.kind == "text":
        if tokenizer_folder is None:
            raise ValueError("a text suite needs tokenizer_folder, the folder of the text model")
        tokenizer = text.load_tokenizer(tokenizer_folder)

    def load(name: str) -> base.Task:
        # Rows first: only what is used is tokenised or resized.
        task = base.subsample(makers[name](), spec.train, spec.held_out, spec.test, spec.seed)
        if spec.kind == "text":
            return text.encode_task(task, tokenizer, spec.max_length)
        return images.encode_task(task, spec.image_size)

    return [load(name) for name in spec.tasks]


def protocol(spec: Mapping[str, Any]) -> str:
    """The tag under which results may be compared: tasks, their data, sizes and encoding, but not the seed.

    A folder stands in it by a digest of its files' contents, not by its name.
    """
    spec = parse(spec)
    if spec.source == "registry":
        source = f"registry{REGISTRY_VERSION}"
    else:
        _makers(spec)
        digest = hashlib.sha256(b"".join(hashlib.sha256(_file(spec, t).read_bytes()).digest() for t in spec.tasks))
        source = f"files-{digest.hexdigest()[:8]}"
    encoding = f"len{spec.max_length}" if spec.kind == "text" else f"px{spec.image_size}"
    sizes = f"train{spec.train}/held{spec.held_out}/test{spec.test}"
    return f"{spec.kind}/{source}/{'+'.join(spec.tasks)}/{sizes}/{encoding}"


def available(kind: str, source: str = "registry") -> list[str]:
    """Names of the tasks of a kind that a source has."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; allowed: {', '.join(KINDS)}")
    if source == "registry":
        return list(REGISTRY[kind])
    folder = pathlib.Path(source).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the folder {source} does not exist; set source to a folder with files like text_NAME.jsonl or "
            "image_NAME.npz, or to 'registry' for the sets that come with PyPI packages"
        )
    prefix, suffix, _ = KINDS[kind]
    return sorted(path.name.removeprefix(prefix).removesuffix(suffix) for path in folder.glob(f"{prefix}*{suffix}"))


def parse(spec: Mapping[str, Any]) -> Spec:
    """Checks a mapping and fills in the defaults; raises `ValueError` on keys, kinds and sizes that are not allowed."""
    allowed = [field.name for field in dataclasses.fields(Spec)]
    unknown, missing = sorted(set(spec) - set(allowed)), sorted({"kind", "tasks"} - set(spec))
    if unknown or missing:
        raise ValueError(f"suite: unknown keys {unknown}, missing keys {missing}; allowed: {', '.join(allowed)}")
    made = Spec(**{key: tuple(spec[key]) if key == "tasks" else spec[key] for key in spec})
    if isinstance(spec["tasks"], str) or not made.tasks or len(set(made.tasks)) < len(made.tasks):
        raise ValueError(f"suite: tasks must be a list of different names, found {spec['tasks']!r}")
    for key, least in (("train", 1), ("held_out", 0), ("test", 1), ("max_length", 3), ("image_size", 1), ("seed", 0)):
        if getattr(made, key) < least:
            raise ValueError(f"suite: {key}={getattr(made, key)}, must be at least {least}")
    available(made.kind, made.source)
    return made


def _makers(spec: Spec) -> dict[str, Callable[[], base.Task]]:
    names = available(spec.kind, spec.source)
    unknown = [name for name in spec.tasks if name not in names]
    if unknown:
        raise ValueError(
            f"unknown {spec.kind} tasks {', '.join(unknown)} in {spec.source}; there is {', '.join(names) or 'none'}"
        )
    if spec.source == "registry":
        return REGISTRY[spec.kind]
    reader = KINDS[spec.kind][2]
    return {name: lambda name=name: reader(_file(spec, name), name) for name in spec.tasks}


def _file(spec: Spec, name: str) -> pathlib.Path:
    prefix, suffix, _ = KINDS[spec.kind]
    return pathlib.Path(spec.source).expanduser() / f"{prefix}{name}{suffix}"
