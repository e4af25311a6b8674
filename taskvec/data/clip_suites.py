"""The published suites of 8, 14 and 20 image tasks for CLIP: classes, prompts, splits, and where the rows lie.

Class names and templates are facts read in public repositories; they stand in ``classes/*.txt``, one per line, ``{}``
for the class. Sources: tanganke/fusion_bench 54c9e8c ``fusion_bench/tasks/clip_classification``, nik-dim/tall_masks
d10af8b and mlfoundations/task_vectors 826a64c ``src/datasets``, and the class attributes of torchvision's data sets.
The templates are the same in all three. Class names differ for some tasks; the open_clip line's own stand in
``NAME.open_clip.txt``: flowers, FER2013 (another order, and lists as they are printed into the prompt there), pets,
Food101 and CIFAR100 (underscores as torchvision has them), Fashion-MNIST, KMNIST (o, ki, su instead of kana). That line
takes the names of SUN397 and Cars from the data's own folders and tables; the list here is the same as far as seen.

Three families of checkpoints exist, trained and scored differently; their results must never share a table:

  task_vectors  Ilharco et al. 2023 (arXiv 2212.04089): 8 tasks, DTD scored on its test images as in AdaMerging.
  tall_masks    Wang et al. 2024 (arXiv 2405.07813): 8, 14 and 20 tasks; DTD scored on ``dtd/val``, images which the
                experts very likely saw (98 % there against 79 %); EMNIST is its digits.
  fusion_bench  Tang et al. 2024 (arXiv 2406.03280): Hugging Face CLIP; EMNIST is its letters.

A task is read from a folder ROOT in one of two layouts: ``ROOT/TASK/train/CLASS/*`` with ``test`` (and ``val``) beside
it, class folders called like the classes (case and punctuation do not count) or sorted as they are; or the hub's files
under ``ROOT/OWNER/NAME``: Parquet, or ``SPLIT/*.tar`` (`webdataset`) with ``classnames.txt``. ``hub`` instead of ROOT
fetches that repository, ``tfds`` takes prepared sets of tensorflow-datasets.
"""

import logging
import pathlib
import re
from typing import NamedTuple

import numpy as np

from taskvec.data import base, sources, webdataset

log = logging.getLogger(__name__)

FOLDER = pathlib.Path(__file__).parent / "classes"


class ClipTask(NamedTuple):
    """Where an image task is found.

    Attributes:
      title: its name in the papers.
      hub: Hugging Face data set; ``owner/name`` or ``owner/name:config``.
      tfds: name of its tensorflow-datasets builder; empty if there is none.
      splits: names of the training and the test split on the hub.
      tfds_splits: the same for tensorflow-datasets.
    """

    title: str
    hub: str
    tfds: str = ""
    splits: tuple[str, str] = ("train", "test")
    tfds_splits: tuple[str, str] = ("train", "test")


TASKS = {
    "sun397": ClipTask("SUN397", "tanganke/sun397", "sun397/standard-part1-120k"),
    "cars": ClipTask("Cars", "tanganke/stanford_cars", "cars196"),
    "resisc45": ClipTask("RESISC45", "tanganke/resisc45"),  # tfds has no split of it
    "eurosat": ClipTask("EuroSAT", "tanganke/eurosat"),  # nor of this
    "svhn": ClipTask("SVHN", "ufldl-stanford/svhn:cropped_digits", "svhn_cropped"),
    "gtsrb": ClipTask("GTSRB", "tanganke/gtsrb"),
    "mnist": ClipTask("MNIST", "ylecun/mnist", "mnist"),
    "dtd": ClipTask("DTD", "tanganke/dtd", "dtd"),
    "flowers102": ClipTask("Flowers102", "dpdl-benchmark/oxford_flowers102", "oxford_flowers102"),
    "pcam": ClipTask("PCAM", "1aurent/PatchCamelyon", "patch_camelyon"),
    "fer2013": ClipTask("FER2013", "clip-benchmark/wds_fer2013"),
    "pets": ClipTask("OxfordIIITPet", "timm/oxford-iiit-pet", "oxford_iiit_pet"),
    "stl10": ClipTask("STL10", "tanganke/stl10", "stl10"),
    "cifar100": ClipTask("CIFAR100", "tanganke/cifar100", "cifar100"),
    "cifar10": ClipTask("CIFAR10", "tanganke/cifar10", "cifar10"),
    "food101": ClipTask("Food101", "ethz/food101", "food101", ("train", "validation"), ("train", "validation")),
    "fashion_mnist": ClipTask("FashionMNIST", "zalando-datasets/fashion_mnist", "fashion_mnist"),
    "emnist": ClipTask("EMNIST", "tanganke/emnist_letters"),
    "kmnist": ClipTask("KMNIST", "tanganke/kmnist", "kmnist"),
    "rendered_sst2": ClipTask("RenderedSST2", "nateraw/rendered-sst2"),
}
SUITES = {"clip8": tuple(TASKS)[:8], "clip14": tuple(TASKS)[:14], "clip20": tuple(TASKS)}


class Family(NamedTuple):
    """How a line of checkpoints was trained and scored.

    Attributes:
      names: which class names: ``open_clip`` or ``hugging_face``.
      dtd: which images DTD is scored on: ``test`` or ``val``.
      emnist: ``letters`` or ``digits``.
      validation: fraction of the training rows held out and their limit, see `base.validation_rows`.
      apart: whether experts are trained without these rows; FusionBench's have seen them.
      preprocess: of `images.encode_task`.
      suites: the suites that were published.
    """

    names: str
    dtd: str
    emnist: str
    validation: tuple[float, int | None]
    apart: bool
    preprocess: str
    suites: tuple[str, ...]


FAMILIES = {
    "task_vectors": Family("open_clip", "test", "digits", (0.1, 5000), True, "clip_round", ("clip8",)),
    "tall_masks": Family("open_clip", "val", "digits", (0.1, 5000), True, "clip_round", tuple(SUITES)),
    "fusion_bench": Family("hugging_face", "test", "letters", (0.1, None), False, "clip", tuple(SUITES)),
}


def class_names(task: str, family: str) -> tuple[str, ...]:
    """Class names as they stand in a family's prompts, in the order of the labels."""
    stem = _stem(task, family)
    own = FOLDER / f"{stem}.open_clip.txt"
    return _lines(own if _family(family).names == "open_clip" and own.is_file() else FOLDER / f"{stem}.txt")


def templates(task: str, family: str) -> tuple[str, ...]:
    """Prompt templates with ``{}`` for the class."""
    return _lines(FOLDER / f"{_stem(task, family)}.templates.txt")


def tag(family: str) -> str:
    """What stands in a result's protocol for the family, with its DTD and EMNIST variants."""
    of = _family(family)
    return f"{family}-dtd:{of.dtd}-emnist:{of.emnist}"


def load(task: str, family: str, source: str) -> base.Task:
    """A task with ``{"raw": lazy.Images}`` rows: `held_out` is its own validation set if there is one, else empty.

    Args:
      task: a key of `TASKS`.
      family: a key of `FAMILIES`.
      source: a folder ROOT, ``hub`` or ``tfds``; see the module.

    Raises:
      ValueError: unknown task or family, or a class count that is not the published one.
      FileNotFoundError: the rows are not there; the message says where they were looked for.
    """
    names = class_names(task, family)
    splits = {
        which: _by_name(table, names, task, family, source) for which, table in _read(task, family, source).items()
    }
    for which, table in splits.items():
        top = int(table.labels.max(initial=-1)) + 1
        if top > len(names) or (table.classes and len(table.classes) != len(names)):
            raise ValueError(
                f"task {task}: {which} has {max(top, len(table.classes))} classes, {family} has {len(names)} names"
            )
    rows = {which: base.Split({"raw": table.rows}, table.labels) for which, table in splits.items()}
    empty = base.take(rows["train"], np.arange(0))
    made = base.Task(task, names, rows["train"], rows.get("held_out", empty), rows["test"])
    base.check(made, may_be_empty=("held_out",))
    return made


def _by_name(table: sources.Table, names: tuple[str, ...], task: str, family: str, source: str) -> sources.Table:
    """Labels by the names of the source's own classes, where it has some that are called like ours.

    FusionBench takes the hub's label numbers as they are, and so does its family here; a disagreement is logged.
    """
    found = [re.sub(r"^/\w/", "", name) for name in table.classes]  # SUN397's /a/abbey
    if len(found) != len(names):
        return table
    if _family(family).names == "hugging_face" and source != "tfds":
        try:
            order = sources.label_order(found, names, task) or range(len(names))
        except ValueError as error:
            log.warning("%s; label numbers are taken as they are, as in FusionBench", error)
            return table
        other = [f"{found[i]!r} under {names[i]!r}" for i, at in enumerate(order) if at != i]
        if other:
            log.warning(
                "task %s: label numbers are taken as in FusionBench, which files %s", task, ", ".join(other[:4])
            )
        return table
    order = sources.label_order(found, names, f"task {task}")
    if order is None:
        return table
    return table._replace(labels=np.array(order, np.int32)[table.labels], classes=names)


def _read(task: str, family: str, source: str) -> dict[str, sources.Table]:
    of, entry = _family(family), TASKS[_known(task)]
    test = "val" if task == "dtd" and of.dtd == "val" else entry.splits[1]
    if source == "tfds":
        name = "emnist/digits" if task == "emnist" and of.emnist == "digits" else entry.tfds
        if not name:
            raise ValueError(f"task {task}: tensorflow-datasets has no such set with its splits; use a folder or hub")
        test = {"val": "validation"}.get(test, entry.tfds_splits[1])
        read = lambda split: sources.tfds(name, split, sources.Columns("image"))
        return {"train": read(entry.tfds_splits[0]), "test": read(test)}
    if source != "hub" and (pathlib.Path(source).expanduser() / task).is_dir():
        return _folders(pathlib.Path(source).expanduser() / task, task, of, class_names(task, family))
    if (task == "emnist" and of.emnist == "digits") or test == "val":
        raise FileNotFoundError(
            f"task {task}: {family} scores rows that no hub repository is known to have; "
            f"lay them out as FOLDER/{task}/{{train,{test}}}/CLASS/*.png and set source to FOLDER"
        )
    read = lambda split: _hub_table(hub_files(entry.hub, split, source, task))
    return {"train": read(entry.splits[0]), "test": read(test)}


def _folders(folder: pathlib.Path, task: str, of: Family, names: tuple[str, ...]) -> dict[str, sources.Table]:
    order = sources.folder_order(folder / "train", names)
    train = sources.image_folder(folder / "train", order)
    read = lambda which: sources.image_folder(folder / which, train.classes)
    if task == "dtd" and of.dtd == "val":
        return {"train": train, "test": read("val")}
    test = "test" if (folder / "test").is_dir() else "val"  # SUN397 of task_vectors has train and val alone
    if test == "val" and (task == "dtd" or not (folder / "val").is_dir()):
        raise FileNotFoundError(f"{folder / 'test'} does not exist; the test images of {task} belong there")
    own = {"held_out": read("val")} if test == "test" and task == "eurosat" and (folder / "val").is_dir() else {}
    return {"train": train, "test": read(test)} | own


def _hub_table(files: list[pathlib.Path]) -> sources.Table:
    if not files or files[0].suffix != ".tar":
        return sources.parquet(files, sources.Columns("image"))
    names = files[0].parent.parent / "classnames.txt"  # without them there is no telling what the labels mean
    if not names.is_file():
        raise FileNotFoundError(f"{names} is not there; it has the names of the labels in {files[0]}, one per line")
    return webdataset.read(files, _lines(names))


def hub_files(repo: str, split: str, source: str, task: str) -> list[pathlib.Path]:
    """The Parquet or tar files of one split of a hub data set, from ``ROOT/OWNER/NAME`` or fetched (``source="hub"``).

    Raises:
      FileNotFoundError: no such files, or the hub cannot be reached; the message says where they belong.
    """
    name, _, config = repo.partition(":")
    if source == "hub":
        import huggingface_hub

        try:
            wanted = [f"{config}/*{split}*.parquet" if config else f"*{split}*.parquet"]
            wanted += [f"{split}/*.tar", "classnames.txt"]
            root = pathlib.Path(huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns=wanted))
        except Exception as error:  # the hub's client raises many kinds: network, proxy, offline mode, missing entry
            raise FileNotFoundError(
                f"task {task}: the hub's {name} could not be had ({error}); fetch it on a machine with network, and "
                f"set source to a folder with {name} below it"
            ) from error
    else:
        root = pathlib.Path(source).expanduser() / name
    files = [f for f in sorted(root.rglob("*.parquet")) if f.name.split("-")[0].split(".")[0] == split]
    files = [f for f in files if not config or config in f.relative_to(root).parts]
    files = files or webdataset.in_order((root / split).glob("*.tar"))
    if not files:
        below = f"{root}/{config}/" if config else f"{root}/**/"
        raise FileNotFoundError(
            f"task {task}: neither {pathlib.Path(source) / task}/train nor {below}{split}-*.parquet nor "
            f"{root}/{split}/*.tar is there"
        )
    return files


def _lines(path: pathlib.Path) -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8").splitlines())


def _known(task: str) -> str:
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; there is {', '.join(TASKS)}")
    return task


def _family(family: str) -> Family:
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; there is {', '.join(FAMILIES)}")
    return FAMILIES[family]


def _stem(task: str, family: str) -> str:
    return f"emnist_{_family(family).emnist}" if _known(task) == "emnist" else task
