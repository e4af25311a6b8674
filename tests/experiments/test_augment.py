"""Random views: on a picture whose colours say where a pixel came from, so that every crop can be read off."""

import numpy as np
import pytest

from experiments import augment, learning
from taskvec.adaptive import rows as rows_lib
from taskvec.data import lazy, preprocessing
from taskvec.data.base import Split

SIDE, SIZE, COUNT = 240, 24, 12


def pictures():
    """Red is the column, green the row, blue the number of the picture."""
    at = np.arange(SIDE, dtype=np.uint8)
    one = lambda i: np.stack([np.tile(at, (SIDE, 1)), np.tile(at[:, None], (1, SIDE)), np.full((SIDE, SIDE), i)], -1)
    return np.stack([one(i) for i in range(COUNT)]).astype(np.uint8)


def read_off(views_BxSxSx3):
    """Of every view its width and height in the picture, and whether it is mirrored."""
    red, green = views_BxSxSx3[..., 0].astype(int), views_BxSxSx3[..., 1].astype(int)
    across, down = red[:, 0, -1] - red[:, 0, 0], green[:, -1, 0] - green[:, 0, 0]
    return np.abs(across) * SIZE / (SIZE - 1), down * SIZE / (SIZE - 1), across < 0


@pytest.mark.parametrize(
    ("name", "least", "mirrors"), [("atlas_few_shot", 0.5, True), ("atlas", 0.9, False), ("atlas_negation", 0.9, False)]
)
def test_crops_are_of_the_published_size(name, least, mirrors):
    take = augment.take(name, [Split({"image": pictures()}, np.zeros(COUNT, np.int32))], SIZE, seed=3)
    rows = np.tile(np.arange(COUNT), 8)
    views = take(0, rows)["image"]
    assert views.shape == (96, SIZE, SIZE, 3) and views.dtype == np.uint8
    np.testing.assert_array_equal(views[..., 2], rows[:, None, None] * np.ones((SIZE, SIZE), int))
    width, height, mirrored = read_off(views)
    area = width * height / SIDE**2
    assert least - 0.05 < area.min() < least + 0.1 and 0.9 < area.max() < 1.05 and (height > 0).all()
    assert width.std() > 2 and height.std() > 2
    assert 30 < mirrored.sum() < 66 if mirrors else not mirrored.any()


def test_views_are_functions_of_seed_and_rows():
    images = lazy.of_array(pictures(), "task").replace(transform=preprocessing.square(SIZE))
    draw = lambda images, rows, seed=0: augment.drawn(images, augment.crop_and_flip(SIZE), seed)(np.array(rows))
    first = draw(images, [4, 4, 7])
    np.testing.assert_array_equal(first, draw(images, [4, 4, 7]))
    np.testing.assert_array_equal(first, draw(pictures(), [4, 4, 7]))  # encoded or not, decoded in threads or not
    np.testing.assert_array_equal(first, draw(images.replace(threads=1), [4, 4, 7]))
    others = [first[1], draw(images, [4, 7, 4])[0], draw(images, [4, 4, 7], 1)[0], draw(images, [4, 5, 7])[0]]
    assert all(not np.array_equal(first[0], other) for other in others)
    part = images.take(np.array([4, 7]))
    np.testing.assert_array_equal(first, draw(part, [0, 0, 1]))
    dark = images.replace(corrupt=lambda pixels, row: np.where(np.arange(3) == 2, 100 + row, pixels).astype(np.uint8))
    assert [view[0, 0, 2] for view in draw(dark, [4, 7])] == [104, 107]


def test_the_strong_view_is_the_second():
    images = lazy.of_array(pictures(), "task").replace(transform=preprocessing.square(SIZE))
    take = augment.take("atlas_ufm", [Split({"image": images}, np.zeros(COUNT, np.int32))], SIZE, seed=0)
    rows = rows_lib.Rows((COUNT,), take)
    assert rows_lib.has_views(rows)
    batch = rows_lib.views(rows).batch([np.array([2, 5])])["image"]
    np.testing.assert_array_equal(batch[:2], images[[2, 5]])
    assert batch[:, 0, 0, 2].tolist() == [2, 5, 2, 5] and not np.array_equal(batch[2:], batch[:2])


def test_texts_have_no_crops():
    class Suite:
        kind, tasks = "text", ("a", "b")

    with pytest.raises(ValueError, match="augment is for images"):
        learning.check("a", "atlas_ufm", {"augment": True}, Suite)
    with pytest.raises(ValueError, match="budget=2, but the other tasks are 1"):
        learning.check("b", "atlas_few_shot", {"budget": 2}, Suite)
