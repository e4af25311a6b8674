"""Scores of rows: answers letter for letter, ranks of numbers, classifiers."""

import numpy as np
import pytest

from taskvec.evaluation import scorers
from taskvec.evaluation.evaluate import scored
from taskvec.modular import results
from taskvec.training.heads import make_heads

RNG = np.random.default_rng(0)


def batches(labels, size=4):
    order = np.random.default_rng(1).permutation(len(labels))
    for at in range(0, len(order), size):
        index = np.full(size, -1, np.int32)
        rows = order[at : at + size]
        index[: len(rows)] = rows
        rows = np.where(index < 0, rows[0], index)
        yield {"x": rows, "label": labels[rows], "index": index}


def test_written_answers():
    labels = [np.array([0, 1, 1, 0, 1, 2]), RNG.normal(size=6).astype(np.float32)]
    texts = ["no", "yes", "Yes", "no ", "", "may"]
    numbers = ["3.5", "1", "2.0", "-1", "x", "7"]

    def generate(params, inputs):
        assert set(inputs) == {"x"}
        return [params[i] for i in inputs["x"]]

    read = lambda answers: np.array([float(a) if a != "x" else 0.0 for a in answers])
    scorer = scorers.of_answers(generate, [("no", "yes", "maybe"), ()], read)
    found = scored(scorer, results.per_task([texts, numbers]), [batches(y) for y in labels])
    assert found.outputs[0].tolist() == texts and found.outputs[1].tolist() == numbers
    assert found.correct[0].tolist() == [True, True, False, False, False, False]
    ranks = lambda x: np.argsort(np.argsort(x))
    d = ranks([3.5, 1, 2, -1, 0, 7]) - ranks(labels[1])
    assert found.accuracy[1] == pytest.approx(1 - 6 * np.sum(d * d) / (6 * 35))
    np.testing.assert_allclose(found.accuracy[0], 2 / 6)
    with pytest.raises(ValueError, match="1 tasks but heads of 2"):
        scored(scorer, results.static(texts), [batches(labels[0])])


def test_rank_products():
    x, y = RNG.normal(size=50), RNG.normal(size=50)
    for a, b in ((x, y), (np.round(x), np.round(2 * y))):
        mean_rank = lambda v: np.array([np.mean(np.flatnonzero(np.sort(v) == w)) for w in v])
        expected = np.corrcoef(mean_rank(a), mean_rank(b))[0, 1]
        assert scorers.rank_products(a, b).mean() == pytest.approx(expected)
    assert scorers.rank_products(x, np.exp(x)).mean() == pytest.approx(1)
    assert not scorers.rank_products(np.ones(5), x[:5]).any()


def test_classifiers_of_experts():
    z, kernel = RNG.normal(size=(9, 3)).astype(np.float32), RNG.normal(size=(3, 4)).astype(np.float32)
    apply_fn = lambda params, inputs: {"features": params[inputs["x"]]}
    labels = [(z @ kernel).argmax(1), z[:, 1] ** 3]
    labels[0][:3] = (labels[0][:3] + 1) % 4
    scorer = scorers.of_classifiers(apply_fn, [lambda z: z @ kernel, lambda z: z[:, 1:2]])
    found = scored(scorer, results.static(z), [batches(y) for y in labels])
    assert found.correct[0].tolist() == [False] * 3 + [True] * 6
    assert found.accuracy[1] == pytest.approx(1)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e25])
def test_rows_that_are_not_finite_have_no_score(value):
    z, kernel, labels = np.ones((4, 3), np.float32), np.eye(3), np.zeros(4, int)
    z[2, 1] = value
    classifiers = scorers.of_classifiers(None, [None, lambda z: z @ kernel])
    for scorer in (scorers.of_heads(None, make_heads([kernel, kernel])), classifiers):
        with pytest.raises(scorers.NotFinite, match=r"task number 1 .*1 of 4 rows .* row 2;") as caught:
            scorer.score(1, z, labels)
        assert caught.value.task == 1
    answers = scorers.of_answers(None, [("no", "yes")], None)
    with pytest.raises(scorers.NotFinite, match="NaN or infinite, first for row 1;"):
        answers.score(0, np.array(["no", None], object), labels[:2])
