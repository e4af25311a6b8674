"""GLUE: rows, prompts, metrics."""

import json

import numpy as np
import pytest

from taskvec.data import batches, glue, suites

ROWS = {
    "cola": [{"sentence": f"a film {i}", "label": i % 2, "idx": i} for i in range(6)],
    "mnli": [{"premise": "the film", "hypothesis": f"good {i}", "label": i % 3, "idx": i} for i in range(6)],
    "stsb": [{"sentence1": "a", "sentence2": f"b {i}", "label": i / 2, "idx": i} for i in range(6)],
}


@pytest.fixture
def folder(tmp_path):
    for name, rows in ROWS.items():
        (tmp_path / name).mkdir()
        for split in ("train", glue.TASKS[name].test):
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_rows(folder):
    cola, mnli, stsb = (glue.load(name, str(folder)) for name in ROWS)
    assert cola.classes == ("unacceptable", "acceptable") and cola.test.inputs["text"][1] == "a film 1"
    assert mnli.train.inputs["text"].shape == (6, 2) and mnli.test.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert stsb.classes == () and stsb.train.labels.dtype == np.float32 and stsb.train.labels[3] == 1.5
    assert list(glue.TASKS) == ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]


def test_prompts(folder):
    prompts, targets = glue.text_to_text("mnli", glue.load("mnli", str(folder)).train)
    assert prompts[1].startswith("Does the premise: 'the film' logically imply, contradict, or is neutral to the hypo")
    assert prompts[1].endswith("hypothesis: 'good 1'? Answere with 'entailment', 'contradiction', or 'neutral'.")
    assert targets.tolist() == ["entailment", "neutral", "contradiction"] * 2
    assert glue.text_to_text("stsb", glue.load("stsb", str(folder)).train)[1].tolist()[:3] == ["0.0", "0.5", "1.0"]
    for name, task in glue.TASKS.items():
        assert all(f"{{{column}}}" in task.prompt for column in task.text), name
        assert len(task.targets) == len(task.classes)


@pytest.mark.parametrize("family", ["glue", "glue_text_to_text"])
def test_suite(folder, tokenizer_folder, family):
    spec = {"kind": "text", "family": family, "tasks": ["cola", "stsb"], "source": str(folder), "max_length": 24}
    spec |= {"train": 4, "held_out": 2, "test": None}
    cola, stsb = suites.load_suite(spec, tokenizer_folder)
    assert [len(cola.train.labels), len(cola.held_out.labels), len(cola.test.labels)] == [4, 2, 6]
    batch = batches.training_batches(cola.train, 2, 4, 0)(1)
    assert batch["ids"].shape[1] % 16 == 0
    assert ("target" in batch) == (family == "glue_text_to_text")
    if "target" in batch:
        assert batch["target"].shape == batch["target_mask"].shape and batch["target"].shape[1] < 16
    assert stsb.test.labels.dtype == np.float32
    assert suites.protocol(spec).startswith(f"text/{family}/cola+stsb/")
    assert suites.parse(spec | {"tasks": ["glue"]}).tasks == tuple(glue.TASKS)


def test_pairs_reach_the_tokenizer_as_pairs(folder, tokenizer_folder):
    from taskvec.data import text

    tokenizer = text.load_tokenizer(tokenizer_folder)
    ids = text.encode(np.array([["film", "good"], ["a", "bad"]], object), tokenizer, 16)["ids"]
    assert ids.shape[0] == 2 and 7 in ids[0] and 8 in ids[0]


def test_types_of_pairs(folder, tokenizer_folder):
    """BERT's: 0 up to the first separator, 1 after it; tasks of single texts in the suite have zeros."""
    from tokenizers.processors import BertProcessing

    from taskvec.data import text

    tokenizer = text.load_tokenizer(tokenizer_folder)
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    pairs = np.array([["film of", "good"], ["a", "bad film a the"]], object)
    out = text.encode(pairs, tokenizer, 16)
    np.testing.assert_array_equal(out["ids"], [[2, 7, 6, 3, 8, 3, 0, 0], [2, 5, 3, 9, 7, 5, 4, 3]])
    np.testing.assert_array_equal(out["type_ids"], [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(text.encode(pairs, tokenizer, 6)["type_ids"][1], [0, 0, 0, 1, 1, 1])
    assert text.encode(pairs[:, 0], tokenizer, 16).keys() == {"ids", "mask"}
    cola, mnli = (text.encode_task(glue.load(name, str(folder)), tokenizer, 16) for name in ("cola", "mnli"))
    assert text.with_types([cola]) == [cola]
    typed = text.with_types([cola, mnli])
    assert all("type_ids" in getattr(task, split).inputs for task in typed for split in ("train", "held_out", "test"))
    joined = batches.join([batches.take(task.test, np.arange(2)) for task in typed], length_multiple=8)
    assert not joined["type_ids"][:2].any() and joined["type_ids"][2:].any(1).all()
    assert joined["type_ids"].shape == joined["ids"].shape


def test_errors(folder):
    with pytest.raises(ValueError, match="unknown GLUE task 'wnli'"):
        glue.load("wnli", str(folder))
    with pytest.raises(FileNotFoundError, match=r"GLUE rte: no train\.jsonl"):
        glue.load("rte", str(folder))
    with open(folder / "cola" / "validation.jsonl", "a") as f:
        f.write('\n{"sentence": "x", "label": -1}')
    with pytest.raises(ValueError, match=r"validation\.jsonl, line 7: label -1, allowed 0 to 1"):
        glue.load("cola", str(folder))


def test_metrics():
    x, y = np.array([1, 1, 0, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1, 0, 1])
    tp, tn, fp, fn = 3, 2, 1, 1
    expected = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    np.testing.assert_allclose(glue.metric("matthews", x, y), expected, atol=1e-12)
    np.testing.assert_allclose(glue.metric("accuracy", x, y), 5 / 7)
    assert glue.metric("matthews", np.ones(7, int), y) == 0
    assert glue.metric("accuracy", np.array(["yes", ""]), np.array(["yes", "no"])) == 0.5
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=50).round(1), rng.normal(size=50).round(1)
    np.testing.assert_allclose(glue.metric("pearson", a, b), np.corrcoef(a, b)[0, 1], atol=1e-12)
    from scipy import stats

    np.testing.assert_allclose(glue.metric("spearman", a, b), stats.spearmanr(a, b)[0], atol=1e-12)
    three = rng.integers(0, 3, (2, 60))
    c = np.zeros((3, 3))
    np.add.at(c, tuple(three), 1)
    s, t, p, n = np.trace(c), c.sum(0), c.sum(1), c.sum()
    expected = (s * n - t @ p) / np.sqrt((n**2 - p @ p) * (n**2 - t @ t))
    np.testing.assert_allclose(glue.metric("matthews", *three), expected, atol=1e-12)
    assert glue.numbers(["2.5", "yes", "nan", "4"]).tolist() == [2.5, 0, 0, 4]
    with pytest.raises(ValueError, match="unknown metric 'f1'; allowed: accuracy"):
        glue.metric("f1", x, y)
    with pytest.raises(ValueError, match="want"):
        glue.metric("accuracy", x, y[:3])
