"""Norms, cosines and sign conflict against their definitions, and against what TIES keeps."""

import numpy as np
import pytest

from taskvec.analysis import similarity


def arrays(tasks=4, shape=(37, 11)):
    rng = np.random.default_rng(0)
    base = rng.standard_normal(shape).astype(np.float32)
    tau = np.round(rng.standard_normal((tasks, *shape)) * 4) / 64  # many zeros and ties, exact in float32
    base = np.round(base * 64) / 64
    return base, [(base + t).astype(np.float32) for t in tau], tau


class Memory:
    """A reader of arrays in memory."""

    def __init__(self, tensors):
        self.specs = self.tensors = tensors

    def read(self, name, rows=None):
        return self.tensors[name] if rows is None else self.tensors[name][rows]


def test_definitions(monkeypatch):
    monkeypatch.setattr(similarity, "CACHED", 50)
    base, finetuned, tau = arrays()
    found = similarity.compare(base, finetuned)
    flat = tau.reshape(4, -1)
    plus, minus = (flat > 0).sum(0), (flat < 0).sum(0)
    np.testing.assert_allclose(found.norms, np.linalg.norm(flat, axis=1))
    np.testing.assert_allclose(found.relative_norms, np.linalg.norm(flat, axis=1) / np.linalg.norm(base))
    np.testing.assert_allclose(found.cosines[0, 2], flat[0] @ flat[2] / found.norms[0] / found.norms[2])
    np.testing.assert_allclose(found.mean_cosine, found.cosines[np.triu_indices(4, 1)].mean())
    assert found.conflict == pytest.approx(((plus > 0) & (minus > 0)).mean())
    some = plus + minus > 0
    ratio = np.where(some, abs(plus - minus) / np.maximum(plus + minus, 1), 1)
    assert found.agreement == pytest.approx(ratio.mean())
    np.testing.assert_allclose(found.influence, np.bincount(plus + minus, minlength=5) / flat.shape[1])


def test_streamed_by_rows_and_summed(monkeypatch):
    base, finetuned, _ = arrays()
    whole = similarity.compare(base, finetuned)
    monkeypatch.setattr(similarity, "ENTRIES", 60)
    models = [Memory({"a": x[:20], "b": x[20:]}) for x in (base, *finetuned)]
    found = similarity.stream(models[0], models[1:], ["a", "b"])
    total = similarity.by_group(found, {"a": "all", "b": "all"})["all"]
    np.testing.assert_allclose(total.gram, whole.gram)
    np.testing.assert_array_equal(total.positive, whole.positive)
    assert total.entries == whole.entries == base.size


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
def test_thresholds_are_the_exact_order_statistic(monkeypatch, density):
    monkeypatch.setattr(similarity, "ENTRIES", 60)
    base, finetuned, tau = arrays()
    models = [Memory({"a": x[:20], "b": x[20:]}) for x in (base, *finetuned)]
    found = similarity.trim_thresholds(models[0], models[1:], ["a", "b"], density)
    flat = np.abs(tau.reshape(4, -1))
    rank = max(1, int(flat.shape[1] * density))
    np.testing.assert_array_equal(found, [np.sort(x)[-rank] for x in flat])


def test_models_that_did_not_change():
    base, _, _ = arrays()
    found = similarity.compare(base, [base, base])
    assert np.isnan(found.mean_cosine) and found.conflict == 0 and found.agreement == 1
    np.testing.assert_array_equal(found.relative_norms, 0)
    np.testing.assert_array_equal(found.influence, [1, 0, 0])
