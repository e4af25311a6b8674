"""CLIP's preprocessing against outputs of transformers and torchvision (recorded by tests/parity)."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from taskvec.data import base, images, lazy, preprocessing
from tests.data.pictures_for_tests import picture

RECORDED = np.load(pathlib.Path(__file__).parent / "recorded" / "preprocessing.npz")
NAMES = sorted({key.partition("_")[0] for key in RECORDED})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("crop", "reference"), [("floor", "transformers"), ("round", "torchvision")])
def test_clip_eval_equals_the_reference(name, crop, reference):
    made = preprocessing.clip_eval(24, crop)(Image.fromarray(RECORDED[f"{name}_input"]))
    assert np.abs(made - RECORDED[f"{name}_{reference}"].astype(float)).max() < 1e-3 * 255


def test_crop_is_checked():
    with pytest.raises(ValueError, match="allowed: floor, round"):
        preprocessing.clip_eval(8, "up")


@pytest.mark.parametrize("size", [(20, 16), (60, 5), (5, 60)])
def test_random_boxes(size):
    """Parts of the picture with the area and aspect asked for; long pictures fall back to their centre."""
    rng = np.random.default_rng(0)
    boxes = np.array([preprocessing._random_box(*size, (0.9, 1.0), (3 / 4, 4 / 3), rng) for _ in range(50)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes >= 0).all() and (boxes[:, 2] <= size[0]).all() and (boxes[:, 3] <= size[1]).all()
    assert (np.abs(np.log(w / h)) < np.log(4 / 3) + 0.2).all()
    if size == (20, 16):
        assert (w * h > 0.8 * 320).all() and len(np.unique(boxes, axis=0)) > 5
    assert preprocessing.clip_train(8)(Image.fromarray(picture(0, size)), rng).shape == (8, 8, 3)


def test_tasks_are_encoded_and_augmented():
    array = np.stack([picture(i) for i in range(4)])
    split = base.Split({"raw": array}, np.array([0, 1, 0, 1], np.int32))
    task = base.Task("t", ("a", "b"), split, split, split)
    assert isinstance(images.encode_task(task, 8).test.inputs["image"], np.ndarray)
    clip = images.encode_task(task, 8, "clip")
    assert isinstance(clip.train.inputs["image"], lazy.Images)
    np.testing.assert_array_equal(
        clip.train.inputs["image"][1][0], preprocessing.clip_eval(8)(Image.fromarray(array[1]))
    )
    train = preprocessing.augmented(clip.train, 8).inputs["image"]
    assert (train.read([0], 1, 1) != train.read([0], 1, 2)).any()
    with pytest.raises(TypeError, match="preprocess='clip'"):
        preprocessing.augmented(images.encode_task(task, 8).train, 8)
    with pytest.raises(ValueError, match="allowed: square, clip, clip_round"):
        images.encode_task(task, 8, "crop")
