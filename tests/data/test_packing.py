"""Packed rows of tokens: nothing lost, order kept, few rows and few shapes."""

import numpy as np
import pytest

from taskvec.data import packing


def batch_of(lengths, width=12, seed=0):
    """Sentences whose tokens are all different."""
    lengths = np.asarray(lengths)
    mask = np.arange(width) < lengths[:, None]
    ids = np.where(mask, 1 + np.arange(mask.size).reshape(mask.shape), 0).astype(np.int32)
    return {"ids": ids, "mask": mask, "label": np.arange(len(lengths), dtype=np.int32), "teacher": np.eye(len(lengths))}


def pack(lengths, length=12, multiple=1, width=12):
    return packing.packed(batch_of(lengths, width), length, multiple=multiple)


AWKWARD = {
    "mixed": [3, 12, 1, 7, 5, 2, 9, 1],
    "one token each": [1] * 13,
    "full rows": [12] * 3,
    "all equal": [5] * 7,
    "one sentence": [4],
    "an empty one": [4, 0, 12, 8],
}


@pytest.mark.parametrize("lengths", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.parametrize("length", [12, 17])
def test_every_sentence_stands_whole_at_its_place(lengths, length):
    plain, out = batch_of(lengths), pack(lengths, length)
    assert {k: (x.dtype, x.shape[1:]) for k, x in out.items() if k in ("ids", "sentence", "first")} == {
        "ids": (np.int32, (length,)), "sentence": (np.int32, (length,)), "first": (np.int32, ()),
    }  # fmt: skip
    seen = np.zeros(out["ids"].size, bool)
    for number, n in enumerate(lengths):
        at = np.arange(n) + out["first"][number]
        assert len(set(at // length)) <= 1, "a sentence is cut"
        np.testing.assert_array_equal(out["ids"].ravel()[at], plain["ids"][number, :n])
        np.testing.assert_array_equal(out["sentence"].ravel()[at], number)
        seen[at] = True
    assert seen.sum() == sum(lengths)
    assert (out["ids"].ravel()[~seen] == 0).all() and (out["sentence"].ravel()[~seen] == -1).all()


def test_types_go_with_their_tokens():
    plain = batch_of(AWKWARD["mixed"])
    plain["type_ids"] = np.where(plain["mask"], plain["ids"] % 2, 0).astype(np.int32)
    out = packing.packed(plain, 12)
    assert out["type_ids"].dtype == np.int32 and out["type_ids"].any()
    np.testing.assert_array_equal(out["type_ids"], out["ids"] % 2)


def test_other_keys_pass_unchanged():
    plain, out = batch_of(AWKWARD["mixed"]), pack(AWKWARD["mixed"])
    assert set(out) == {"ids", "sentence", "first", "label", "teacher"}
    assert all(np.array_equal(out[key], plain[key]) for key in ("label", "teacher"))


@pytest.mark.parametrize(
    ("lengths", "multiple", "rows"),
    [
        ([3, 12, 1, 7, 5, 2, 9, 1], 1, 4),  # 40 tokens: 12, 9 + 3, 7 + 5, 2 + 1 + 1
        ([3, 12, 1, 7, 5, 2, 9, 1], 3, 6),
        ([6, 6, 6, 6], 1, 2),
        ([7, 7, 7], 1, 3),
        ([1] * 12, 1, 1),
    ],
)
def test_rows_are_few(lengths, multiple, rows):
    assert pack(lengths, multiple=multiple)["ids"].shape == (rows, 12)


def test_batches_of_a_suite_share_a_shape_and_fuller_ones_get_more_rows():
    rng = np.random.default_rng(0)
    lengths = [rng.integers(2, 8, 200), rng.integers(4, 13, 200)]
    join = packing.joiner(lengths, 12)
    tokens = lambda n: {k: x for k, x in batch_of(n).items() if k in ("ids", "mask")}
    draw = lambda: [tokens(rng.choice(x, 16)) for x in lengths]
    shapes = [join(draw())["ids"].shape for _ in range(50)]
    common = max(set(shapes), key=shapes.count)
    assert shapes.count(common) >= 48 and common[0] * 12 < 1.5 * 16 * sum(x.mean() for x in lengths)
    assert join([tokens([12] * 16)] * 2)["ids"].shape == (32, 12)


def test_errors():
    with pytest.raises(ValueError, match="a sentence has 9 tokens, a row 8"):
        pack([3, 9], length=8)
    with pytest.raises(ValueError, match="multiple=0"):
        pack([3], multiple=0)
    left = batch_of([3, 2]) | {"mask": batch_of([3, 2])["mask"][:, ::-1]}
    with pytest.raises(ValueError, match="padding after the tokens"):
        packing.packed(left, 12)
