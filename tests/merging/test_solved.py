"""RegMean, Fisher, WUDI and DOGE: what their papers promise, odd inputs, traps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import taskvec as tv
from taskvec.transforms.projected import shared_subspace
from taskvec.transforms.solve import least_interference
from tests.merging.oracles import solved as oracle
from tests.models_for_tests import random_models


def toy(seed=0, tasks=4, outs=12, ins=20, rank=6, size=3e-3):
    """Task vectors of falling spectra over one another's directions, in the size of fine-tuning's."""
    rng = np.random.default_rng(seed)
    spectrum = np.logspace(0, -1.5, rank)
    return np.stack(
        [size * (rng.standard_normal((outs, rank)) * spectrum) @ rng.standard_normal((rank, ins)) for _ in range(tasks)]
    )


def merge_matrix(method, taus, name="weight", **settings):
    models = [{"layer": {name: tau.astype(np.float32)}} for tau in taus]
    base = {"layer": {name: np.zeros(taus.shape[1:], np.float32)}}
    return np.asarray(tv.merge(method, base, models, **settings)["layer"][name], np.float64)


def test_wudi_adam_stops_far_from_the_minimum():
    """Interference at the sum, after 300 steps of Adam, at the exact solution: an order of magnitude apart."""
    taus = toy()
    at = {"sum": oracle.interference(taus.sum(0), taus)[0]}
    for solver in ("adam", "exact"):
        at[solver] = oracle.interference(merge_matrix("wudi", taus, solver=solver), taus)[0]
    assert at["adam"] < 0.8 * at["sum"] and at["exact"] < 0.1 * at["adam"], at


def test_wudi_exact_has_no_gradient_left():
    taus = toy(rank=12)
    x = merge_matrix("wudi", taus, solver="exact")
    gradient = oracle.interference(x, taus)[1]
    assert np.abs(gradient).max() < 1e-4 * np.abs(oracle.interference(taus.sum(0), taus)[1]).max()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (3, 40), (5, 40)])
@pytest.mark.parametrize("solver", ["adam", "exact"])
def test_wudi_of_low_rank_and_untouched_tasks(solver, shape):
    """LoRA experts and a task that left the matrix alone, in both the wide and the tall form of the equations."""
    taus = np.concatenate([toy(3, 3, *shape, rank=2), np.zeros((1, *shape))])
    expected = oracle.wudi({"weight": taus}, {}, solver=solver)["weight"]
    found = merge_matrix("wudi", taus, solver=solver)
    assert np.linalg.norm(found - expected) < 2e-3 * np.linalg.norm(expected)


def test_wudi_gradient_is_that_of_the_definition():
    """One step of Adam moves by the sign of the gradient, whatever the reduced form."""
    for shape in ((12, 20), (2, 40)):
        taus = toy(5, 3, *shape)
        step = least_interference("adam", 1, 1.0, 2.0, 1e-5, jnp.asarray(taus, jnp.float32)) - taus.sum(0)
        gradient = oracle.interference(taus.sum(0), taus)[1]
        clear = np.abs(gradient) > 1e-3 * np.abs(gradient).max()
        np.testing.assert_allclose(np.asarray(step)[clear], -np.sign(gradient[clear]), atol=1e-2)


def test_kernels_are_transposed_weights():
    """``kernel`` is [in, out], ``weight`` [out, in]; the same layer gives the same result."""
    taus = toy(1)
    for method in ("wudi", "doge"):
        as_weight = merge_matrix(method, taus)
        as_kernel = merge_matrix(method, taus.transpose(0, 2, 1), "kernel").T
        np.testing.assert_allclose(as_weight, as_kernel, atol=1e-7)
        assert np.abs(as_weight - merge_matrix(method, taus.transpose(0, 2, 1)).T).max() > 1e-4


@pytest.mark.parametrize("method", ["wudi", "doge"])
def test_tables_are_no_linear_layers(method):
    taus = toy(1)
    models = [{"embeddings": {"word": tau.astype(np.float32)}} for tau in taus]
    base = {"embeddings": {"word": np.zeros(taus.shape[1:], np.float32)}}
    merged = tv.merge(method, base, models, others="mean")["embeddings"]["word"]
    np.testing.assert_allclose(merged, taus.mean(0), atol=1e-7)
    merged = tv.merge(method, base, models, others="pretrained")["embeddings"]["word"]
    np.testing.assert_array_equal(merged, 0)


def test_doge_spares_the_shared_subspace():
    """Gradients have no part along the direction that all tasks share, so that Delta hardly has (Adam mixes rows)."""
    rng = np.random.default_rng(0)
    shared = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    taus = toy(2) * 0.1 + 0.05 * shared[:, :1] * rng.standard_normal((4, 1, 20))
    share = [0.07 / np.linalg.norm(tau) for tau in taus]
    parts = {}
    for subspace in (1e-2, 1 / 12):  # no direction, one direction
        found = merge_matrix("doge", taus, density=1.0, subspace=subspace)
        delta = (found - sum(s * tau for s, tau in zip(share, taus, strict=True))) / sum(share)
        parts[subspace] = np.linalg.norm(shared[:, 0] @ delta) / np.linalg.norm(delta)
    assert parts[1 / 12] < 0.2 < 0.9 < parts[1e-2], parts
    basis = np.asarray(shared_subspace(jnp.asarray(taus, jnp.float32), 0.25))
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-5)  # the projector is its own square


def test_doge_of_untouched_and_many_tasks():
    taus = np.concatenate([toy(3, 2, 12, 20), np.zeros((1, 12, 20))])
    assert np.isfinite(merge_matrix("doge", taus, steps=5)).all()
    assert np.isfinite(merge_matrix("doge", toy(3, 15, 12, 20), steps=5)).all()  # more tasks than directions


def test_regmean_of_inputs_that_never_occur():
    """The rows of a kernel that no task used keep the mean; what one task used alone is that task's."""
    rng = np.random.default_rng(0)
    taus = rng.standard_normal((3, 6, 4))
    used = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0.0]])
    x = rng.standard_normal((3, 50, 6)) * used[:, None]
    gram = {"layer": {"kernel": (x.transpose(0, 2, 1) @ x / 50).astype(np.float32)}}
    for factor in (0.0, 0.5, 1.0):
        found = merge_matrix("regmean", taus, "kernel", extras={"gram": gram}, reduce_nondiagonal=factor)
        np.testing.assert_allclose(found[4:], taus.mean(0)[4:], atol=1e-4)
        if factor == 0:
            np.testing.assert_allclose(found[3], taus[0, 3], atol=1e-4)


def test_regmean_of_inputs_with_one_large_direction():
    """Means of layers' inputs are large: the Gram matrix is then nearly singular, its scaled form is not."""
    rng = np.random.default_rng(0)
    taus = rng.standard_normal((2, 64, 4))
    x = 30 + rng.standard_normal((2, 200, 64)) * np.logspace(0, 2, 64)
    gram = {"layer": {"kernel": (x.transpose(0, 2, 1) @ x / 200).astype(np.float32)}}
    given = {"gram": {k: np.asarray(v, np.float64) for k, v in gram["layer"].items()}}
    for factor, error in ((0.9, 1e-3), (1.0, 5e-2)):
        found = merge_matrix("regmean", taus, "kernel", extras={"gram": gram}, reduce_nondiagonal=factor)
        expected = oracle.regmean({"kernel": taus}, {}, given, reduce_nondiagonal=factor)["kernel"]
        assert np.linalg.norm(found - expected) < error * np.linalg.norm(expected)


def test_regmean_says_when_a_gram_does_not_fit():
    taus = np.ones((2, 6, 4))
    extras = {"gram": {"layer": {"kernel": np.ones((2, 4, 4), np.float32)}}}
    with pytest.raises(ValueError, match=r"Gram matrix of shape \(2, 4, 4\) for 2 matrices with 6 inputs"):
        merge_matrix("regmean", taus, "kernel", extras=extras)


def test_fisher_floor_of_the_first_task_only():
    """What the released code does: where no task has information, the first (target) model stays."""
    taus = np.arange(12.0).reshape(3, 2, 2)
    extras = {"fisher": {"layer": {"weight": np.zeros((3, 2, 2), np.float32)}}}
    for rule, expected in (("first", taus[0]), ("all", taus.mean(0)), ("add", taus.mean(0))):
        found = merge_matrix("fisher", taus, extras=extras, floor_rule=rule)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(merge_matrix("fisher", taus, extras=extras, floor=0.0), taus.mean(0), atol=1e-5)


def test_statistics_are_asked_for():
    pretrained, finetuned = random_models(0, 2)
    for method, extra in (("regmean", "gram"), ("fisher", "fisher")):
        with pytest.raises(ValueError, match=f"{method} needs extras .*{extra}"):
            tv.merge(method, pretrained, finetuned)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("wudi", {"solver": "newton"}, "unknown solver 'newton'; allowed: adam, exact"),
        ("wudi", {"others": "sum"}, "allowed: mean, pretrained"),
        ("doge", {"density": 30}, r"density must lie in \(0, 1\]"),
        ("fisher", {"floor_rule": "min"}, "allowed: all, first, add"),
        ("regmean", {"reduce_nondiagonal": 1.5}, r"reduce_nondiagonal in \[0, 1\]"),
    ],
)
def test_wrong_settings(method, settings, message):
    with pytest.raises(ValueError, match=message):
        tv.methods()[method](**settings)


def test_layers_of_a_stack_are_solved_one_at_a_time():
    """Memory: the loop over layers must not become a batch."""
    fn = lambda x: tv.transform_task_vectors(
        tv.end_interference(), {"blocks": {"kernel": x[:, 0]}}, {"blocks": {"kernel": x}}
    )
    text = str(jax.make_jaxpr(fn)(jnp.ones((5, 2, 4, 4))))
    assert "f32[5,4,4] = dot_general" not in text and "length=5" in text
