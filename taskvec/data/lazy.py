"""Images that stay encoded until their rows are asked for, and are then decoded in threads.

An `Images` stands where an array ``uint8 [N, S, S, 3]`` may stand in a `Split`: `batches` index it by rows. What a row
decodes to is a pure function of the row, and, where pictures are drawn at random (crops), of ``(seed, epoch, row)``: it
depends neither on the number of threads or processes nor on the batch that the row falls into.
"""

import concurrent.futures
import dataclasses
import functools
import io
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

Transform = Callable[[Image.Image, np.random.Generator | None], np.ndarray]
THREADS = os.cpu_count() or 1


class BrokenImage(ValueError):
    """An image cannot be decoded; the message names its file and row."""


def plain(picture: Image.Image, rng: np.random.Generator | None = None) -> np.ndarray:
    """The picture's own pixels; all pictures of a batch must then be of one size."""
    return np.asarray(picture)


@dataclasses.dataclass(frozen=True)
class Images:
    """N encoded images; ``images[rows]`` decodes some, ``np.asarray(images)`` all.

    Attributes:
      blob: row of the source -> its image: bytes or path of an image file, or a uint8 array ``[h, w]``, ``[h, w, 3]``.
      where: row of the source -> file and row, for messages.
      rows: int ``[N]``, the source's rows, in order.
      transform: from an RGB picture to uint8 ``[S, S, 3]``; a generator is given where draws are wanted.
      corrupt: ``(uint8 [h, w, 3], row) -> uint8 [h, w, 3]`` before the transform.
      draw: whether `transform` is random: then it is given a generator of ``(seed, epoch, row)``.
      threads: how many decode.
    """

    blob: Callable[[int], Any]
    where: Callable[[int], str]
    rows: np.ndarray
    transform: Transform = plain
    corrupt: Callable[[np.ndarray, int], np.ndarray] | None = None
    draw: bool = False
    threads: int = THREADS

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.read(np.atleast_1d(np.arange(len(self))[rows]))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.read(np.arange(len(self))), dtype)

    def take(self, rows: np.ndarray) -> "Images":
        """Some rows, still encoded."""
        return dataclasses.replace(self, rows=self.rows[rows])

    def replace(self, **changes) -> "Images":
        """The same images with another transform, corruption or number of threads."""
        return dataclasses.replace(self, **changes)

    def read(self, rows: Sequence[int], seed: int = 0, epoch: int = 0) -> np.ndarray:
        """Decodes some rows: uint8 ``[len(rows), S, S, 3]``.

        Raises:
          BrokenImage: names the file and row that cannot be decoded.
        """
        numbers = [int(row) for row in self.rows[np.asarray(rows, int)]]
        one = lambda row: self._decode(row, seed, epoch)
        if self.threads > 1 and len(numbers) > 1:
            made = list(_pool(self.threads, os.getpid()).map(one, numbers))
        else:
            made = [one(row) for row in numbers]
        if len({x.shape for x in made}) > 1:
            raise ValueError(f"{self.where(numbers[0])}: pictures differ in size; give the suite an image size")
        return np.stack(made) if made else np.empty((0, 1, 1, 3), np.uint8)

    def _decode(self, row: int, seed: int, epoch: int) -> np.ndarray:
        picture = open_image(self.blob(row), self.where, row)
        if self.corrupt is not None:
            picture = Image.fromarray(self.corrupt(np.asarray(picture), row))
        rng = None
        if self.draw:
            rng = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, row, 3]))
        return self.transform(picture, rng)


@functools.cache
def _pool(threads: int, process: int) -> concurrent.futures.ThreadPoolExecutor:
    """The threads that all readers of a process share: suites have dozens of splits, and a fork has no threads."""
    return concurrent.futures.ThreadPoolExecutor(threads, "decode")


def open_image(blob: Any, where: Callable[[int], str], row: int) -> Image.Image:
    """The RGB picture of one row.

    Pixels stay as they are stored, as in torchvision and OpenCLIP, with which the published models were trained: a
    JPEG's orientation tag is not followed (Hugging Face's datasets follow it since March 2024, huggingface/datasets
    6739). Greys of 16 bits count by their high byte, as Pillow reads colours of 16 bits.

    Raises:
      BrokenImage: names the file and row; also of pixels whose range is not known (32 bits, floats).
    """
    if isinstance(blob, np.ndarray):
        return Image.fromarray(blob).convert("RGB")
    try:
        with Image.open(io.BytesIO(blob) if isinstance(blob, bytes) else blob) as picture:
            return _eight_bits(picture).convert("RGB")
    except (OSError, SyntaxError, ValueError, TypeError, AttributeError, Image.DecompressionBombError) as error:
        raise BrokenImage(f"{where(row)}: not a readable image ({error}); replace or remove it") from error


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Greys of 16 bits as such of 8, where ``convert`` would clip all above 255 to white."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {picture.mode}, whose range is not known: save it with 8 or 16 bits")
    return picture


def of_array(images: np.ndarray, name: str) -> Images:
    """Images over an array uint8 ``[N, h, w]`` or ``[N, h, w, 3]`` in memory."""
    return Images(lambda row: images[row], lambda row: f"{name}, row {row}", np.arange(len(images)))
