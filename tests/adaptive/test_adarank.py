"""AdaRank against an independent float64 loop on exact SVDs, with hand-written straight-through gradients."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec import tree as trees
from taskvec.adaptive import rows as rows_lib
from taskvec.adaptive.adarank import adarank, low_rank_bank, recentred
from taskvec.adaptive.coefficients import coefficients
from taskvec.adaptive.masks import rank_masks
from taskvec.adaptive.merged import merged_apply
from taskvec.adaptive.parametrisation import LowRank
from tests.adaptive import mlp_oracle as oracle, toy_models as toy
from tests.adaptive.mlp_oracle import NAMES, ROWS, TASKS

MATRICES, TEMPERATURE = ("w1", "w2"), 10.0


def reference(theta0, tau, kernels, rows, lam0, kept, steps, rate):
    svd = {k: [np.linalg.svd(tau[k][t], full_matrices=False) for t in range(TASKS)] for k in MATRICES}
    values = {"lam": np.full((4, TASKS), lam0)}
    for k in MATRICES:
        rank = min(tau[k].shape[1:])
        values[k] = np.tile(np.where(np.arange(rank) < int(kept * rank), 0.1, -0.1), (TASKS, 1))
    adam, batches, flips = oracle.Adam(rate), rows_lib.cyclic(rows, ROWS), 0
    for step in range(steps):
        cut, soft = dict(tau), {k: 1 / (1 + np.exp(-values[k] / TEMPERATURE)) for k in MATRICES}
        for k in MATRICES:
            cut[k] = np.stack([(u * s * (soft[k][t] > 0.5)) @ vt for t, (u, s, vt) in enumerate(svd[k])])
        theta = oracle.merged(theta0, cut, values["lam"])
        _, grads, _ = oracle.gradients(theta, batches(step)["x"], kernels, oracle.entropy)
        by = {"lam": oracle.by_coefficients(grads, cut, 4)}
        for k in MATRICES:
            by[k] = np.stack([s * np.diag(u.T @ grads[k] @ vt.T) for u, s, vt in svd[k]])
            by[k] *= values["lam"][NAMES.index(k)][:, None] * soft[k] * (1 - soft[k]) / TEMPERATURE
        before, values = values, adam.step(values, by)
        flips += sum(int(((before[k] > 0) != (values[k] > 0)).sum()) for k in MATRICES)
    return values, flips


@pytest.mark.parametrize("base", ["pretrained", "average"])
def test_trajectory(base):
    theta0, tau, kernels, rows = oracle.setting()
    settings = {"steps": 100, "learning_rate": 5e-3, "matrices": "", "per_task": ROWS}
    settings |= {} if base == "pretrained" else {"base": "average", "init": 0.8, "kept": 0.5}
    found = adarank(oracle.problem(theta0, tau, kernels), rows, **settings)
    if base == "average":
        mean = {k: x.mean(0) for k, x in tau.items()}
        theta0, tau = {k: theta0[k] + mean[k] for k in NAMES}, {k: tau[k] - mean[k] for k in NAMES}
    start = (0.3, 1.0) if base == "pretrained" else (0.8, 0.5)
    expected, flips = reference(theta0, tau, kernels, rows, *start, 100, 5e-3)
    np.testing.assert_allclose(found.coefficients, expected["lam"], atol=1e-4)
    for k in MATRICES:
        np.testing.assert_allclose(found.learnables["mask"][k], expected[k], atol=1e-4)
    assert flips > 3  # ranks were dropped or taken up on the way
    for i, k in enumerate(NAMES):
        total = theta0[k].copy()
        for t in range(TASKS):
            part = tau[k][t]
            if k in MATRICES:
                u, s, vt = np.linalg.svd(part, full_matrices=False)
                part = (u * s * (expected[k][t] > 0)) @ vt
            total += expected["lam"][i, t] * part
        np.testing.assert_allclose(found.params[k], total, atol=1e-3)


def test_published_starts():
    theta0, tau, kernels, rows = oracle.setting()
    problem = oracle.problem(theta0, tau, kernels)
    found = adarank(problem, rows, matrices="", steps=0)
    assert (found.coefficients == np.float32(0.3)).all() and (found.learnables["mask"]["w1"] > 0).all()
    for k in NAMES:  # all ranks kept: task arithmetic
        np.testing.assert_allclose(found.params[k], theta0[k] + 0.3 * tau[k].sum(0), rtol=1e-5, atol=1e-5)
    found = adarank(problem, rows, base="average", kept=0.3, matrices="", steps=0)
    np.testing.assert_allclose(found.params["b1"], theta0["b1"] + tau["b1"].mean(0), rtol=1e-5, atol=1e-5)
    average = theta0["w2"] + tau["w2"].mean(0)
    u, s, vt = np.linalg.svd(tau["w2"] - tau["w2"].mean(0), full_matrices=False)
    cut = (u[..., :1] * s[:, None, :1]) @ vt[:, :1]  # int(0.3 * 6) ranks
    np.testing.assert_allclose(found.params["w2"], average + 2.3 * cut.sum(0), rtol=1e-4, atol=1e-4)


def test_the_bank_is_the_task_vectors_largest_rank_first_in_both_layouts():
    theta0, tau = toy.model(0, 2)
    tau["blocks"]["mlp"]["up"] = tau["blocks"]["mlp"]["up"].at[:, :, 3:].set(0)  # of rank 3
    bank = low_rank_bank(theta0, tau, "mlp|qkv")
    assert isinstance(bank["blocks"]["attention"]["qkv"], LowRank)
    assert not isinstance(bank["blocks"]["attention"]["out"], LowRank)
    assert not isinstance(bank["blocks"]["mlp"]["bias"], LowRank)
    for name in ("up", "down"):
        factors, dense = bank["blocks"]["mlp"][name], np.asarray(tau["blocks"]["mlp"][name])
        np.testing.assert_allclose(factors.up @ factors.down, dense, atol=1e-6)
        sizes = np.linalg.norm(factors.up, axis=-2) * np.linalg.norm(factors.down, axis=-1)
        np.testing.assert_allclose(sizes, np.linalg.svd(dense, compute_uv=False), atol=1e-5)
    average, moved = recentred(theta0, tau)
    axis_of = lambda path: int(trees.is_stacked(path))
    for path, x in trees.flatten(moved).items():
        np.testing.assert_allclose(x.mean(axis_of(path)), 0, atol=1e-6)
        t = trees.flatten(tau)[path]
        np.testing.assert_allclose(
            trees.flatten(average)[path], trees.flatten(theta0)[path] + t.mean(axis_of(path)), rtol=1e-5, atol=1e-6
        )
    with pytest.raises(ValueError, match="set `matrices` to a pattern of your model"):
        low_rank_bank(theta0, tau, "conv")


def test_scanned_equals_whole():
    (theta0, tau), batch = toy.model(0, 2), toy.batch(1, 4)
    bank = low_rank_bank(theta0, tau)
    base = coefficients(trees.groups(theta0, "tensor"), 2, 0.6, "identity")
    parametrisation = rank_masks(base, bank, kept=0.5)

    def loss(scanned):
        encode = merged_apply(toy.apply, parametrisation, scanned=scanned)
        return lambda learned, weights: jnp.sin(encode(learned, weights, batch)["features"]).sum()

    start = parametrisation.init()
    assert start["mask"]["blocks"]["mlp"]["up"].shape == (toy.LAYERS, 2, toy.WIDTH)
    values = [jax.jit(jax.value_and_grad(loss(scanned)))(start, (theta0, bank)) for scanned in (True, False)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *values)
    assert all(jnp.abs(g).max() > 1e-5 for g in jax.tree.leaves(values[0][1]["mask"]))


def test_errors(monkeypatch):
    theta0, tau, kernels, rows = oracle.setting()
    problem = oracle.problem(theta0, tau, kernels)
    with pytest.raises(ValueError, match="pretrained, average"):
        adarank(problem, rows, base="cart")
    with pytest.raises(ValueError, match="has no other base"):
        adarank(problem._replace(linear=True), rows, base="average")
    early = lambda *args: pytest.fail("task vectors were factorised before the settings were checked")
    monkeypatch.setattr(sys.modules[low_rank_bank.__module__], "low_rank_bank", early)
    for wrong, match in (({"kept": 16}, "kept must lie in"), ({"constraint": "clamp"}, "clip, identity")):
        with pytest.raises(ValueError, match=match):
            adarank(problem, rows, matrices="", steps=0, **wrong)
    with pytest.raises(ValueError, match="set `matrices` to a pattern"):
        adarank(problem, rows, matrices="conv")
    with pytest.raises(ValueError, match="factorise some matrices first"):
        rank_masks(coefficients(trees.groups(theta0, "task"), TASKS), oracle.as_jax(tau))
