"""Suites described by a file."""

import json

import numpy as np
import pytest

from taskvec.data import base, suites
from tests.data.pictures_for_tests import folders

SIZES = {"train": 4, "held_out": None, "test": None}

IMAGES = """
kind: image
tasks:
  dots:
    format: folder
    train: dots/train
    test: dots/test
    held_out: dots/val
    classes: [a small dot, a Big dot]
    templates: prompts.txt
  noise: {format: npz, file: noise.npz}
  rows:
    format: jsonl
    train: rows_train.jsonl
    test: rows_test.jsonl
    columns: {image: file, label: kind}
    classes: [big, small]
"""


@pytest.fixture
def home(tmp_path):
    (tmp_path / "suite.yaml").write_text(IMAGES)
    (tmp_path / "prompts.txt").write_text("a photo of {}.\n{}\n")
    for which, count in (("train", 3), ("val", 1), ("test", 2)):
        folders(tmp_path / "dots" / which, ["x", "y"], count)
    x = np.random.default_rng(0).integers(0, 256, (12, 5, 5), dtype=np.uint8)
    y = np.arange(12) % 2
    np.savez(tmp_path / "noise.npz", x_train=x[:8], y_train=y[:8], x_test=x[8:], y_test=y[8:])
    for which in ("train", "test"):
        rows = [
            {"file": f"dots/{which}/{f}/{i}.png", "kind": k} for f, k in (("x", "small"), ("y", "big")) for i in (0, 1)
        ]
        (tmp_path / f"rows_{which}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def spec(home, *tasks, **changes):
    return {"kind": "image", "tasks": tasks, "source": str(home / "suite.yaml"), "image_size": 6, **SIZES, **changes}


def test_images(home):
    dots, noise, rows = suites.load_suite(spec(home, "dots", "noise", "rows"))
    assert dots.classes == ("a small dot", "a Big dot") and rows.classes == ("big", "small")
    assert [len(getattr(dots, s).labels) for s in base.SPLITS] == [4, 2, 4]
    assert dots.test.labels.tolist().count(1) == 2 and rows.test.labels.tolist().count(0) == 2
    assert dots.test.inputs["image"][:].shape == (4, 6, 6, 3) and noise.test.inputs["image"].shape == (4, 6, 6, 3)
    assert suites.available("image", str(home / "suite.yaml")) == ["dots", "noise", "rows"]
    assert suites.classes_and_templates(spec(home, "dots")) == [(dots.classes, ("a photo of {}.", "{}"))]
    with pytest.raises(ValueError, match="no class names and templates for rows: set family, or describe"):
        suites.classes_and_templates(spec(home, "dots", "rows"))


def test_protocol_follows_the_files(home):
    tag = suites.protocol(spec(home, "dots", "rows"))
    assert tag.startswith("image/described-") and suites.protocol(spec(home, "dots", "rows", seed=3)) == tag
    assert suites.protocol(spec(home, "dots", "rows", preprocess="clip")) != tag
    (home / "dots" / "test" / "x" / "0.png").unlink()
    assert suites.protocol(spec(home, "dots", "rows")) != tag


def test_texts(tmp_path, tokenizer_folder):
    for which in ("train", "test"):
        rows = [{"a": f"the film {which} {i}", "b": "good", "y": ("no", "yes")[i % 2]} for i in range(4)]
        (tmp_path / f"{which}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "format": "jsonl",
        "train": "train.jsonl",
        "test": "test.jsonl",
        "columns": {"text": ["a", "b"], "label": "y"},
    }
    (tmp_path / "suite.json").write_text(json.dumps({"kind": "text", "tasks": {"pairs": task}}))
    asked = {"kind": "text", "tasks": ["pairs"], "source": str(tmp_path / "suite.json"), "train": 3, "held_out": 1}
    (made,) = suites.load_suite(asked | {"test": 2}, tokenizer_folder)
    assert made.classes == ("no", "yes") and made.test.inputs["ids"].shape[0] == 2
    with pytest.raises(ValueError, match="describes text tasks, the suite is of kind image"):
        suites.load_suite(asked | {"kind": "image"})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: image", "kind: audio", "kind is 'audio'; allowed: text, image"),
        ("format: folder", "format: zip", "task dots: format is 'zip'; allowed for image: folder, parquet"),
        ("train: dots/train", "trian: dots/train", "task dots: unknown keys trian"),
        ("    test: dots/test\n", "", "task dots: no test"),
        ("[a small dot, a Big dot]", "[a, b, c]", "3 class names are described, the data have 2"),
        ("classes: [big, small]", "classes: [big, tiny]", r"rows_train\.jsonl, line 1: unknown class 'small'"),
        ("{image: file, label: kind}", "{picture: file}", "columns .* allowed: image, label"),
        ("tasks:", "tasks: [", "not YAML or JSON"),
        ("tasks:", "set:", "want the keys kind and tasks"),
    ],
)
def test_errors(home, old, new, message):
    (home / "suite.yaml").write_text(IMAGES.replace(old, new))
    with pytest.raises(ValueError, match=message):
        suites.load_suite(spec(home, "dots", "noise", "rows"))


def test_missing_files(home):
    (home / "prompts.txt").write_text("a photo\n")
    with pytest.raises(ValueError, match=r"template 'a photo' must have \{\} once"):
        suites.load_suite(spec(home, "dots"))
    (home / "prompts.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"templates file .*prompts\.txt does not exist"):
        suites.load_suite(spec(home, "dots"))
    with pytest.raises(FileNotFoundError):
        suites.load_suite(spec(home, "dots", source=str(home / "other.yaml")))
