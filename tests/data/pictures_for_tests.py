"""Tiny pictures and suites on disk for tests."""

import functools
import io

import numpy as np
from PIL import Image


def picture(number: int, size: tuple[int, int] = (20, 16)) -> np.ndarray:
    """uint8 ``[h, w, 3]`` of width and height `size`, another one for every number."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR))


@functools.cache
def png(number: int, size: tuple[int, int] = (20, 16)) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture(number, size)).save(file, "PNG")
    return file.getvalue()


def folders(root, classes, per_class: int, first: int = 0):
    """Writes ``ROOT/CLASS/I.png``, numbered from `first`; returns the root."""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            (root / name / f"{i}.png").write_bytes(png(first + c * per_class + i))
    return root
