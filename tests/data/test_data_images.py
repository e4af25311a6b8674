"""Image tasks: files, resizing, the restricted pickle, and the sets of the registry."""

import numpy as np
import pytest

from taskvec.data import images


def arrays(**changes):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (9, 6, 6), dtype=np.uint8)
    y = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2], np.int16)
    made = {"x_train": x[:6], "y_train": y[:6], "x_test": x[6:], "y_test": y[6:], "classes": np.array(["a", "b", "c"])}
    return {key: value for key, value in (made | changes).items() if value is not None}


def save(path, **changes):
    np.savez(path, **arrays(**changes))
    return path


def test_npz(tmp_path):
    task = images.npz(save(tmp_path / "a.npz"), "a")
    assert task.classes == ("a", "b", "c") and task.train.inputs["raw"].shape == (6, 6, 6)
    assert images.npz(save(tmp_path / "b.npz", classes=None), "b").classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, r"b\.npz: no array y_test; it holds"),
        ({"x_train": np.zeros((6, 6, 6), np.float32)}, r"x_train is float32 \(6, 6, 6\), want uint8"),
        ({"x_test": np.zeros((3, 6, 6, 4), np.uint8)}, r"x_test is uint8"),
        ({"y_train": np.array([0, 1, 2, 3, 0, 0])}, "task b: train row 3 has label 3, allowed 0 to 2"),
        ({"y_train": np.array([0, 1])}, "train has 2 labels"),
    ],
)
def test_bad_npz(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        images.npz(save(tmp_path / "b.npz", **changes), "b")


def test_npz_overlap_is_dropped(tmp_path):
    a = arrays()
    a["x_test"][0] = a["x_train"][2]
    np.savez(tmp_path / "a.npz", **a)
    assert len(images.npz(tmp_path / "a.npz", "a").test.labels) == 2


def test_resize():
    grey = np.full((2, 8, 8), 200, np.uint8)
    out = images.resize(grey, 16)
    assert out.shape == (2, 16, 16, 3) and out.dtype == np.uint8 and (out == 200).all()
    colour = np.zeros((1, 8, 8, 3), np.uint8)
    colour[..., 1] = 9
    np.testing.assert_array_equal(images.resize(colour, 4)[0, 0, 0], [0, 9, 0])
    assert images.resize(grey[:0], 4).shape == (0, 4, 4, 3)


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("the pickle ran code",))


def test_near_copies():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (6, 8, 8), dtype=np.uint8)
    x[1] = x[0] ^ 1  # nearly the same
    x[2] = x[1][:, ::-1]  # mirrored, so joined to 0 through 1
    x[3] = x[0]  # the same, but of another class
    x[5] = 0
    np.testing.assert_array_equal(images.near_copies(x, np.array([0, 0, 0, 1, 0, 0]), 0.06), [0, 0, 0, 3, 4, 5])


EXPECTED = {"digits": (8, 1442, 355), "mnist5k": (28, 4000, 1000), "animals": (28, 7847, 1869)}


@pytest.mark.parametrize("name", images.TASKS)
def test_registry(name):
    task = images.TASKS[name]()
    x = {split: getattr(task, split).inputs["raw"] for split in ("train", "test")}
    assert (x["train"].shape[1], len(x["train"]), len(x["test"])) == EXPECTED[name]
    assert x["train"].dtype == np.uint8 and x["train"].max() == 255 and len(task.classes) == 10
    assert len({row.tobytes() for split in x.values() for row in split}) == sum(map(len, x.values()))
    assert np.bincount(task.test.labels, minlength=10).min() > 30
