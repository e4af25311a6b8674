"""Batches: pure in the step, every row where it should be, few shapes."""

import numpy as np
import pytest

from taskvec.data import batches
from taskvec.data.base import Split


def text_split(n=50, longest=40, seed=0):
    lengths = np.random.default_rng(seed).integers(2, longest + 1, n)
    mask = np.arange(longest) < lengths[:, None]
    ids = np.where(mask, np.arange(1, n + 1)[:, None], 0).astype(np.int32)  # a row's tokens are its number + 1
    return Split({"ids": ids, "mask": mask}, np.arange(n, dtype=np.int32))


def image_split(n=20, size=4):
    return Split({"image": np.zeros((n, size, size, 3), np.uint8)}, np.arange(n, dtype=np.int32))


@pytest.mark.parametrize("window", [1, 3])
def test_training_batches_cover_an_epoch_and_resume(window):
    get = batches.training_batches(text_split(), 8, 100, seed=1, window=window)
    seen = np.concatenate([get(step)["label"] for step in range(6)])
    assert len(set(seen)) == 48
    again = batches.training_batches(text_split(), 8, 100, seed=1, window=window)
    for step in (57, 3, 99, 0):
        a, b = get(step), again(step)
        assert all(np.array_equal(a[key], b[key]) for key in a)
        np.testing.assert_array_equal(a["ids"][:, 0], a["label"] + 1)
        assert a["ids"].dtype == np.int32 and a["mask"].dtype == bool and a["label"].dtype == np.int32
        assert a["ids"].shape[1] % 16 == 0
    other = batches.training_batches(text_split(), 8, 100, seed=2, window=window)
    assert not np.array_equal(get(0)["label"], other(0)["label"])
    assert not np.array_equal(get(0)["label"], get(6)["label"])


def test_windows_pad_less():
    padded = {
        window: sum(get(step)["ids"].size for step in range(12))
        for window in (1, 4)
        for get in [batches.training_batches(text_split(200), 16, 12, 0, length_multiple=8, window=window)]
    }
    assert padded[4] < 0.8 * padded[1]


def test_training_batches_errors():
    with pytest.raises(ValueError, match="batch_size=51, but there are 50 rows"):
        batches.training_batches(text_split(), 51, 10, 0)
    with pytest.raises(IndexError, match="step 10 of 10"):
        batches.training_batches(text_split(), 5, 10, 0)(10)


@pytest.mark.parametrize("split", [text_split(), image_split()])
def test_eval_batches_give_every_row_once(split):
    out = list(batches.eval_batches(split, 16))
    index = np.concatenate([b["index"] for b in out])
    weight = np.concatenate([b["weight"] for b in out])
    labels = np.concatenate([b["label"] for b in out])
    np.testing.assert_array_equal(weight, index >= 0)
    assert sorted(index[index >= 0]) == list(range(len(split.labels)))
    np.testing.assert_array_equal(labels[index >= 0], index[index >= 0])
    assert all(len(b["label"]) == 16 for b in out)
    if "ids" in split.inputs:
        widths = [b["ids"].shape[1] for b in out]
        assert widths == sorted(widths) and set(widths) <= {16, 32, 48}
        for b in out:
            np.testing.assert_array_equal(b["mask"].sum(1), split.inputs["mask"].sum(1)[b["label"]])


@pytest.mark.parametrize("split", [text_split(), image_split()])
def test_eval_batches_of_processes_make_up_the_batch(split):
    whole = list(batches.eval_batches(split, 12))
    parts = [list(batches.eval_batches(split, 12, process_index=p, process_count=3)) for p in range(3)]
    for batch, *own in zip(whole, *parts, strict=True):
        for key, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[key] for part in own]), value)
    assert all(len(part["label"]) == 4 for own in parts for part in own)
    with pytest.raises(ValueError, match="batch_size=16 is not divisible by process_count=3"):
        next(batches.eval_batches(split, 16, process_count=3))


def test_rows_are_taken_and_joined_in_order():
    splits, rows = [text_split(50, 40), text_split(30, 20, seed=1)], [np.array([7, 3, 49]), np.array([0, 29, 5])]
    batch = batches.join([batches.take(split, r) for split, r in zip(splits, rows, strict=True)])
    assert set(batch) == {"ids", "mask"} and batch["ids"].shape[0] == 6 and batch["ids"].shape[1] % 16 == 0
    np.testing.assert_array_equal(batch["ids"][:, 0] - 1, np.concatenate(rows))
    for t, split in enumerate(splits):
        np.testing.assert_array_equal(batch["mask"][3 * t : 3 * t + 3].sum(1), split.inputs["mask"].sum(1)[rows[t]])
    assert batches.join([batches.take(image_split(), np.arange(2))] * 3)["image"].shape == (6, 4, 4, 3)
