"""Every method against its float64 NumPy oracle; every registered method must have one."""

import numpy as np
import pytest

import taskvec as tv
from taskvec import tree as trees
from tests.merging import oracles
from tests.models_for_tests import random_models

CASES = {
    "weight_average": [{}],
    "task_arithmetic": [{}, {"scale": 0.7, "weights": (0.5, -1.0, 2.0)}],
    "task_negation": [{}],
    "task_analogy": [{"scale": 0.5}],
    "ties": [{}, {"density": 0.05, "aggregate": "sum", "scale": 0.3}, {"aggregate": "max"}, {"density": 0.9}],
    "dare": [{}, {"density": 0.8}],
    "dare_ties": [{"density": 0.5}],
    "breadcrumbs": [{}, {"axis": "row"}, {"density": 0.3, "gamma": 0.2}],
    "lines": [{}, {"scale": 0.9}],
    "lines_ties": [{}],
    "consensus_ta": [{}, {"threshold": 0.2, "at_least": 1}, {"at_least": 3}],
    "consensus_ties": [{}],
    "tsv_m": [{}, {"solver": "svd"}],
}


def named(params):
    return {k: np.asarray(v, np.float64) for k, v in trees.flatten(trees.unstack_layers(params)).items()}


def drop_masks(pretrained, finetuned, settings):
    """The masks that a drop of this density and seed draws, found by dropping a vector of ones."""
    flat = trees.unstack_layers(pretrained)
    ones = trees.map_with_path(lambda p, x: np.ones((len(finetuned), *x.shape), np.float32), flat)
    dropped = tv.transform_task_vectors(tv.drop(settings.get("density", 0.1), rescale="none"), flat, ones)
    return {k: np.asarray(v) != 0 for k, v in trees.flatten(dropped).items()}


@pytest.mark.parametrize("name", sorted(tv.methods()))
def test_method_equals_its_formula(name):
    assert name in CASES, f"{name} has no oracle: add one to tests/merging/oracles.py"
    pretrained, finetuned = random_models(seed=1, tasks=3)
    base = named(pretrained)
    taus = {k: np.stack([named(f)[k] - base[k] for f in finetuned]) for k in base if k != "position_ids"}
    depths = {k: int(k.split("/")[1]) if k.startswith("blocks/") else None for k in taus}
    for settings in CASES[name]:
        merged = named(tv.merge(name, pretrained, finetuned, **settings))
        oracle_settings = {k: v for k, v in settings.items() if k != "solver"}
        if "dare" in name:
            oracle_settings["masks"] = drop_masks(pretrained, finetuned, settings)
        expected = getattr(oracles, name)(taus, depths, **oracle_settings)
        for k, x in expected.items():
            np.testing.assert_allclose(merged[k] - base[k], x, atol=2e-6, err_msg=f"{name} {settings} {k}")
        np.testing.assert_array_equal(merged["position_ids"], base["position_ids"])


def test_tsv_m_on_steep_spectra():
    """Fine-tuning leaves spectra that fall over many orders; the Gram route must not spoil the sum."""
    rng = np.random.default_rng(0)
    orthogonal = lambda n, k: np.linalg.qr(rng.standard_normal((n, k)))[0]
    taus = np.stack([orthogonal(40, 24) * np.logspace(-2, -8, 24) @ orthogonal(24, 24).T for _ in range(4)])
    pretrained = {"w": np.zeros((40, 24), np.float32)}
    merged = tv.merge("tsv_m", pretrained, [{"w": t.astype(np.float32)} for t in taus])["w"]
    expected = oracles.tsv_m({"w": taus}, {"w": None})["w"]
    assert np.linalg.norm(merged - expected) < 2e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("solver", ["gram", "svd"])
def test_tsv_m_of_low_rank_and_untouched_tasks(solver):
    """LoRA experts, and a task that left the matrix alone: singular vectors that do not exist must not take part."""
    rng = np.random.default_rng(3)
    taus = np.stack(
        [rng.standard_normal((24, 2)) @ rng.standard_normal((2, 24)) for _ in range(3)] + [np.zeros((24, 24))]
    )
    polar = lambda a: (lambda u, s, vt: u @ vt)(*np.linalg.svd(a, full_matrices=False))
    parts = [np.linalg.svd(tau) for tau in taus[:3]]
    u, v = (np.concatenate(x, axis=1) for x in zip(*((p[0][:, :2], p[2][:2].T) for p in parts), strict=True))
    expected = polar(u) @ np.diag(np.concatenate([p[1][:2] for p in parts])) @ polar(v).T
    models = [{"w": tau.astype(np.float32)} for tau in taus]
    merged = tv.merge("tsv_m", {"w": np.zeros((24, 24), np.float32)}, models, solver=solver)["w"]
    assert np.linalg.norm(merged - expected) < 1e-3 * np.linalg.norm(expected)
