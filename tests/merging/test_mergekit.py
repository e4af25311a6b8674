"""MergeKit's methods give MergeKit's numbers (`tests/fixtures`, outputs of mergekit 0.1.5)."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import taskvec as tv
from taskvec.merging import mergekit

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
CASES = json.loads((FIXTURES / "mergekit_0_1_5.json").read_text())
ARRAYS = np.load(FIXTURES / "mergekit_0_1_5.npz")


def merged(case, dtype):
    tensor = lambda which: {"w": jnp.asarray(ARRAYS[f"{case['group']}/{which}"], dtype)}
    models = [tensor(f"ft{i}") for i in range(case["n"])]
    kind, base = mergekit.kind_of(case["method"]), tensor("base") if case["base"] else None
    if kind.base == "first":
        base, models = None, [base, *models]
    each = {k: v if isinstance(v, list) else [v] * len(models) for k, v in case["params"].items() if k in kind.each}
    shared = {k: v for k, v in case["params"].items() if k in kind.shared}
    assert {**each, **shared}.keys() == case["params"].keys()
    chain = mergekit.chain_of(case["method"], each.pop("weight", None), each.pop("density", None), **each, **shared)
    return np.asarray(tv.merge(chain, base, models)["w"], np.float64)


@pytest.mark.parametrize("case", [c for c in CASES if c["dtype"] == "torch.float32"], ids=lambda c: c["key"])
def test_float32(case):
    np.testing.assert_allclose(merged(case, jnp.float32), ARRAYS[case["key"]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c["dtype"] == "torch.bfloat16"], ids=lambda c: c["key"])
def test_bfloat16(case):
    """MergeKit rounds on the way: some units in the last place, and entries near a threshold may change sides."""
    got, expected = merged(case, jnp.bfloat16), np.asarray(ARRAYS[case["key"]], np.float64)
    base = np.abs(ARRAYS[f"{case['group']}/base"])
    if case["method"] == "karcher":  # ten iterations, all rounded; ours is the mean in float64 (see its oracle)
        assert np.linalg.norm(got - expected) < 0.02 * np.linalg.norm(expected)
        return
    close = np.abs(got - expected) <= 4 * 2.0**-8 * np.maximum(np.abs(expected), np.maximum(base, 0.25))
    assert close.mean() >= 0.95


@pytest.mark.parametrize("name", sorted(mergekit.KINDS))
def test_small_and_odd_tensors(name):
    """Scalars, single entries, zero vectors, a model of density 0: nothing but numbers comes out."""
    kind, rng = mergekit.kind_of(name), np.random.default_rng(0)
    shapes = {"scalar": (), "one": (1,), "zero": (3,), "w": (5, 4), "conv": (3, 2, 2)}
    base = {k: rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}
    tau = lambda k, shape: 0.0 if k == "zero" else 0.1 * rng.standard_normal(shape)
    count = min(3, kind.models[1] or 3)
    models = [{k: np.float32(base[k] + tau(k, shape)) for k, shape in shapes.items()} for _ in range(count)]
    each = {"weight": (0.5, -0.3, 1.0), "density": (0.5, 0.0, 0.8), "gamma": (0.0, 0.2, 0.9), "scale": (2.0,)}
    settings = {k: v[:count] for k, v in each.items() if k in kind.each} | ({"t": 0.05} if "t" in kind.shared else {})
    settings |= {"rescale": True} if "rescale" in kind.shared else {}
    chain = mergekit.chain_of(name, **settings)
    for start in (base, None):
        if start is None and kind.base == "required":
            continue
        merged_ = tv.merge(chain, start, models)
        assert all(bool(jnp.isfinite(x).all()) for x in merged_.values())


def test_a_model_of_density_zero_keeps_its_weight_in_the_total():
    base, model = {"w": jnp.zeros(4)}, {"w": jnp.arange(1.0, 5.0)}
    chain = mergekit.chain_of("dare_linear", (1.0, 3.0), (1.0, 0.0), normalize=True)
    np.testing.assert_allclose(tv.merge(chain, base, [model, model])["w"], model["w"] / 4)
    chain = mergekit.chain_of("ties", (1.0, 3.0), (1.0, 0.0))  # with an election only those that agree count
    np.testing.assert_allclose(tv.merge(chain, base, [model, model])["w"], model["w"])


def test_weights_of_both_signs_blow_up_as_in_mergekit():
    base, models = {"w": jnp.zeros(1)}, [{"w": jnp.ones(1)}, {"w": -jnp.ones(1)}]
    merged_ = tv.merge(mergekit.chain_of("ties", (1.0, -0.999)), base, models)
    np.testing.assert_allclose(merged_["w"], 1999, rtol=1e-3)


def test_della_with_a_density_for_each_model():
    rng = np.random.default_rng(0)
    base = {"w": np.zeros((50, 40), np.float32)}
    models = [{"w": rng.standard_normal((50, 40)).astype(np.float32)} for _ in range(2)]
    settings = {"epsilon": (0.1, 0.05), "normalize": False, "seed": 3}
    only = lambda *weights: np.asarray(
        tv.merge(mergekit.chain_of("della_linear", weights, (0.3, 0.8), **settings), base, models)["w"]
    )
    for task, weights, density in ((0, (1.0, 0.0), 0.3), (1, (0.0, 1.0), 0.8)):
        merged_ = only(*weights)
        assert abs((merged_ != 0).mean() - density) < 0.03
        np.testing.assert_allclose(np.abs(merged_).sum(), np.abs(models[task]["w"]).sum(), rtol=1e-5)
    np.testing.assert_allclose(only(1.0, 1.0), only(1.0, 0.0) + only(0.0, 1.0), atol=1e-6)


def test_messages():
    with pytest.raises(ValueError, match="unknown method 'tie'; of MergeKit's there are: arcee_fusion, breadcrumbs"):
        mergekit.chain_of("tie")
    with pytest.raises(ValueError, match="ties has no setting 'scale'; it has weight, density, normalize"):
        mergekit.chain_of("ties", [1.0], scale=1.0)
    with pytest.raises(ValueError, match="slerp needs t"):
        mergekit.chain_of("slerp")
    with pytest.raises(ValueError, match="weights add up to 0"):
        mergekit.chain_of("linear", [1.0, -1.0])
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\), got 0.9 and 0.15"):
        mergekit.chain_of("della", [1.0], [0.9])
