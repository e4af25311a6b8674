"""The seven corruptions of AdaMerging's robustness table, severities 1 to 5 (Hendrycks, Dietterich, arXiv 1903.12261).

Settings are those of the authors' scripts for CIFAR-10-C (32 px), Tiny ImageNet-C (64) and ImageNet-C (224)
(hendrycks/robustness 8190fe3, ``ImageNet-C/create_c``). FusionBench corrupts photographs of any size with the settings
for 32 px, and its pixelate then returns 32 x 32 pixels whatever came in, which is why every method fails there on Cars:
``pixelate_32`` does that, ``pixelate`` scales with the picture.

What differs from the scripts: the random numbers (ours are a function of seed and row alone), motion blur (the kernel
and offsets of ImageMagick, written out, not its rounding), and the water of spatter (edges and distances by scipy, not
by OpenCV). Values are cut to whole numbers, as there. scipy comes with jax.
"""

import functools
import io
from collections.abc import Callable

import numpy as np
from PIL import Image

SIZES = (32, 64, 224)

# kind -> size -> the setting of severities 1 to 5
SETTINGS = {
    "gaussian_noise": {  # standard deviation, pixels in [0, 1]
        32: (0.04, 0.06, 0.08, 0.09, 0.10),
        64: (0.04, 0.08, 0.12, 0.15, 0.18),
        224: (0.08, 0.12, 0.18, 0.26, 0.38),
    },
    "impulse_noise": {  # share of the values that become 0 or 1
        32: (0.01, 0.02, 0.03, 0.05, 0.07),
        64: (0.01, 0.02, 0.05, 0.08, 0.14),
        224: (0.03, 0.06, 0.09, 0.17, 0.27),
    },
    "motion_blur": {  # radius and standard deviation, pixels
        32: ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        64: ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        224: ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    },
    "contrast": {  # factor on the distance from the mean colour
        32: (0.75, 0.5, 0.4, 0.3, 0.15),
        64: (0.4, 0.3, 0.2, 0.1, 0.05),
        224: (0.4, 0.3, 0.2, 0.1, 0.05),
    },
    "pixelate": {  # factor on both sides
        32: (0.95, 0.9, 0.85, 0.75, 0.65),
        64: (0.9, 0.8, 0.7, 0.6, 0.5),
        224: (0.6, 0.5, 0.4, 0.3, 0.25),
    },
    "jpeg_compression": {  # quality
        32: (80, 65, 58, 50, 40),
        64: (65, 58, 50, 40, 25),
        224: (25, 18, 15, 10, 7),
    },
    "spatter": {  # mean, deviation and blur of the liquid, threshold, strength (mud: blur), whether it is mud
        32: (
            (0.62, 0.1, 0.7, 0.7, 0.5, False),
            (0.65, 0.1, 0.8, 0.7, 0.5, False),
            (0.65, 0.3, 1, 0.69, 0.5, False),
            (0.65, 0.1, 0.7, 0.69, 0.6, True),
            (0.65, 0.1, 0.5, 0.68, 0.6, True),
        ),
        64: (
            (0.62, 0.1, 0.7, 0.7, 0.6, False),
            (0.65, 0.1, 0.8, 0.7, 0.6, False),
            (0.65, 0.3, 1, 0.69, 0.6, False),
            (0.65, 0.1, 0.7, 0.68, 0.6, True),
            (0.65, 0.1, 0.5, 0.67, 0.6, True),
        ),
        224: (
            (0.65, 0.3, 4, 0.69, 0.6, False),
            (0.65, 0.3, 3, 0.68, 0.6, False),
            (0.65, 0.3, 2, 0.68, 0.5, False),
            (0.65, 0.3, 1, 0.65, 1.5, True),
            (0.67, 0.4, 1, 0.65, 1.5, True),
        ),
    },
}
KINDS = tuple(SETTINGS)
WATER, MUD = np.array([175, 238, 238]) / 255, np.array([63, 42, 20]) / 255


def corrupt(image: np.ndarray, kind: str, severity: int, seed: int, row: int, size: int | None = None) -> np.ndarray:
    """A corrupted copy: same shape, uint8; the same arguments give the same bytes.

    Args:
      image: uint8 ``[h, w]`` or ``[h, w, 3]``.
      kind: one of `KINDS`, or ``pixelate_32``, which gives 32 x 32 pixels.
      severity: 1 to 5.
      seed, row: of the random numbers; a row keeps its draws (the blur's angle, the noise) over the severities.
      size: whose settings: 32, 64 or 224; by default those nearest to the shorter side. FusionBench: 32.

    Raises:
      ValueError: names the argument and what is allowed.
    """
    check(kind, severity, size)
    name, size = ("pixelate", 32) if kind == "pixelate_32" else (kind, size)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(f"image is {image.dtype} {image.shape}, want uint8 [h, w] or [h, w, 3]")
    if size is None:
        size = min(SIZES, key=lambda s: abs(np.log(s / min(image.shape[:2]))))
    setting = SETTINGS[name][size][severity - 1]
    rng = np.random.Generator(np.random.Philox(key=[seed, row], counter=[0, 0, 0, 4 + KINDS.index(name)]))
    made = _FUNCTIONS[kind](image, setting, rng)
    return made if made.dtype == np.uint8 else (np.clip(made, 0, 1) * 255).astype(np.uint8)


def check(kind: str, severity: int, size: int | None = None) -> None:
    """Raises `ValueError`, with what is allowed, if there is no such corruption, severity or size of settings."""
    if kind not in _FUNCTIONS:
        raise ValueError(f"unknown corruption {kind!r}; allowed: {', '.join(_FUNCTIONS)}")
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"corruption severity {severity!r}; allowed: 1, 2, 3, 4, 5")
    if size is not None and size not in SIZES:
        raise ValueError(f"corruption size {size}; there are settings for {', '.join(map(str, SIZES))}")


def of_rows(
    kind: str, severity: int, seed: int = 0, size: int | None = None
) -> Callable[[np.ndarray, int], np.ndarray]:
    """What `lazy.Images.replace(corrupt=...)` takes: ``(image, row) -> image``."""
    return functools.partial(_of_row, kind, severity, seed, size)


def _of_row(kind, severity, seed, size, image, row):
    return corrupt(image, kind, severity, seed, row, size)


def _gaussian_noise(image, deviation, rng):
    return image / 255 + rng.normal(size=image.shape, scale=deviation)


def _impulse_noise(image, amount, rng):
    hit, salt = rng.random(image.shape) < amount, rng.random(image.shape) < 0.5
    return np.where(hit, salt.astype(float), image / 255)


def _contrast(image, factor, rng):
    x = image / 255
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * factor + mean


def _motion_blur(image, setting, rng):
    """Mean of the image moved along a line, later steps weigh less: half of a Gaussian, as in ImageMagick."""
    radius, deviation = setting
    angle = np.deg2rad(rng.uniform(-45, 45))
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * deviation**2))
    weights /= weights.sum()
    down, right = np.ceil(steps * np.sin(angle) - 0.5).astype(int), np.ceil(steps * np.cos(angle) - 0.5).astype(int)
    height, width = image.shape[:2]
    rows, columns = np.arange(height), np.arange(width)
    x, out = image / 255, np.zeros(image.shape)
    for weight, dy, dx in zip(weights, down, right, strict=True):
        out += weight * x[np.clip(rows + dy, 0, height - 1)][:, np.clip(columns + dx, 0, width - 1)]
    return out


def _pixelate(image, factor, rng):
    height, width = image.shape[:2]
    small = (max(1, int(width * factor)), max(1, int(height * factor)))
    picture = Image.fromarray(image).resize(small, Image.Resampling.BOX)
    return np.asarray(picture.resize((width, height), Image.Resampling.BOX))


def _pixelate_32(image, factor, rng):
    small = int(32 * factor)
    picture = Image.fromarray(image).resize((small, small), Image.Resampling.BOX)
    return np.asarray(picture.resize((32, 32), Image.Resampling.BOX))


def _jpeg(image, quality, rng):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def _spatter(image, setting, rng):
    from scipy import ndimage

    mean, deviation, blur, threshold, strength, mud = setting
    x = image / 255 if image.ndim == 3 else np.repeat(image[..., None] / 255, 3, 2)
    liquid = ndimage.gaussian_filter(rng.normal(mean, deviation, x.shape[:2]), blur, mode="nearest")
    liquid[liquid < threshold] = 0
    if mud:
        layer = ndimage.gaussian_filter((liquid > threshold).astype(float), strength, mode="nearest")
        layer[layer < 0.8] = 0
        x = x * (1 - layer[..., None]) + MUD * layer[..., None]
    else:
        layer = _drops((np.clip(liquid, 0, 1) * 255).astype(np.uint8))
        x = x + (layer * strength)[..., None] * WATER
    return x if image.ndim == 3 else x.mean(2)


def _drops(liquid: np.ndarray) -> np.ndarray:
    """How strongly water shows, ``[h, w]`` in [0, 1]: the liquid, lit from one side by its distance from its edges."""
    from scipy import ndimage

    edges = _edges(liquid.astype(float), 50, 150)
    if not edges.any():
        layer = liquid.astype(float)
    else:
        distance = np.minimum(ndimage.distance_transform_edt(~edges), 20)
        distance = np.rint(ndimage.uniform_filter(distance, 3, mode="mirror")).astype(int)
        counts = np.cumsum(np.bincount(distance.ravel(), minlength=256))
        least = counts[counts > 0][0]
        equal = np.rint((counts - least) / max(counts[-1] - least, 1) * 255).clip(0)[distance]
        light = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], float)
        lit = np.clip(ndimage.correlate(equal, light, mode="mirror"), 0, 255)
        layer = liquid * ndimage.uniform_filter(lit, 3, mode="mirror")
    return layer / layer.max() if layer.max() > 0 else layer


def _edges(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Canny's edges, bool ``[h, w]``: local maxima of the gradient above `low`, joined to one above `high`."""
    from scipy import ndimage

    dy, dx = ndimage.sobel(x, 0, mode="nearest"), ndimage.sobel(x, 1, mode="nearest")
    size = np.abs(dy) + np.abs(dx)
    around = np.pad(size, 1)
    height, width = x.shape
    at = lambda a, b: around[1 + a : 1 + a + height, 1 + b : 1 + b + width]
    angle = np.rad2deg(np.arctan2(dy, dx)) % 180
    thin = np.zeros(x.shape, bool)
    for middle, (a, b) in {0: (0, 1), 45: (1, 1), 90: (1, 0), 135: (1, -1)}.items():
        near = np.abs((angle - middle + 90) % 180 - 90) <= 22.5
        thin |= near & (size > at(-a, -b)) & (size >= at(a, b))
    weak = thin & (size > low)
    parts, _ = ndimage.label(weak, np.ones((3, 3)))
    return weak & np.isin(parts, np.unique(parts[weak & (size > high)]))


_FUNCTIONS = {
    "gaussian_noise": _gaussian_noise,
    "impulse_noise": _impulse_noise,
    "motion_blur": _motion_blur,
    "contrast": _contrast,
    "pixelate": _pixelate,
    "pixelate_32": _pixelate_32,
    "jpeg_compression": _jpeg,
    "spatter": _spatter,
}
