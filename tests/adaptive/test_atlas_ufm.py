"""aTLAS at test time, and the selection of task vectors under a budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec.adaptive import rows as rows_lib, selection
from taskvec.adaptive.atlas_few_shot import atlas_few_shot
from taskvec.adaptive.atlas_ufm import atlas_ufm, certain_on_strong, trusted_rows, two_streams
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.learn import Outputs
from tests.adaptive.toy_mlp import (
    D_IN,
    NAMES,
    features,
    loss_and_gradient,
    problem,
    setting,
)


def test_selection_by_gradient_is_by_inner_products():
    theta0, tau, kernels, rows = setting((3,), 3, (9,))
    what = problem(theta0, tau, kernels)
    batch = rows.batch([np.arange(9)])
    _, grads = loss_and_gradient(theta0, batch, kernels, (1,))
    expected = np.abs([[np.sum(grads[k] * tau[k][t]) for t in range(3)] for k in NAMES])
    told = []
    scores = selection.gradient_scores(what, rows, batch_size=4, loop=Loop(on_phase=lambda *phase: told.append(phase)))
    assert told == [("gradients of the pool", done, 3) for done in (1, 2, 3)]
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    numbers = np.argsort(-expected, axis=1)[:, :2]
    for blockwise in (True, False):
        chosen = selection.choose_within(what, rows, 2, blockwise=blockwise)
        wanted = numbers if blockwise else np.tile(np.argsort(-expected.mean(0))[:2], (4, 1))
        np.testing.assert_array_equal(chosen.numbers, wanted)
        for i, k in enumerate(NAMES):
            np.testing.assert_array_equal(chosen.tau[k], what.tau[k][wanted[i]])
    found = atlas_few_shot(what, rows, budget=2, epochs=2, batch_size=6, least_batches=1)
    np.testing.assert_array_equal((found.coefficients != 0).sum(1), 2)
    np.testing.assert_array_equal(np.sort(numbers, 1), [np.flatnonzero(c) for c in found.coefficients])
    for i, k in enumerate(NAMES):
        merged = theta0[k] + np.tensordot(found.coefficients[i], tau[k], 1)
        np.testing.assert_allclose(found.params[k], merged, atol=1e-5)
    by_chance = [selection.choose_within(what, rows, 1, "random", False, seed).numbers for seed in range(8)]
    assert all((n == n[0]).all() for n in by_chance) and len({int(n[0, 0]) for n in by_chance}) > 1
    by_target = [selection.choose_within(what, rows, 1, "random", False, draw=t).numbers[0, 0] for t in range(8)]
    assert len(set(by_target)) > 1  # targets with pools of one size choose apart
    with pytest.raises(ValueError, match="allowed: 1 to 3"):
        atlas_few_shot(what, rows, budget=4)
    with pytest.raises(ValueError, match="gradient, feature, random"):
        atlas_few_shot(what, rows, budget=1, select="best")


def test_selection_by_features():
    rng = np.random.default_rng(0)
    target = rng.normal(1, 0.1, (5, 3))
    scores = selection.feature_scores(target, [-target, rng.normal(1, 0.2, (7, 3)), 3 * target])
    np.testing.assert_allclose(scores[[0, 2]], [-1, 1])
    assert selection.best(scores, 2).tolist() == [2, 1]
    theta0, tau, kernels, rows = setting((3,), 4, (9,))
    what = problem(theta0, tau, kernels)
    inputs = [rng.normal(1.5 - 0.5 * i, 1, (6 + i, D_IN)) for i in range(4)]
    pool = [features(theta0, x)[1] for x in inputs]
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    means = unit(np.stack([unit(z).mean(0) for z in (features(theta0, rows.take(0, np.arange(9))["x"])[1], *pool)]))
    numbers = np.argsort(-means[1:] @ means[0])[:2]
    assert set(numbers) != {0, 1}
    for blockwise in (True, False):
        chosen = selection.choose_within(what, rows, 2, "feature", blockwise, pool=pool)
        np.testing.assert_array_equal(chosen.numbers, np.tile(numbers, (4, 1)))
    settings = {"budget": 2, "select": "feature", "epochs": 1, "batch_size": 6, "least_batches": 1}
    found = atlas_few_shot(what, rows, pool=pool, **settings)
    np.testing.assert_array_equal((found.coefficients != 0).all(0), np.isin(np.arange(4), numbers))
    for missing, given in ((None, "none"), (pool[:3], "those of 3")):
        with pytest.raises(ValueError, match=f"features of all 4 tasks; got {given}"):
            atlas_few_shot(what, rows, pool=missing, **settings)


def test_trusted_rows_and_streams():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(60, 3)).astype(np.float32)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.unique(np.concatenate([np.argsort(-p[:, c])[:2] for c in range(3)]))  # 60 / 3 / 10 = 2 a class
    trusted = trusted_rows(logits)
    np.testing.assert_array_equal(trusted, expected)
    assert 3 <= len(trusted) <= 6
    rows = rows_lib.arrays([{"x": np.arange(60)[:, None], "second_x": -np.arange(60)[:, None]}])
    others = np.setdiff1d(np.arange(60), trusted)
    labels = logits.argmax(1)
    batches, length = two_streams(rows_lib.views(rows), others, trusted, labels, 8)
    assert length == len(others) // 6
    seen = []
    for step in range(length):
        batch = batches(step)
        x = batch["x"][:8, 0]
        np.testing.assert_array_equal(batch["x"][8:, 0], -x)
        np.testing.assert_array_equal(batch["target_label"], labels[x])
        np.testing.assert_array_equal(batch["target_trusted"], np.isin(x, trusted))
        assert batch["target_trusted"].sum() == 2
        seen += x[:6].tolist()
    assert len(set(seen)) == 6 * length  # an epoch takes no other row twice
    released = two_streams(rows_lib.views(rows), others, trusted, labels, 8, all_trusted=True)[0](0)
    assert released["target_trusted"].all() and (released["x"] == batches(0)["x"]).all()
    with pytest.raises(ValueError, match="second_NAME"):
        rows_lib.views(rows_lib.arrays([{"x": np.ones((2, 1))}])).take(0, np.arange(2))


def test_certain_rows_alone_count_at_test_time():
    rng = np.random.default_rng(0)
    logits = 4 * rng.normal(size=(1, 12, 3)).astype(np.float32)
    trusted, label = np.arange(6) >= 4, rng.integers(0, 3, 6)
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    target = np.where(trusted[:, None], np.eye(3)[label], softmax(logits[0, :6].astype(np.float64)))
    weight = target.max(1) > 0.9
    assert 0 < weight[:4].sum() < 4
    losses = -(target * np.log(softmax(logits[0, 6:].astype(np.float64)))).sum(1)
    batch = {"target_trusted": jnp.asarray(trusted)[None], "target_label": jnp.asarray(label)[None]}
    objective = lambda x: certain_on_strong(0.9)(Outputs(x, x, batch)).sum()
    value, grad = jax.value_and_grad(objective)(jnp.asarray(logits))
    np.testing.assert_allclose(value, losses[weight].mean(), rtol=1e-4)
    assert (grad[:, :6] == 0).all() and (np.asarray(grad[0, 6:] != 0).any(1) == weight).all()


@pytest.mark.parametrize("two", [False, True])
def test_adapting_at_test_time(two):
    theta0, tau, kernels, rows = setting((3,), 3, (48,))
    x = rows.take(0, np.arange(48))["x"]
    second = {"second_x": x + np.float32(0.01)} if two else {}
    found = atlas_ufm(
        problem(theta0, tau, kernels),
        rows_lib.arrays([{"x": x} | second]),
        batch_size=16,
        epochs=12,
        learning_rate=1e-2,
    )
    assert found.history["loss"][-3:].mean() < found.history["loss"][:3].mean()
    with pytest.raises(ValueError, match="one head and one set"):
        atlas_ufm(problem(theta0, tau, kernels * 2), rows)


def test_epochs_are_as_long_as_the_smallest_task():
    rows = rows_lib.arrays([{"x": np.arange(n)} for n in (9, 30)], [np.arange(n) % 2 for n in (9, 30)])
    batches, length = rows_lib.zipped(rows, 4, seed=3)
    assert length == 2
    for epoch in range(3):
        each = [batches(2 * epoch + i) for i in range(2)]
        for part in (slice(0, 4), slice(4, 8)):
            seen = np.concatenate([batch["x"][part] for batch in each])
            assert len(set(seen.tolist())) == 8  # no row twice in an epoch
    assert not np.array_equal(batches(0)["x"], batches(2)["x"])
    assert max(x for step in range(40) for x in batches(step)["x"][4:]) > 25  # of a larger task every part is seen
    few, length = rows_lib.zipped(rows, 12)
    assert length == 1 and sorted(set(few(0)["x"][:12].tolist())) == list(range(9))


def test_rows_repeated():
    rows = rows_lib.arrays([{"x": np.arange(3)}], [np.array([5, 6, 7])])._replace(targets=[{"f": np.arange(3) + 0.5}])
    again = rows_lib.repeated(rows, 2).batch([np.array([0, 4, 5])])
    assert again["x"].tolist() == [0, 1, 2] and again["label"].tolist() == [5, 6, 7]
    assert again["target_f"].tolist() == [0.5, 1.5, 2.5]
    some = rows_lib.chosen(rows, [np.array([2, 0])]).batch([np.array([0, 1])])
    assert some["x"].tolist() == [2, 0] and some["label"].tolist() == [7, 5] and some["target_f"].tolist() == [2.5, 0.5]
