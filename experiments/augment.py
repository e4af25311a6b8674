"""Random views of images for aTLAS (arXiv 2407.02880): pure functions of a seed and of the rows taken together.

`atlas` and `atlas_negation` train on open_clip's crops (`preprocessing.clip_train`); `atlas_few_shot` on stronger ones,
half of them mirrored, which `atlas_ufm` has for its strong view: its weak one is the image itself, as in the authors'
code. Texts have no views of this kind.
"""

import zlib
from collections.abc import Callable, Sequence

import numpy as np

from taskvec.adaptive.rows import SECOND, Batch
from taskvec.data import batches, lazy, preprocessing
from taskvec.data.base import Split
from taskvec.data.lazy import Images, Transform


def crop_and_flip(size: int) -> Transform:
    """A random part of at least half the area, bicubic to ``[size, size, 3]``, mirrored in half of the cases."""
    crop = preprocessing.clip_train(size, area=(0.5, 1.0))

    def apply(picture, rng: np.random.Generator) -> np.ndarray:
        pixels = crop(picture, rng)
        return pixels[:, ::-1] if rng.random() < 0.5 else pixels

    return apply


def drawn(images: np.ndarray | Images, transform: Transform, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """``rows [B] -> uint8 [B, S, S, 3]``: images under a random transform.

    What is drawn depends on the seed, on all B rows in their order and on the place among them. So a row looks
    different in every batch, also where it stands twice in one, and a run that is repeated or resumed sees the same.
    """
    images = images if isinstance(images, Images) else lazy.of_array(images, "image")

    def take(rows: np.ndarray) -> np.ndarray:
        numbers = images.rows[np.asarray(rows, int)]
        corrupt = images.corrupt and (lambda pixels, place: images.corrupt(pixels, int(numbers[place])))
        batch = images.replace(
            blob=lambda place: images.blob(int(numbers[place])),
            where=lambda place: images.where(int(numbers[place])),
            rows=np.arange(len(numbers)),
            transform=transform,
            corrupt=corrupt,
            draw=True,
        )
        return batch.read(batch.rows, seed, zlib.crc32(numbers.astype("<i8").tobytes()))

    return take


def take(name: str, splits: Sequence[Split], size: int, seed: int) -> Callable[[int, np.ndarray], Batch]:
    """`Rows.take` with the views that a method of `METHODS` is published with, for splits of images."""
    transform = preprocessing.clip_train(size) if name in ("atlas", "atlas_negation") else crop_and_flip(size)
    views = [drawn(split.inputs["image"], transform, seed) for split in splits]
    if name == "atlas_ufm":
        return lambda t, rows: {**batches.take(splits[t], rows), f"{SECOND}image": views[t](rows)}
    return lambda t, rows: {"image": views[t](rows)}
