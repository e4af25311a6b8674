"""Tokens, JSON-lines files, and the text tasks of the registry."""

import json

import numpy as np
import pytest

from taskvec.data import base, text, text_registry, wheels


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def row(split, text, label):
    return {"split": split, "text": text, "label": label}


GOOD = [row("train", "one", 0), row("train", "two", 1), row("test", "three", 1)]


def test_encode(tokenizer_folder, caplog):
    tokenizer = text.load_tokenizer(tokenizer_folder)
    out = text.encode(np.array(["good film", "the bad film of the"], object), tokenizer, 10)
    np.testing.assert_array_equal(out["ids"], [[2, 8, 7, 3, 0, 0, 0], [2, 4, 9, 7, 6, 4, 3]])
    np.testing.assert_array_equal(out["mask"].sum(1), [4, 7])
    assert out["ids"].dtype == np.int32 and out["mask"].dtype == bool
    assert not caplog.text
    task = base.task("films", "ab", (["the bad film of the", "bad"], [0, 1]), (["a film"], [0]), "text")
    for side, kept in (("right", [2, 4, 9, 3]), ("left", [2, 6, 4, 3])):
        cut = text.encode_task(task, tokenizer, 4, side)
        np.testing.assert_array_equal(cut.train.inputs["ids"], [kept, [2, 9, 3, 0]])
    ends = [f"task films, train: 1 of 2 texts are cut to 4 tokens, at their {end}" for end in ("end", "beginning")]
    assert [record.getMessage() for record in caplog.records] == ends


def test_tokens_that_the_model_has_not():
    def task(**inputs):
        split = base.Split({"ids": np.array([[1, 2], [3, 9]]), **inputs}, np.arange(2))
        return base.Task("a", ("x", "y"), base.take(split, np.arange(1)), base.take(split, np.arange(0)), split)

    text.check_ids(task(type_ids=np.ones((2, 2), int)), 10)
    with pytest.raises(ValueError, match="test row 1 has ids 9 at token 1, the model has 0 to 8; the tokenizer"):
        text.check_ids(task(), 9)
    for key, value in (("target", 11), ("type_ids", 2)):
        with pytest.raises(ValueError, match=f"task a: test row 1 has {key} {value} at token 0"):
            text.check_ids(task(**{key: np.array([[0], [value]])}), 10, 2)


def test_missing_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        text.load_tokenizer(tmp_path)


def test_jsonl(tmp_path):
    task = text.jsonl(write(tmp_path / "a.jsonl", [*GOOD, ""]), "a")
    assert task.classes == ("0", "1") and list(task.train.labels) == [0, 1] and len(task.held_out.labels) == 0
    named = [row("train", "one", "no"), row("train", "two", "yes"), row("test", "a\u2028b\x85c", "no")]
    task = text.jsonl(write(tmp_path / "b.jsonl", named), "b")
    assert task.classes == ("no", "yes") and task.test.inputs["text"][0] == "a\u2028b\x85c"


def test_jsonl_encodings(tmp_path):
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in [row("train", "caf\u00e9", 0), *GOOD])
    for encoding in ("utf-8", "utf-8-sig", "latin-1"):
        (tmp_path / "a.jsonl").write_bytes(lines.encode(encoding))
        assert text.jsonl(tmp_path / "a.jsonl", "a").train.inputs["text"][0] == "caf\u00e9"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"split": "train", "text": "cut', "not JSON"),
        ("[1, 2]", "want an object"),
        ({"split": "train", "text": "x"}, "want an object with split, text and label"),
        (row("dev", "x", 0), "split is 'dev', allowed: train, test"),
        (row("train", "  ", 0), "not empty"),
        (row("train", "x", 1.5), "integer or a string"),
        (row("train", "x", True), "integer or a string"),
        (row("train", "x", -1), "negative"),
    ],
)
def test_bad_line_names_file_and_line(tmp_path, bad, message):
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 4: .*{message}"):
        text.jsonl(write(tmp_path / "a.jsonl", [*GOOD, bad]), "a")


def test_bad_labels_in_a_file(tmp_path):
    with pytest.raises(ValueError, match="one kind"):
        text.jsonl(write(tmp_path / "a.jsonl", [*GOOD, row("train", "x", "yes")]), "a")
    with pytest.raises(ValueError, match="task a: test row 1 has label 5, allowed 0 to 1"):
        text.jsonl(write(tmp_path / "a.jsonl", [*GOOD, row("test", "x", 5)]), "a")
    with pytest.raises(ValueError, match="task a"):
        text.jsonl(write(tmp_path / "a.jsonl", []), "a")


EXPECTED = {  # classes, training rows, test rows: fixed by the pinned files and REGISTRY_VERSION
    "review_sentiment": (2, 5372, 1290),
    "plot_or_review": (2, 3640, 890),
    "debate_party": (3, 2116, 524),
    "wordnet_supersense": (14, 7840, 1960),
}


@pytest.fixture(scope="module")
def registry():
    return {name: make() for name, make in text_registry.TASKS.items()}


def test_registry_rows(registry):
    found = {n: (len(t.classes), len(t.train.labels), len(t.test.labels)) for n, t in registry.items()}
    assert found == EXPECTED


def test_registry_rows_are_clean(registry):
    rows = {}
    for name, task in registry.items():
        train, test = ([*split.inputs["text"]] for split in (task.train, task.test))
        rows[name] = {r.casefold() for r in train + test}
        assert len(rows[name]) == len(train) + len(test)
        assert all(len(r.split()) >= 4 and r == " ".join(r.split()) for r in train + test)
        for split in (task.train, task.test):
            assert np.bincount(split.labels, minlength=len(task.classes)).min() > 50
    names = list(rows)
    assert not any(rows[a] & rows[b] for i, a in enumerate(names) for b in names[i + 1 :])


def test_films_and_turns_stand_on_one_side(registry):
    sides = {t: s for s in ("train", "test") for t in getattr(registry["review_sentiment"], s).inputs["text"]}
    films = {}
    for r in text_registry._films():
        if r["category"] != "plot" and " ".join(r["text"].split()) in sides:
            films.setdefault(r["movie_name"], set()).add(sides[" ".join(r["text"].split())])
    # A review filed under two films may put one of its films on both sides; no more than a handful do.
    assert sum(len(side) > 1 for side in films.values()) <= 5


def test_wordnet_keeps_its_licence(registry):
    assert "Princeton" in (wheels.fetch("wordnet") / "LICENSE.txt").read_text()
