"""The engine: rows as functions of the step, scanned = whole, teachers, trained heads, evaluation, accumulation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from taskvec import tree as trees
from taskvec.adaptive import objectives, registry, rows as rows_lib
from taskvec.adaptive.coefficients import coefficients, elementwise
from taskvec.adaptive.fit import Evaluate, Loop, fit
from taskvec.adaptive.learn import Problem, learn
from taskvec.adaptive.parametrisation import LowRank, fixed
from taskvec.adaptive.teachers import expert, with_targets
from taskvec.data import packing
from taskvec.training.heads import make_heads, normalise
from tests.adaptive import toy_models as toy

TASKS = 3
CLASSES = (4, 2, 3)


def problem(scanned=True, seed=0):
    rng = np.random.default_rng(seed)
    kernels = [np.asarray(normalise(rng.normal(size=(c, toy.WIDTH))).T) for c in CLASSES]
    return Problem(toy.apply, *toy.model(seed, TASKS), make_heads(kernels), scanned)


def rows(labelled=False, counts=(11, 7, 30)):
    inputs = [toy.batch(t, n) for t, n in enumerate(counts)]
    labels = [np.random.default_rng(t).integers(0, c, n) for t, (c, n) in enumerate(zip(CLASSES, counts, strict=True))]
    return rows_lib.arrays(inputs, labels if labelled else None)


def entropy(outputs):
    return objectives.entropy(outputs.logits)


@pytest.mark.parametrize("kind", ["tensor", "partitions", "elementwise"])
def test_merging_in_the_scan_learns_what_merging_the_whole_tree_does(kind):
    def run(scanned):
        p = problem(scanned)
        groups = trees.groups(p.theta0, "tensor")
        parametrisation = {
            "tensor": lambda: coefficients(groups, TASKS),
            "partitions": lambda: coefficients(groups, TASKS, partitions=3),
            "elementwise": lambda: elementwise(p.theta0, TASKS),
        }[kind]()
        return learn(p, parametrisation, entropy, rows_lib.together(rows(), 4), optax.adam(1e-2), 5)

    scanned, whole = run(True), run(False)
    np.testing.assert_allclose(scanned.history["loss"], whole.history["loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), scanned.params, whole.params)
    assert scanned.history["loss"][-1] < scanned.history["loss"][0]


def test_batches_are_functions_of_seed_and_step():
    some = rows(labelled=True)
    for make, per_task, size in ((rows_lib.together, 4, 12), (rows_lib.cyclic, 4, 12), (rows_lib.in_turn, 4, 4)):
        get = make(some, per_task, 5)
        first = get(3)
        again = make(some, per_task, 5)(3)
        assert first.keys() == again.keys() and all(np.array_equal(first[k], again[k]) for k in first)
        assert len(first["ids"]) == len(first["label"]) == size
        assert not np.array_equal(first["ids"], get(4)["ids"])
    # Epoch by epoch: 7 rows in 7 steps of 4 are each seen four times.
    seen = np.concatenate([rows_lib.cyclic(some, 4)(step)["ids"][4:8, 0] for step in range(7)])
    values, counts = np.unique(seen, return_counts=True)
    own, times = np.unique(toy.batch(1, 7)["ids"][:, 0], return_counts=True)
    np.testing.assert_array_equal(values, own)
    np.testing.assert_array_equal(counts, 4 * times)
    # Rounds over all tasks.
    tasks = [int(rows_lib.in_turn(some, 4)(step)["tasks"][0]) for step in range(9)]
    assert all(sorted(tasks[i : i + 3]) == [0, 1, 2] for i in (0, 3, 6))
    # A task with fewer rows than asked for gives some twice, and all of them.
    more = rows_lib.together(some.only([1]), 10)(0)
    assert len(more["ids"]) == 10 and len(np.unique(more["ids"], axis=0)) == 7


def test_teachers_are_the_experts_and_cached_equals_live():
    p = problem()
    some = with_targets(p, rows(), batch_size=8)
    assert with_targets(p, some) is some
    for t, n in enumerate((11, 7, 30)):
        live = toy.apply(jax.tree.map(jnp.add, p.theta0, toy_expert_delta(p.tau, t)), toy.batch(t, n))["features"]
        np.testing.assert_allclose(some.targets[t]["features"], live, rtol=1e-4, atol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
            expert(p, t),
            jax.tree.map(jnp.add, p.theta0, toy_expert_delta(p.tau, t)),
        )
    batch = rows_lib.together(some, 4, 0)(2)
    found = {}
    for t, n in enumerate((11, 7, 30)):
        found |= {tuple(x): y for x, y in zip(toy.batch(t, n)["ids"], some.targets[t]["features"], strict=True)}
    for ids, y in zip(batch["ids"], batch["target_features"], strict=True):
        np.testing.assert_array_equal(found[tuple(ids)], y)


def toy_expert_delta(tau, t):
    return trees.map_with_path(lambda path, x: x[:, t] if trees.is_stacked(path) else x[t], tau)


def test_heads_are_trained_for_the_tasks_of_the_batch_only():
    p = problem()
    parametrisation = fixed(coefficients(trees.groups(p.theta0, "task"), TASKS))
    one = lambda step: rows(True).batch([np.arange(4)], [1])
    cross = lambda outputs: objectives.cross_entropy(outputs.logits, outputs.batch["label"])
    found = learn(p, parametrisation, cross, one, optax.sgd(0.1), 3, train_heads=True)
    moved = np.abs(np.asarray(found.heads.kernel) - np.asarray(p.heads.kernel)).max((1, 2))
    assert moved[1] > 1e-3 and moved[0] == moved[2] == 0
    assert found.history["objective"].shape == (3, 1) and found.learnables == {}
    with pytest.raises(ValueError, match="does not divide among 3"):
        learn(p, parametrisation, entropy, lambda step: toy.batch(0, 4), optax.sgd(0.1), 1)


def test_evaluations_happen_where_they_should():
    p = problem()
    parametrisation = coefficients(trees.groups(p.theta0, "task"), TASKS)
    evaluate = Evaluate(3, lambda step, now: (step, float(now.learnables["lam"].sum())))
    run = lambda **loop: learn(
        p, parametrisation, entropy, rows_lib.together(rows(), 4), optax.sgd(0.1), 7, loop=Loop(**loop)
    )
    found, plain = run(evaluate=evaluate, chunk=4), run(chunk=2)
    assert list(found.evaluations) == [3, 6, 7] and [v[0] for v in found.evaluations.values()] == [3, 6, 7]
    np.testing.assert_allclose(found.evaluations[7][1], plain.learnables["lam"].sum(), rtol=1e-6)
    np.testing.assert_array_equal(found.learnables["lam"], plain.learnables["lam"])


def test_a_step_in_pieces_is_the_same_step():
    p = problem()
    parametrisation = coefficients(trees.groups(p.theta0, "tensor"), TASKS)
    run = lambda pieces: learn(
        p, parametrisation, entropy, rows_lib.together(rows(), 4), optax.adam(1e-2), 4, loop=Loop(pieces=pieces)
    )
    one, two = run(1), run(2)
    np.testing.assert_allclose(two.history["objective"], one.history["objective"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(two.learnables["lam"], one.learnables["lam"], atol=1e-4)
    with pytest.raises(ValueError, match=r"12. rows of 3 tasks cannot be cut into 3 pieces"):
        run(3)
    one_a_row = packing.packed({"ids": np.ones((12, 4), np.int32), "mask": np.ones((12, 4), bool)}, 4)
    assert {len(x) for x in one_a_row.values()} == {12}  # as many rows as sentences, in an order of their own
    with pytest.raises(ValueError, match="packed texts cannot be cut into pieces"):
        learn(p, parametrisation, entropy, lambda step: one_a_row, optax.sgd(0.1), 1, loop=Loop(pieces=2))
    for name in ("concrete_adamerging", "samerging", "symerge"):  # not the mean over pieces
        with pytest.raises(ValueError, match=r"takes no Loop.pieces="):
            registry.get(name)(p, with_targets(p, rows()), per_task=4, loop=Loop(pieces=2))


def test_rows_of_other_tasks_are_refused():
    """Rows of one task would divide among three heads, and each head be given those of another task."""
    with pytest.raises(ValueError, match="3 task vectors but rows of 1 tasks"):
        registry.get("adamerging")(problem(), rows().only([2]), steps=1, per_task=6)
    with pytest.raises(ValueError, match="3 task vectors but rows of 1 tasks"):
        registry.get("surgery_v2")(problem(), rows().only([2]), steps=1, per_task=6)


def test_low_rank_task_vectors_are_refused_where_entries_are_needed():
    p = problem()
    up, down = jnp.ones((TASKS, toy.VOCAB, 1)), jnp.ones((TASKS, 1, toy.WIDTH))
    p = p._replace(tau={**p.tau, "embeddings": {**p.tau["embeddings"], "word": LowRank(up, down)}})
    for name, settings in (("adarank", {}), ("fw_soft", {}), ("adamerging", {"plus_plus": True})):
        with pytest.raises(ValueError, match="needs dense task vectors"):
            registry.get(name)(p, rows(True), **settings)


def test_teachers_of_a_linearised_model_are_linear():
    p = problem(scanned=False)
    some = with_targets(p._replace(linear=True), rows())
    at = lambda t, size: jax.tree.map(lambda x, d: x + size * d, p.theta0, toy_expert_delta(p.tau, t))
    for t, n in enumerate((11, 7, 30)):
        run = lambda size, t=t, n=n: np.asarray(toy.apply(at(t, size), toy.batch(t, n))["features"], np.float64)
        slope = (run(3e-3) - run(-3e-3)) / 6e-3
        np.testing.assert_allclose(some.targets[t]["features"], run(0.0) + slope, atol=1e-2)
        assert np.abs(run(1.0) - run(0.0) - slope).max() > 0.2
    for name, found in (("fw_hard", rows(True)), ("sens_merging", rows(True)), ("surgery", rows())):
        with pytest.raises(ValueError, match="does not take a linearised one"):
            registry.get(name)(p._replace(linear=True), found)


def test_pairs_of_texts_are_packed_as_one_batch():
    def take(task, numbers):
        ids = np.where(np.arange(4) < 2 + numbers[:, None] % 3, 5 + numbers[:, None], 0).astype(np.int32)
        return {"ids": ids, "mask": ids > 0, "second_ids": ids[:, :3] * 2, "second_mask": ids[:, :3] > 0}

    pairs = rows_lib.views(rows_lib.Rows((6, 6), take, packing.joiner([np.array([2, 3, 4])] * 2, 8)))
    batch = pairs.batch([np.array([0, 3]), np.array([4, 1])])
    assert len(batch["first"]) == 8 and "mask" not in batch
    first = batch["ids"].ravel()[batch["first"]]
    np.testing.assert_array_equal(first, [5, 8, 10, 16, 9, 6, 18, 12])  # views of a task follow each other


def test_accumulated_gradients_are_those_of_one_large_batch():
    x = np.random.default_rng(0).normal(size=(6, 4, 3)).astype(np.float32)
    loss = lambda w, frozen, batch, key: (jnp.tanh(batch @ w).mean(), {})
    small = fit(loss, jnp.ones(3), optax.adam(0.1), lambda step: x[step], 6, accumulate=3)
    large = fit(loss, jnp.ones(3), optax.adam(0.1), lambda step: x[3 * step : 3 * step + 3].reshape(12, 3), 2)
    np.testing.assert_allclose(small.learnables, large.learnables, rtol=1e-5)


@pytest.mark.parametrize("stacked", [False, True])
def test_low_rank_task_vectors_merge_as_their_products(stacked):
    rng = np.random.default_rng(0)
    lead = (2,) if stacked else ()
    up, down = rng.normal(size=(*lead, TASKS, 5, 2)), rng.normal(size=(*lead, TASKS, 2, 4))
    wrap = (lambda x: {"blocks": {"w": x}}) if stacked else (lambda x: {"w": x})
    theta0 = wrap(jnp.asarray(rng.normal(size=(*lead, 5, 4)), jnp.float32))
    low = wrap(LowRank(jnp.asarray(up, jnp.float32), jnp.asarray(down, jnp.float32)))
    dense = wrap(jnp.asarray(up @ down, jnp.float32))
    parametrisation = coefficients(trees.groups(theta0, "tensor"), TASKS, 0.7)
    a, b = (parametrisation.merge(theta0, tau, parametrisation.init()) for tau in (low, dense))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)


def test_one_partition_is_tensorwise_and_partitions_cover_all_entries():
    theta0, tau = toy.model(0, TASKS)
    groups = trees.groups(theta0, "tensor")
    plain, split = coefficients(groups, TASKS, 0.4, "identity"), coefficients(groups, TASKS, 0.4, "identity", 3)
    a, b = (each.merge(theta0, tau, each.init()) for each in (plain, split))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)
    # Each entry of a tensor follows one of its three coefficients, about a third of the entries each.
    ones = jnp.ones((1, 60, 50))
    theta = {"w": jnp.zeros((60, 50))}
    split = coefficients(trees.groups(theta, "tensor"), 1, 0.0, "identity", 3)
    merged = np.asarray(split.merge(theta, {"w": ones}, {"lam": jnp.array([[[1.0, 2.0, 3.0]]])})["w"])
    values, counts = np.unique(merged, return_counts=True)
    np.testing.assert_array_equal(values, [1, 2, 3])
    assert (np.abs(counts / 3000 - 1 / 3) < 0.03).all()


def test_the_simplex_is_kept():
    p = problem()
    parametrisation = coefficients(trees.groups(p.theta0, "tensor"), TASKS, 1 / 3, "simplex")
    found = learn(p, parametrisation, entropy, rows_lib.together(rows(), 4), optax.sgd(0.5), 4)
    lam = found.learnables["lam"]
    np.testing.assert_allclose(lam.sum(1), 1, atol=1e-5)
    assert (lam >= 0).all() and lam.std() > 0.01
