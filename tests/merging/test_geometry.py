"""Geometry of merging: what must hold beyond the formulas, and what is streamed by rows."""

import jax.numpy as jnp
import numpy as np
import pytest

import taskvec as tv
from taskvec.merging import merge_streamed, plan_streamed
from tests.merging.oracles import geometry

RNG = np.random.default_rng(0)
BASE = {"w": RNG.standard_normal((40, 6)).astype(np.float32), "b": RNG.standard_normal(7).astype(np.float32)}


def experts(count, size=0.3):
    return [
        {k: (v + size * RNG.standard_normal(v.shape)).astype(np.float32) for k, v in BASE.items()} for _ in range(count)
    ]


class Arrays:
    """A reader of arrays in memory."""

    def __init__(self, arrays):
        self.arrays = self.specs = arrays

    def read(self, name, rows=None):
        return self.arrays[name] if rows is None else self.arrays[name][rows]


@pytest.mark.parametrize(
    ("name", "count", "settings"),
    [
        ("slerp", 2, {"t": 0.3}),
        ("nuslerp", 2, {"weights": (0.7, 0.3)}),
        ("nuslerp", 2, {"weights": (0.7, 0.3), "axis": 0}),
        ("nuslerp", 2, {"weights": (0.7, 0.3), "axis": -1}),
        ("multi_slerp", 3, {"weights": (1.0, 0.5, 2.0), "iterations": 1}),
        ("karcher", 3, {}),
        ("model_stock", 3, {"axis": -1}),
        ("nearswap", 1, {"limit": 0.1}),
        ("arcee_fusion", 1, {}),
    ],
)
@pytest.mark.parametrize("with_base", [True, False])
def test_streamed_by_rows(name, count, settings, with_base):
    if not with_base and tv.methods()[name].card.base == "required":
        return
    base, models, out = BASE if with_base else None, experts(count), {}
    readers = [Arrays(m) for m in models]
    start = Arrays(base) if with_base else None
    memory = 4 * 3000
    assert plan_streamed(name, start, readers, memory=memory, **settings).rows["w"] < 40

    def write(path, x, rows):
        out.setdefault(path, np.zeros(BASE[path].shape, np.float32))[rows or slice(None)] = x

    merge_streamed(name, start, readers, write, memory=memory, **settings)
    expected = tv.merge(name, base, models, **settings)
    for path in BASE:
        np.testing.assert_allclose(out[path], expected[path], atol=2e-6)


def test_slerp_ends_at_its_models_and_keeps_the_length_of_unit_vectors():
    a, b = experts(2)
    for t, end in ((0.0, a), (1.0, b)):
        np.testing.assert_allclose(tv.merge("slerp", None, [a, b], t=t)["w"], end["w"], atol=1e-6)
    unit = lambda m: {k: v / np.linalg.norm(v) for k, v in m.items()}
    middle = tv.merge("slerp", None, [unit(a), unit(b)], t=0.4)
    np.testing.assert_allclose(np.linalg.norm(middle["w"]), 1.0, atol=1e-6)


def test_two_models_of_one_length_have_the_middle_of_their_arc_as_mean():
    a, b = ({k: v / np.linalg.norm(v) for k, v in m.items()} for m in experts(2))
    middle = tv.merge("slerp", None, [a, b], t=0.5)["w"]
    for name in ("karcher", "multi_slerp"):
        np.testing.assert_allclose(tv.merge(name, None, [a, b])["w"], middle, atol=1e-6)


def test_karcher_mean_has_no_pull_left():
    """sum_t log_m(u_t) = 0, in float64 on the merged weights, for models that lie far apart."""
    models = experts(4, size=2.0)
    m = np.asarray(tv.merge("karcher", None, models, iterations=30)["w"], np.float64).ravel()
    units = [np.asarray(x["w"], np.float64).ravel() / np.linalg.norm(x["w"]) for x in models]
    length, m = np.linalg.norm(m), m / np.linalg.norm(m)
    angles = [np.arccos(u @ m) for u in units]
    pull = sum(w / np.sin(w) * (u - np.cos(w) * m) for w, u in zip(angles, units, strict=True))
    assert np.linalg.norm(pull) < 1e-5
    np.testing.assert_allclose(length, np.mean([np.linalg.norm(x["w"]) for x in models]), rtol=1e-6)


def test_karcher_ends_at_the_first_step_below_the_tolerance():
    models, weights = [{"w": np.float32(RNG.standard_normal(9) + 0.5)} for _ in range(3)], (0.2, 0.5, 0.3)
    v = np.stack([np.asarray(m["w"], np.float64) for m in models])
    few, many = (geometry._mean(v, weights, 10, tolerance) for tolerance in (0.03, 0.0))
    assert np.abs(few - many).max() > 1e-3 < np.abs(few - geometry._mean(v, weights, 0)).max()
    found = tv.merge("karcher", None, models, weights=weights, tolerance=0.03)["w"]
    np.testing.assert_allclose(found, few, atol=1e-5)


def test_directions_that_cancel():
    zero = {"w": np.zeros((2, 2), np.float32)}
    a = {"w": np.array([[1.0, 2.0], [0.0, 3.0]], np.float32)}
    opposite = {"w": -a["w"]}
    np.testing.assert_allclose(tv.merge("multi_slerp", zero, [a, opposite])["w"], 0, atol=1e-6)
    for name, settings in (("karcher", {}), ("slerp", {}), ("nuslerp", {}), ("model_stock", {"clip": True})):
        merged = tv.merge(name, zero, [a, opposite], **settings)["w"]
        assert bool(jnp.isfinite(merged).all()), name
    # Two opposite task vectors are the pole of model stock: 1 + (2 - 1) cos = 0.
    np.testing.assert_array_equal(tv.merge("model_stock", zero, [a, opposite])["w"], zero["w"])


def test_model_stock_does_not_depend_on_the_size_of_the_vectors():
    """MergeKit's guard takes small tensors to the base: cos .995, entries of 1e-5, t .047 instead of .997."""
    rng = np.random.default_rng(1)
    shared = rng.standard_normal(256)
    zero = {"w": np.zeros(256, np.float32)}
    models = [{"w": (1e-5 * (shared + 0.07 * rng.standard_normal(256))).astype(np.float32)} for _ in range(2)]
    a, b = (np.asarray(m["w"], np.float64) for m in models)
    mean, cosine = (a + b) / 2, a @ b / 1e-6
    ratio = lambda **settings: float(tv.merge("model_stock", zero, models, **settings)["w"] @ mean / (mean @ mean))
    assert 0.99 < ratio() < 1.0
    assert np.linalg.norm(a) * np.linalg.norm(b) < 1e-6
    assert ratio(guards="mergekit") == pytest.approx(2 * cosine / (1 + cosine), rel=1e-4)


def test_nearswap_is_a_bounded_step():
    [model] = experts(1)
    step = np.asarray(tv.merge("nearswap", BASE, [model], limit=0.05)["w"]) - BASE["w"]
    np.testing.assert_allclose(step, np.clip(model["w"] - BASE["w"], -0.05, 0.05), atol=1e-6)


def test_counts_of_models():
    with pytest.raises(ValueError, match="slerp takes 2 fine-tuned models, got 3"):
        tv.merge("slerp", BASE, experts(3))
    with pytest.raises(ValueError, match="model_stock takes 2 or more fine-tuned models, got 1"):
        tv.merge("model_stock", BASE, experts(1))
    with pytest.raises(ValueError, match="arcee_fusion needs the pretrained model"):
        tv.merge("arcee_fusion", None, experts(1))
    with pytest.raises(ValueError, match="unknown axis 1; allowed: tensor, -1, 0"):
        tv.merge("nuslerp", BASE, experts(2), axis=1)
    with pytest.raises(ValueError, match="2 weights for 3 models"):
        tv.merge("karcher", BASE, experts(3), weights=(1.0, 2.0))
