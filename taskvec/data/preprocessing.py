"""CLIP's preprocessing of pictures, up to uint8 pixels; mean and deviation are the model's business.

The resize is Pillow's, as in the reference, so pixels are the reference's own. Pictures become RGB first, as in
`transformers` (OpenAI and open_clip convert after the crop, which differs for palettes and transparency alone).
"""

import math

import numpy as np
from PIL import Image

from taskvec.data.base import Split
from taskvec.data.lazy import Images, Transform

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def square(size: int) -> Transform:
    """Bilinear resize to ``[size, size, 3]`` without regard to proportions."""
    return lambda picture, rng=None: np.asarray(picture.resize((size, size), BILINEAR))


def clip_eval(size: int, crop: str = "floor") -> Transform:
    """Bicubic resize of the shorter side to `size`, then the central ``[size, size, 3]``.

    Args:
      size: pixels.
      crop: how an odd margin is halved: ``floor`` (transformers' CLIPImageProcessor, FusionBench) or ``round``
        (torchvision, thus OpenAI's and open_clip's transform: Ilharco's line); they differ by at most one pixel.
    """
    half = {"floor": lambda x: x // 2, "round": lambda x: round(x / 2)}
    if crop not in half:
        raise ValueError(f"crop={crop!r}; allowed: {', '.join(half)}")

    def apply(picture: Image.Image, rng=None) -> np.ndarray:
        width, height = picture.size
        short, long = sorted((width, height))
        other = int(size * long / short)
        new = (size, other) if width <= height else (other, size)
        picture = picture.resize(new, BICUBIC) if new != picture.size else picture
        left, top = half[crop](new[0] - size), half[crop](new[1] - size)
        return np.asarray(picture.crop((left, top, left + size, top + size)))

    return apply


def clip_train(size: int, area: tuple[float, float] = (0.9, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)):
    """Random resized crop with open_clip's settings, bicubic, to ``[size, size, 3]``; no flip, as in open_clip.

    A part of the picture, of `area` and aspect `ratio` (uniform in its logarithm), tried ten times, else the centre,
    as in torchvision; the numbers drawn are our own generator's.
    """

    def apply(picture: Image.Image, rng: np.random.Generator) -> np.ndarray:
        box = _random_box(*picture.size, area, ratio, rng)
        return np.asarray(picture.crop(box).resize((size, size), BICUBIC))

    return apply


def augmented(split: Split, size: int) -> Split:
    """The split with `clip_train` in place of its transform, for fine-tuning; the rows are the same.

    Raises:
      TypeError: the split's images are already pixels in memory.
    """
    images = split.inputs.get("image")
    if not isinstance(images, Images):
        raise TypeError("random crops need images that are decoded when asked for; set preprocess='clip' in the suite")
    return split._replace(inputs=split.inputs | {"image": images.replace(transform=clip_train(size), draw=True)})


def _random_box(width: int, height: int, area, ratio, rng) -> tuple[int, int, int, int]:
    for _ in range(10):
        target = width * height * rng.uniform(*area)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
