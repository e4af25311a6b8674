"""Sparse and signed methods: numbers worked out by hand, traps, errors, and what MergeKit needs of the transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import taskvec as tv
from taskvec.transforms import competition
from tests.merging.oracles import sparse

ROOT = {"w": jnp.zeros(8)}


def merged(method, *vectors, **settings):
    """The merged weights of one tensor, pretrained at zero."""
    vectors = [np.asarray(v, np.float32) for v in vectors]
    root = {"w": np.zeros_like(vectors[0])}
    return np.asarray(tv.merge(method, root, [{"w": v} for v in vectors], **settings)["w"])


@pytest.mark.parametrize("method", ["ties", "knots_ties", "knots_dare_ties"])
def test_what_is_elected_where_signs_cancel(method):
    """The third entries cancel; the majority is that of the elected signs, and one of 0 keeps what is negative."""
    elected = lambda last, zero: merged(method, [2, -3, 1, last], [1, -1, -1, last], density=1.0, scale=1.0, zero=zero)
    np.testing.assert_array_equal(elected(0, "zero"), [1.5, -2, 0, 0])
    np.testing.assert_array_equal(elected(0, "majority"), [1.5, -2, -1, 0])
    np.testing.assert_array_equal(elected(4, "majority"), [1.5, -2, 1, 4])
    np.testing.assert_array_equal(elected(-4, "majority"), [1.5, -2, -1, -4])
    np.testing.assert_array_equal(elected(-4, "positive"), [1.5, -2, 1, -4])


def test_cabs_later_tasks_take_what_is_left():
    first, second = [4, 1, -3, 2, 0, 0, 9, 0], [5, 6, 7, -8, 1, 0, 9, 0]
    out = merged("cabs", first, second, n=2, m=4)
    np.testing.assert_array_equal(out, [4, 6, -3, -8, 1, 0, 9, 0])
    np.testing.assert_array_equal(merged("cabs", second, first, n=2, m=4), [4, 1, 7, -8, 1, 0, 9, 0])


def test_cabs_leftover_and_blocks():
    x = np.arange(1, 11)
    np.testing.assert_array_equal(merged("cabs", x, n=1, m=4), [0, 0, 0, 4, 0, 0, 0, 8, 0, 10])
    np.testing.assert_array_equal(merged("cabs", x, n=1, m=4, leftover="drop"), [0, 0, 0, 4, 0, 0, 0, 8, 0, 0])
    rows = np.arange(1, 13).reshape(2, 6)
    by_row = [[0, 0, 0, 4, 0, 6], [0, 0, 0, 10, 0, 12]]
    np.testing.assert_array_equal(merged("cabs", rows, n=1, m=4), by_row)
    flat = [[0, 0, 0, 4, 0, 0], [0, 8, 0, 0, 0, 12]]
    np.testing.assert_array_equal(merged("cabs", rows, n=1, m=4, blocks="tensor"), flat)


def test_cabs_density_and_no_overlap():
    x = np.random.default_rng(0).standard_normal((5, 64, 96)).astype(np.float32)
    kept = tv.transform_task_vectors(tv.block_prune(3, 32), {"w": jnp.zeros((64, 96))}, {"w": jnp.asarray(x)})["w"]
    assert (np.asarray(kept != 0).sum(0) <= 1).all()
    assert [(k != 0).mean() for k in np.asarray(kept)] == [3 / 32] * 5
    np.testing.assert_array_equal(np.asarray(kept)[np.asarray(kept) != 0], x[np.asarray(kept) != 0])


def test_cabs_overlap_of_the_7b_program():
    """n >= m / 2: the second task keeps all that is free and the m / 2 largest of what is taken."""
    first, second = [4, 3, 2, 1], [8, 7, 9, 1]
    np.testing.assert_array_equal(merged("cabs", first, second, n=3, m=4), [4, 3, 2, 1])
    np.testing.assert_array_equal(merged("cabs", first, second, n=3, m=4, overlap="half"), [12, 3, 11, 1])


def test_magmax_later_task_wins_ties():
    np.testing.assert_array_equal(merged("magmax", [1, -2, 3], [-1, 2, 1], scale=1.0), [-1, 2, 3])
    many = [np.full(3, (-1.0) ** t) for t in range(40)]  # beyond the unrolled loop
    np.testing.assert_array_equal(merged("magmax", *many, scale=1.0), -np.ones(3))


def test_ram_averages_shared_and_keeps_unique():
    a, b, c = [1, 3, 0, 1e-6], [0, 5, 2, 0], [0, 1, 0, 0]
    np.testing.assert_allclose(merged("ram", a, b, c), [1, 3, 2, 0])
    # a shares 1 and has 1 alone: ratio 1, so that 1 + 0.5 min(1, 0.6) = 1.3; b likewise.
    np.testing.assert_allclose(merged("ram_plus", a, b, c, r=0.5, alpha=0.6), [1.3, 3, 2.6, 0], rtol=1e-6)


def test_ram_plus_counts_over_the_model_or_a_tensor():
    root = {"u": np.zeros(2, np.float32), "v": np.zeros(2, np.float32)}
    a = {"u": np.float32([1, 1]), "v": np.float32([1, 0])}
    b = {"u": np.float32([1, 1]), "v": np.float32([0, 0])}
    model = tv.merge("ram_plus", root, [a, b], r=0.1, alpha=5.0)
    np.testing.assert_allclose(model["v"], [1.2, 0], rtol=1e-6)  # two shared, one alone
    tensor = tv.merge("ram_plus", root, [a, b], r=0.1, alpha=5.0, scope="tensor")
    np.testing.assert_allclose(tensor["v"], [1.0, 0], rtol=1e-6)


def test_sce_by_hand():
    # Energies 20 and 5, so 0.8 and 0.2; the second entry elects -.
    a, b = [2, -4, 0, 0], [1, 2, 0, 0]
    np.testing.assert_allclose(merged("sce", a, b), [1.8, -4, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(merged("sce", a, b, normalize=False), [1.8, -3.2, 0, 0], rtol=1e-6)
    # Variances 1/4, 9, 0, 0: of the two that are not zero the larger one is selected, energies 16 and 4.
    np.testing.assert_allclose(merged("sce", a, b, density=0.5), [0, -4, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(merged("sce", a, b, density=0.5, mixed="all"), [1.8, -4, 0, 0], rtol=1e-6)
    assert not merged("sce", a, b, density=0.4).any()  # int(0.4 * 2) = 0 entries


def test_sce_does_not_depend_on_the_size_of_the_vectors():
    """MergeKit's guard turns the method into a plain mean for small task vectors; ours is an option."""
    x = np.random.default_rng(1).standard_normal((2, 50)).astype(np.float32) * np.float32([[1], [3]])
    small = x * np.float32(2.0**-12)
    np.testing.assert_allclose(merged("sce", *small) * 2.0**12, merged("sce", *x), rtol=1e-6)
    guarded = merged("sce", *small, guards="mergekit") * 2.0**12
    agreeing = np.sign(x[0]) == np.sign(x[1])
    np.testing.assert_allclose(guarded[agreeing], x.mean(0)[agreeing], rtol=1e-6)


@pytest.mark.parametrize("variant", ["paper", "released", "released_vision", "released_search"])
def test_pcb_counts_frozen_entries(variant):
    """Zeros that the policy counts change nothing but the ranks: the same as a model that holds them."""
    rng = np.random.default_rng(2)
    taus = rng.standard_normal((3, 400)).astype(np.float32) * 0.05
    frozen = np.zeros(100, np.float32)
    models = [{"w": tau, "text": frozen} for tau in taus]
    root = {"w": np.zeros(400, np.float32), "text": frozen}
    policy = tv.LeafPolicy(include="w", count_excluded=True)
    left_out = tv.merge("pcb", root, models, policy=policy, variant=variant)["w"]
    np.testing.assert_allclose(left_out, tv.merge("pcb", root, models, variant=variant)["w"], atol=2e-6)


def test_pcb_of_many_tasks_does_not_overflow():
    """exp(T n^2) of the released programs leaves float32 at T = 89."""
    taus = jnp.asarray(np.random.default_rng(3).standard_normal((100, 30)) * np.logspace(-6, 0, 30), jnp.float32)
    bounds = jnp.stack([jnp.abs(taus).min(1), jnp.abs(taus).max(1)], axis=1)
    claims = competition._released_claims(taus, (None, bounds), "released")
    assert jnp.isfinite(claims).all() and float(claims.max()) > 0


@pytest.mark.parametrize("variant", ["paper", "released_search"])
@pytest.mark.parametrize(("tasks", "size"), [(3, 1000), (4, 960), (12, 1000)])
def test_pcb_by_chunks_and_of_more_tasks_than_are_written_out(tasks, size, variant, monkeypatch):
    monkeypatch.setattr(competition, "_CHUNK", 64)
    taus = np.random.default_rng(tasks).standard_normal((tasks, size)).astype(np.float32)
    settings = {"density": 0.2 + 1e-3 * tasks, "variant": variant}  # of no other test: programs are kept
    expected = sparse.pcb({"w": taus.astype(np.float64)}, {}, **settings)["w"]
    np.testing.assert_allclose(merged("pcb", *taus, **settings), expected, atol=1e-5)


def test_pcb_keeps_a_single_tasks_largest():
    x = np.arange(1.0, 101.0) * np.where(np.arange(100) % 2, 1, -1)
    out = merged("pcb", x, density=0.1, scale=1.0)
    np.testing.assert_allclose(out, np.where(np.abs(x) > 90, x, 0))


def test_della_keeps_large_entries_more_often():
    size = 2000
    ones = np.sort(np.random.default_rng(4).random((6, size)).astype(np.float32) + 1.0, axis=1)
    drop = tv.drop_by_rank(0.5, 0.8, rescale="none")
    kept = np.asarray(tv.transform_task_vectors(drop, {"w": jnp.zeros(size)}, {"w": jnp.asarray(ones)})["w"]) != 0
    assert abs(kept.mean() - 0.5) < 0.02
    assert abs(kept[:, :200].mean() - 0.14) < 0.04 and abs(kept[:, -200:].mean() - 0.86) < 0.04


def test_della_is_unbiased_and_l1_keeps_the_norm():
    x = jnp.asarray(np.random.default_rng(5).standard_normal((2, 100, 200)), jnp.float32)
    drop = lambda rescale: tv.transform_task_vectors(
        tv.drop_by_rank(0.6, 0.4, rescale), {"w": jnp.zeros(x.shape[1:])}, {"w": x}
    )["w"]
    assert abs(float(jnp.vdot(drop("inverse_probability"), x) / jnp.vdot(x, x)) - 1) < 0.02
    np.testing.assert_allclose(jnp.abs(drop("l1")).sum((1, 2)), jnp.abs(x).sum((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("axis", [-1, -2, "tensor"])
def test_della_keeps_the_same_entries_by_ranks_and_by_order_statistics(axis):
    x = jnp.asarray(np.random.default_rng(6).standard_normal((2, 30, 40)), jnp.float32)
    kept = lambda rescale: tv.transform_task_vectors(
        tv.drop_by_rank(0.5, 0.6, rescale, axis), {"w": jnp.zeros(x.shape[1:])}, {"w": x}
    )["w"]
    np.testing.assert_array_equal(kept("none") != 0, kept("inverse_probability") != 0)


def test_della_keeps_the_density_of_equal_magnitudes():
    x = jnp.asarray(np.random.default_rng(7).choice([-1.0, 1.0, 2.0, -2.0], (2, 4000)), jnp.float32)
    out = tv.transform_task_vectors(tv.drop_by_rank(0.5, 0.8, "none"), {"w": jnp.zeros(4000)}, {"w": x})["w"]
    small = np.abs(x) == 1
    assert abs(np.mean(out[small] != 0) - 0.3) < 0.03 and abs(np.mean(out[~small] != 0) - 0.7) < 0.03


def test_weights_of_a_search_do_not_compile_anew():
    root, models = ROOT, [{"w": jnp.arange(8.0) * (t - 1)} for t in range(3)]
    tv.merge("pcb", root, models, weights=(1.0, 1.0, 1.0))
    before = tv.transforms.run.applied._cache_size()
    for weight in (0.8, 0.9, 1.3):
        tv.merge("pcb", root, models, weights=(weight, 1.0, 1.2), scale=weight)
    assert tv.transforms.run.applied._cache_size() == before


def test_weighted_disjoint_mean_is_mergekits_divisor():
    x, w = jnp.array([[1.0, 0.0, 2.0, 1.0], [3.0, 4.0, 0.0, 1.0]]), (0.5, -0.5)
    stages = tv.chain(tv.transforms.reduce.weigh(w), tv.weighted_disjoint_mean(w))
    out = tv.transform_task_vectors(stages, {"w": jnp.zeros(4)}, {"w": x})["w"]
    np.testing.assert_allclose(out, [-1.0, 4.0, 2.0, 0.0])


def test_lt_sft_adds_overlapping_entries():
    np.testing.assert_array_equal(merged("lt_sft", [1, 0, 2, 0], [0, 0, 3, -1]), [1, 0, 5, -1])


def test_composes_with_other_transforms():
    """CABS after TIES' trimming, MagMax of DELLA's vectors, PCB's shares into a mean scaled by depth."""
    rng = np.random.default_rng(6)
    taus = rng.standard_normal((3, 200)).astype(np.float32)
    for chain in (
        tv.chain(tv.trim(0.5), tv.block_prune(1, 8), tv.sum_tasks()),
        tv.chain(tv.drop_by_rank(0.5, 0.2), tv.largest_change()),
        tv.chain(tv.compete(0.2), tv.elect_signs(), tv.disjoint_mean(), tv.scale(0.5)),
    ):
        assert np.isfinite(merged(chain, *taus)).all() and merged(chain, *taus).any()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cabs", {"n": 5, "m": 4}, "1 <= n <= m, got 5:4"),
        ("cabs", {"leftover": "keep"}, "unknown leftover 'keep'; allowed: short, drop"),
        ("pcb", {"variant": "code"}, "unknown variant 'code'; allowed: paper, released, released_vision"),
        ("pcb", {"density": 5}, r"density must lie in \(0, 1\]"),
        ("pcb", {"weights": (1.0,)}, "1 weights for 2 task vectors"),
        ("della", {"density": 0.05}, r"density \+- window / 2 must lie in \(0, 1\], got density 0.05, window 0.14"),
        ("della", {"election": "count"}, "unknown election 'count'; allowed: sum, none"),
        ("sce", {"guards": "all"}, "unknown guards 'all'; allowed: none, mergekit"),
        ("ram_plus", {"r": -1.0}, "must not be negative"),
    ],
)
def test_errors(name, settings, message):
    with pytest.raises(ValueError, match=message):
        merged(name, np.ones(8), np.ones(8), **settings)


def test_block_prune_under_vmap():
    x = jnp.asarray(np.random.default_rng(7).standard_normal((4, 2, 6, 16)), jnp.float32)
    prune = tv.block_prune(2, 8)
    stacked = jax.vmap(lambda one: prune.apply(one, None, ()))(x)
    for layer in range(4):
        expected = sparse._take_blocks(np.asarray(x[layer]).reshape(2, -1), 2, 8, "short", "none")
        np.testing.assert_array_equal(stacked[layer].reshape(2, -1), expected.astype(np.float32))
