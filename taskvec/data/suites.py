"""A suite: several tasks of one kind, rows chosen and encoded.

They come from the packages' sets, a folder of files, a description (`described`), or, with a family, from the published
suites (`clip_suites`, `glue`).
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from taskvec.data import base, clip_suites, corruptions, described, glue, images, lazy, text, text_registry

# Part of the protocol tag: raise it when rows, cleaning or split of any registry task change.
REGISTRY_VERSION = 1

KINDS = {"text": ("text_", ".jsonl", text.jsonl), "image": ("image_", ".npz", images.npz)}
FAMILIES = {"text": ("glue", "glue_text_to_text"), "image": tuple(clip_suites.FAMILIES)}
SUITES = {**clip_suites.SUITES, "glue": tuple(glue.TASKS)}
REGISTRY: dict[str, dict[str, Callable[[], base.Task]]] = {"text": text_registry.TASKS, "image": images.TASKS}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What makes a suite; configs give it as a mapping with these keys.

    Attributes:
      kind: ``text`` or ``image``.
      tasks: names, in order.
      source: ``registry`` (sets that PyPI packages carry), a folder with ``text_NAME.jsonl`` / ``image_NAME.npz``, or a
        YAML or JSON file (see `described`). With a family: a folder, ``hub`` or ``tfds``.
      family: one of `clip_suites.FAMILIES` for the published image tasks, ``glue`` or ``glue_text_to_text``; tasks may
        then also be ``("clip8",)`` and its like, or ``("glue",)``, for all of a suite.
      train, held_out, test: rows per task; held_out are taken from the training set. None is the published protocol:
        all rows, of which the family's validation split is held out (FusionBench's are training rows as well).
      max_length: tokens, text only.
      image_size: pixels, images only.
      preprocess: see `images.encode_task`; by default ``square``, with a family the family's own.
      corruption: of the test images: ``KIND:SEVERITY`` or ``KIND:SEVERITY:SIZE`` (see `corruptions`); "" for none.
      seed: which training and held-out rows; the test rows do not depend on it.
    """

    kind: str
    tasks: tuple[str, ...]
    source: str = "registry"
    family: str = ""
    train: int | None = 512
    held_out: int | None = 128
    test: int | None = 500
    max_length: int = 48
    image_size: int = 64
    preprocess: str = ""
    corruption: str = ""
    seed: int = 0


def load_suite(
    spec: Mapping[str, Any], tokenizer_folder: str | os.PathLike | None = None, cut: str = "right"
) -> list[base.Task]:
    """Loads the tasks of a suite, draws their rows, and encodes them.

    Args:
      spec: the keys of `Spec` (a dict or an ml_collections ConfigDict).
      tokenizer_folder: the text model's folder, for its ``tokenizer.json``; not used for images.
      cut: the side on which texts above ``max_length`` lose tokens: ``right`` (always so with family
        ``glue_text_to_text``), or ``left`` for prompts, whose question stands at the end.

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
        family = clip_suites.FAMILIES.get(spec.family)
        rule = {"validation": family.validation, "apart": family.apart} if family else {}
        task = makers[name]()
        if spec.corruption:  # before rows are drawn: a corruption's numbers go by a row's place in the whole test set
            task = task._replace(test=_corrupted(task, spec))
        task = base.subsample(task, spec.train, spec.held_out, spec.test, spec.seed, **rule)
        if spec.family == "glue_text_to_text":
            return glue.encode_text_to_text(task, tokenizer, spec.max_length)
        if spec.kind == "text":
            return text.encode_task(task, tokenizer, spec.max_length, cut)
        return images.encode_task(task, spec.image_size, _preprocess(spec))

    tasks = [load(name) for name in spec.tasks]
    return text.with_types(tasks) if spec.kind == "text" else tasks


def protocol(spec: Mapping[str, Any]) -> str:
    """The tag under which results may be compared: tasks, their data, sizes and encoding, but not the seed.

    A folder stands in it by a digest of its files' contents, not by its name; a family by its name and variants, so
    that results of different families are never compared.
    """
    spec = parse(spec)
    if spec.family in clip_suites.FAMILIES:
        source = clip_suites.tag(spec.family)
    elif spec.family:
        source = spec.family
    elif described.is_description(spec.source):
        tasks = described.read(spec.source)[1]
        both = "".join(described.digest(tasks[t]) for t in spec.tasks)
        source = f"described-{hashlib.sha256(both.encode()).hexdigest()[:8]}"
    elif spec.source == "registry":
        source = f"registry{REGISTRY_VERSION}"
    else:
        _makers(spec)
        digest = hashlib.sha256(b"".join(hashlib.sha256(_file(spec, t).read_bytes()).digest() for t in spec.tasks))
        source = f"files-{digest.hexdigest()[:8]}"
    encoding = f"len{spec.max_length}" if spec.kind == "text" else f"px{spec.image_size}"
    encoding += f"-{_preprocess(spec)}" if spec.kind == "image" and _preprocess(spec) != "square" else ""
    encoding += f"/{spec.corruption}" if spec.corruption else ""
    count = lambda n: "all" if n is None else n
    held = "published" if spec.held_out is None else spec.held_out
    sizes = f"train{count(spec.train)}/held{held}/test{count(spec.test)}"
    return f"{spec.kind}/{source}/{'+'.join(spec.tasks)}/{sizes}/{encoding}"


def classes_and_templates(spec: Mapping[str, Any]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """For each task of an image suite its class names and prompt templates, for `heads.zero_shot`.

    Raises:
      ValueError: the suite gives none: it needs a family, or a description with ``classes`` and ``templates``.
    """
    spec = parse(spec)
    if spec.family in clip_suites.FAMILIES:
        return [(clip_suites.class_names(t, spec.family), clip_suites.templates(t, spec.family)) for t in spec.tasks]
    tasks = described.read(spec.source)[1] if described.is_description(spec.source) else {}
    lacking = [t for t in spec.tasks if t not in tasks or not tasks[t].templates or not tasks[t].classes]
    if lacking:
        raise ValueError(
            f"no class names and templates for {', '.join(lacking)}: set family, or describe the suite in a file with "
            "classes and templates"
        )
    return [(tasks[t].classes, tasks[t].templates) for t in spec.tasks]


def available(kind: str, source: str = "registry", family: str = "") -> list[str]:
    """Names of the tasks of a kind that a source has."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; allowed: {', '.join(KINDS)}")
    if family:
        if family not in FAMILIES[kind]:
            raise ValueError(f"unknown {kind} family {family!r}; allowed: {', '.join(FAMILIES[kind])}")
        return list(clip_suites.TASKS if kind == "image" else glue.TASKS)
    if described.is_description(source):
        found, tasks = described.read(source)
        if found != kind:
            raise ValueError(f"{source} describes {found} tasks, the suite is of kind {kind}")
        return list(tasks)
    if source == "registry":
        return list(REGISTRY[kind])
    folder = pathlib.Path(source).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the folder {source} does not exist; set source to a folder with files like text_NAME.jsonl or "
            "image_NAME.npz, to a description (.yaml, .json), or to 'registry' for the sets of PyPI packages"
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
    if made.family and len(made.tasks) == 1 and made.tasks[0] in SUITES:
        made = dataclasses.replace(made, tasks=SUITES[made.tasks[0]])
    if isinstance(spec["tasks"], str) or not made.tasks or len(set(made.tasks)) < len(made.tasks):
        raise ValueError(f"suite: tasks must be a list of different names, found {spec['tasks']!r}")
    for key, least in (("train", 1), ("held_out", 0), ("test", 1), ("max_length", 3), ("image_size", 1), ("seed", 0)):
        value = getattr(made, key)
        if value is None and key in ("train", "held_out", "test"):
            continue
        if value < least:
            raise ValueError(f"suite: {key}={value}, must be at least {least}")
    if made.family and made.source == "registry":
        raise ValueError("suite: with a family, source must be a folder, 'hub' or 'tfds'")
    _corruption(made)
    available(made.kind, made.source, made.family)
    return made


def _makers(spec: Spec) -> dict[str, Callable[[], base.Task]]:
    names = available(spec.kind, spec.source, spec.family)
    unknown = [name for name in spec.tasks if name not in names]
    if unknown:
        raise ValueError(
            f"unknown {spec.kind} tasks {', '.join(unknown)} in {spec.source}; there is {', '.join(names) or 'none'}"
        )
    if spec.family in clip_suites.FAMILIES:
        return {name: lambda name=name: clip_suites.load(name, spec.family, spec.source) for name in spec.tasks}
    if spec.family:
        return {name: lambda name=name: glue.load(name, spec.source) for name in spec.tasks}
    if described.is_description(spec.source):
        tasks = described.read(spec.source)[1]
        return {name: lambda name=name: described.load(tasks[name], name) for name in spec.tasks}
    if spec.source == "registry":
        return REGISTRY[spec.kind]
    reader = KINDS[spec.kind][2]
    return {name: lambda name=name: reader(_file(spec, name), name) for name in spec.tasks}


def _file(spec: Spec, name: str) -> pathlib.Path:
    prefix, suffix, _ = KINDS[spec.kind]
    return pathlib.Path(spec.source).expanduser() / f"{prefix}{name}{suffix}"


def _preprocess(spec: Spec) -> str:
    family = clip_suites.FAMILIES.get(spec.family)
    return spec.preprocess or (family.preprocess if family else "square")


def _corruption(spec: Spec) -> tuple[str, int, int | None] | None:
    """Kind, severity and size of settings."""
    if not spec.corruption:
        return None
    kind, *numbers = spec.corruption.split(":")
    if spec.kind != "image" or len(numbers) not in (1, 2) or not all(n.isdigit() for n in numbers):
        raise ValueError(
            f"suite: corruption={spec.corruption!r}; want KIND:SEVERITY or KIND:SEVERITY:SIZE, images only"
        )
    severity, size = int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else None
    corruptions.check(kind, severity, size)
    return kind, severity, size


def _corrupted(task: base.Task, spec: Spec) -> base.Split:
    kind, severity, size = _corruption(spec)
    raw = task.test.inputs["raw"]
    raw = raw if isinstance(raw, lazy.Images) else lazy.of_array(raw, f"task {task.name}")
    return task.test._replace(inputs={"raw": raw.replace(corrupt=corruptions.of_rows(kind, severity, size=size))})
