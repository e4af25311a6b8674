"""Corruptions: reproducible, shape and dtype kept, worse with severity; the known values of the simple ones."""

import numpy as np
import pytest

from taskvec.data import corruptions, lazy
from tests.data.pictures_for_tests import picture

PHOTO = {size: picture(5, (size + 8, size)) for size in corruptions.SIZES}


def distance(image, kind, severity, rows=range(3)):
    made = [corruptions.corrupt(image, kind, severity, 0, row) for row in rows]
    return np.mean([np.abs(m.astype(float) - image).mean() for m in made])


@pytest.mark.parametrize("size", corruptions.SIZES)
@pytest.mark.parametrize("kind", corruptions.KINDS)
def test_severity(kind, size):
    """More severe is farther from the clean picture; spatter turns from water to mud at 4, so only its ends compare.

    At 32 pixels motion blur's severities 3 and 4 differ in the tail of the kernel alone.
    """
    image = PHOTO[size]
    distances = [distance(image, kind, severity) for severity in range(1, 6)]
    assert distances[0] > 0 or (kind, size) == ("spatter", 32)
    if kind == "spatter":
        assert distances[4] > distances[0]
    elif kind == "pixelate":  # sizes are whole numbers, which do not fall on the pixels alike
        assert distances[4] > distances[2] > 0 and distances[4] > 1.2 * distances[0]
    else:
        assert (np.diff(distances) > (-0.02 if (kind, size) == ("motion_blur", 32) else 0)).all(), distances


@pytest.mark.parametrize("kind", corruptions.KINDS)
def test_reproducible_and_of_one_shape(kind):
    image = PHOTO[32]
    x = corruptions.corrupt(image, kind, 4, 7, 3)
    assert x.shape == image.shape and x.dtype == np.uint8
    np.testing.assert_array_equal(x, corruptions.corrupt(image, kind, 4, 7, 3))
    if kind in ("gaussian_noise", "impulse_noise", "motion_blur", "spatter"):
        other = [corruptions.corrupt(image, kind, 4, 7, row) for row in range(4, 9)]
        assert any((x != y).any() for y in other)
    grey = corruptions.corrupt(image[..., 0], kind, 4, 7, 3)
    assert grey.shape == image.shape[:2] and grey.dtype == np.uint8


def test_values():
    half = np.full((64, 64, 3), 128, np.uint8)
    half[:32] = 64
    x = corruptions.corrupt(half, "contrast", 5, 0, 0, size=32) / 255  # mean 96, factor 0.15
    np.testing.assert_allclose([x[0, 0, 0] * 255, x[63, 0, 0] * 255], [96 - 4.8, 96 + 4.8], atol=1)
    noisy = corruptions.corrupt(half, "gaussian_noise", 3, 0, 0, size=32) / 255
    np.testing.assert_allclose((noisy - half / 255).std(), 0.08, rtol=0.05)
    spots = corruptions.corrupt(half, "impulse_noise", 5, 0, 0, size=224) != half
    np.testing.assert_allclose(spots.mean(), 0.27, atol=0.02)
    flat = np.full((40, 40, 3), 90, np.uint8)
    for kind in ("motion_blur", "pixelate", "jpeg_compression", "contrast"):
        np.testing.assert_allclose(corruptions.corrupt(flat, kind, 5, 0, 0).astype(int), 90, atol=1)


def test_motion_blur_moves_along_a_line():
    dot = np.zeros((41, 41, 3), np.uint8)
    dot[20, 20] = 255
    x = corruptions.corrupt(dot, "motion_blur", 5, 0, 1, size=32)[..., 0]
    rows, columns = np.nonzero(x)
    assert len(rows) > 4 and columns.max() <= 20 and x[20, 20] == x.max()
    off = np.polyval(np.polyfit(columns, rows, 1), columns) - rows
    assert np.abs(off).max() < 1


def test_settings_follow_the_size():
    for size, image in PHOTO.items():
        chosen = corruptions.corrupt(image, "gaussian_noise", 5, 0, 0)
        np.testing.assert_array_equal(chosen, corruptions.corrupt(image, "gaussian_noise", 5, 0, 0, size=size))
    assert corruptions.corrupt(PHOTO[224], "pixelate_32", 3, 0, 0).shape == (32, 32, 3)
    assert all(len(by_size[size]) == 5 for by_size in corruptions.SETTINGS.values() for size in corruptions.SIZES)


def test_images_are_corrupted_by_row():
    clean = lazy.of_array(np.stack([picture(i) for i in range(3)]), "x")
    made = clean.replace(corrupt=corruptions.of_rows("gaussian_noise", 2, seed=1))
    expected = corruptions.corrupt(picture(2), "gaussian_noise", 2, 1, 2)
    np.testing.assert_array_equal(made.take(np.array([2, 0])).read([0])[0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "snow"}, "unknown corruption 'snow'; allowed: gaussian_noise"),
        ({"severity": 0}, "severity 0; allowed: 1, 2, 3, 4, 5"),
        ({"size": 128}, "settings for 32, 64, 224"),
        ({"image": np.zeros((4, 4, 3), np.float32)}, r"image is float32 \(4, 4, 3\)"),
        ({"image": np.zeros((4, 4, 4), np.uint8)}, r"image is uint8 \(4, 4, 4\)"),
    ],
)
def test_errors(change, message):
    call = {"image": PHOTO[32], "kind": "contrast", "severity": 1, "seed": 0, "row": 0} | change
    with pytest.raises(ValueError, match=message):
        corruptions.corrupt(**call)
