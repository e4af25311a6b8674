"""Checks of tasks, drawing of rows, the fixed division."""

import numpy as np
import pytest

from taskvec.data import base


def toy(n_train=20, n_test=10, labels=None):
    def rows(prefix, n):
        return [f"{prefix} {i}" for i in range(n)], [i % 2 for i in range(n)]

    train, test = rows("train", n_train), rows("test", n_test)
    return base.task("toy", ("a", "b"), (train[0], labels or train[1]), test, "text")


def texts(split):
    return list(split.inputs["text"])


def test_label_out_of_range_names_task_row_and_range():
    with pytest.raises(ValueError, match=r"task toy: train row 3 has label 7, allowed 0 to 1 \(2 rows"):
        toy(labels=[0, 1, 0, 7, -1] + [0] * 15)


def test_empty_split_and_mismatched_lengths():
    with pytest.raises(ValueError, match="task toy: test is empty"):
        toy(n_test=0)
    with pytest.raises(ValueError, match=r"train has 3 labels but rows \{'text': 20\}"):
        toy(labels=[0, 1, 0])
    with pytest.raises(ValueError, match="at least 2 classes"):
        base.task("toy", ("a",), (["x"], [0]), (["y"], [0]), "text")


def test_subsample_is_a_pure_function_of_the_seed():
    one, same, other = (base.subsample(toy(), 8, 4, 5, seed) for seed in (3, 3, 4))
    for which in base.SPLITS:
        assert texts(getattr(one, which)) == texts(getattr(same, which))
    assert texts(one.train) != texts(other.train)
    assert texts(one.test) == texts(other.test)
    assert texts(base.subsample(toy(), 8, 4, 5, 3, test_seed=1).test) != texts(one.test)
    assert not set(texts(one.train)) & set(texts(one.held_out))
    assert all(text.startswith("train") for text in texts(one.held_out))


def test_subsample_of_more_rows_is_a_superset():
    few, many = base.subsample(toy(), 4, 2, 3, 0), base.subsample(toy(), 12, 5, 6, 0)
    for which in base.SPLITS:
        assert set(texts(getattr(few, which))) < set(texts(getattr(many, which)))


def test_subsample_gives_every_class_a_training_row(caplog):
    labels = [0] * 200 + list(range(10))
    task = base.task("toy", range(10), ([str(i) for i in range(210)], labels), (["x"], [0]), "text")
    for seed in range(5):
        assert set(base.subsample(task, 12, 20, 1, seed).train.labels) == set(range(10))
    assert not caplog.text
    base.subsample(task, 8, 20, 1, 0)
    assert "2 of 10 classes have no training row" in caplog.text


def test_subsample_of_too_many_rows(caplog):
    with pytest.raises(ValueError, match="train=18 and held_out=3 ask for 21 rows, there are 20"):
        base.subsample(toy(), 18, 3, 5, 0)
    for held_out in (20, 25):
        with pytest.raises(ValueError, match=f"held_out={held_out} leaves none of 20 training rows .*allowed 0 to 19"):
            base.subsample(toy(), None, held_out, 5, 0)
    assert len(base.subsample(toy(), None, 19, 5, 0).train.labels) == 1
    assert len(base.subsample(toy(), 5, 0, 99, 0).test.labels) == 10
    assert "99 test rows asked" in caplog.text


def test_divide_is_stratified_and_keeps_groups_whole():
    labels = np.repeat([0, 1, 2], [100, 50, 30])
    train, test = base.divide(labels, 0.2)
    assert sorted([*train, *test]) == list(range(180))
    np.testing.assert_array_equal(np.bincount(labels[test]), [20, 10, 6])
    groups = np.arange(180) // 3
    train, test = base.divide(labels, 0.2, groups)
    assert not set(groups[train]) & set(groups[test])
    assert (np.abs(np.bincount(labels[test]) - [20, 10, 6]) <= 3).all()


def test_unique_rows_drops_contradictions():
    np.testing.assert_array_equal(base.unique_rows(["a", "b", "a", "c", "b"], [0, 1, 0, 2, 0]), [0, 3])


def test_drop_overlap(caplog):
    task = base.task("toy", "ab", (["x", "y"], [0, 1]), (["y", "z"], [1, 0]), "text")
    assert texts(base.drop_overlap(task).test) == ["z"]
    assert "dropped 1 test rows" in caplog.text
    with pytest.raises(ValueError, match="test is empty"):
        base.drop_overlap(base.task("toy", "ab", (["x", "y"], [0, 1]), (["y"], [1]), "text"))
