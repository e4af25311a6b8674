"""What the oracles' well-behaved models do not show: low rank, steep spectra, fused matrices, sizes in bits."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import taskvec as tv
from taskvec.merging.graftllm import BANDS
from taskvec.transforms.low_rank import Quantised, dequantise, quantise
from taskvec.transforms.singular import polar, singular, top_singular
from taskvec.transforms.spectral import subspace_ranks
from tests.merging.oracles import spectral as oracles

RNG = np.random.default_rng(0)


def orthogonal(n, k):
    return np.linalg.qr(RNG.standard_normal((n, k)))[0]


def with_spectrum(m, n, s):
    return orthogonal(m, len(s)) * s @ orthogonal(n, len(s)).T


def merged(method, taus, name="w", **settings):
    """Merges task vectors of one matrix whose pretrained weights are zero."""
    models = [{name: tau.astype(np.float32)} for tau in taus]
    result = tv.merge(method, {name: np.zeros(taus[0].shape, np.float32)}, models, **settings)
    return result if hasattr(result, "params") else np.asarray(result[name])


def assert_near(x, expected, tolerance):
    assert np.linalg.norm(x - expected) < tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("method", ["iso_cts", "svc_ta", "knots_ties"])
@pytest.mark.parametrize("name", ["kernel", "transformer.h.0.attn.c_attn.weight"])
def test_either_layout_of_a_linear_layer_merges_alike(method, name):
    taus = RNG.standard_normal((2, 24, 16))
    stored = merged(method, taus.swapaxes(1, 2), name)
    np.testing.assert_allclose(stored.T, merged(method, taus, "fc.weight"), atol=1e-4)
    other_way_round = merged(method, taus, name)
    assert np.abs(other_way_round - stored.T).max() > 1e-2  # sides matter to these methods


def low_rank_taus(tasks, n, rank):
    return np.stack([RNG.standard_normal((n, rank)) @ RNG.standard_normal((rank, n)) for _ in range(tasks)])


@pytest.mark.parametrize(
    "x",
    [
        RNG.standard_normal((48, 48)),
        RNG.standard_normal((20, 48)),
        with_spectrum(60, 48, np.logspace(0, -4, 48)),
        with_spectrum(48, 48, np.concatenate([np.ones(40), np.logspace(-2, -4, 8)])),
        np.concatenate([orthogonal(48, 6) for _ in range(8)], axis=1),
    ],
    ids=["square", "wide", "steep", "tail", "blocks"],
)
def test_polar_factor_is_as_good_as_by_svd(x):
    u, _, vt = np.linalg.svd(x.astype(np.float32).astype(np.float64), full_matrices=False)
    assert_near(np.asarray(polar(jnp.asarray(x, jnp.float32))), u @ vt, 5e-4)


def test_polar_factor_of_low_rank_and_of_zero():
    x = low_rank_taus(1, 40, 5)[0]
    u, _, vt = np.linalg.svd(x)
    assert_near(np.asarray(polar(jnp.asarray(x, jnp.float32))), u[:, :5] @ vt[:5], 1e-5)
    assert not np.asarray(polar(jnp.zeros((6, 4)))).any()
    u, s, v = singular(jnp.zeros((6, 4)))
    assert not np.asarray(u).any() and not np.asarray(s).any()
    np.testing.assert_allclose(v.T @ v, np.eye(4), atol=1e-6)


def test_singular_under_vmap_mends_the_one_that_needs_it():
    xs = np.stack([orthogonal(32, 32), with_spectrum(32, 32, np.logspace(0, -3, 32))]).astype(np.float32)
    for x, p in zip(xs, jax.vmap(polar)(xs), strict=True):
        u, _, vt = np.linalg.svd(x.astype(np.float64))
        assert_near(np.asarray(p), u @ vt, 1e-4)


def test_top_singular_below_the_floor_is_zero():
    u, s, vt = top_singular(jnp.diag(jnp.array([1.0, 0.1, 0.01])), 3, floor=0.05)
    np.testing.assert_allclose(s, [1.0, 0.1, 0.0], atol=1e-6)
    assert not np.asarray(u[:, 2]).any() and not np.asarray(vt[2]).any()


def test_tsv_m_on_steep_spectra():
    """Fine-tuning leaves spectra that fall over many orders; the Gram route must not spoil the sum."""
    taus = np.stack([with_spectrum(40, 24, np.logspace(-2, -8, 24)) for _ in range(4)])
    assert_near(merged("tsv_m", taus), oracles.tsv_m({"w": taus}, {"w": None})["w"], 2e-3)


@pytest.mark.parametrize("solver", ["gram", "svd"])
def test_tsv_m_of_low_rank_and_untouched_tasks(solver):
    """LoRA experts, and a task that left the matrix alone: singular vectors that do not exist must not take part."""
    taus = np.concatenate([low_rank_taus(3, 24, 2), np.zeros((1, 24, 24))])
    parts = [np.linalg.svd(tau) for tau in taus[:3]]
    u, v = (np.concatenate(x, axis=1) for x in zip(*((p[0][:, :2], p[2][:2].T) for p in parts), strict=True))
    s = np.diag(np.concatenate([p[1][:2] for p in parts]))
    assert_near(merged("tsv_m", taus, solver=solver), oracles._polar(u) @ s @ oracles._polar(v).T, 1e-3)


def test_iso_c_leaves_rounding_noise_alone():
    """The mean is over all singular values, the directions that exist are raised to it, and no others."""
    taus = low_rank_taus(3, 40, 2)
    s = np.linalg.svd(merged("iso_c", taus))[1]
    total = np.linalg.svd(taus.sum(0))[1]
    np.testing.assert_allclose(s[:6], total.sum() / 40, rtol=1e-4)
    assert s[6:].max() < 1e-4 * s[0]


def test_iso_cts_of_low_rank_experts():
    """Residuals are rounding noise (each expert lies in the span of the sum): what is left is the common part."""
    taus = low_rank_taus(3, 30, 2)
    s = np.linalg.svd(merged("iso_cts", taus))[1]
    np.testing.assert_allclose(s[:6], np.linalg.svd(taus.sum(0))[1].sum() / 30, rtol=1e-3)
    assert s[6:].max() < 1e-3 * s[0]


def test_iso_cts_projects_outputs():
    """A flax kernel is the transpose of a torch weight, and so is its merge; the two sides are not the same."""
    taus = RNG.standard_normal((3, 12, 20))
    torch = merged("iso_cts", taus)
    np.testing.assert_allclose(merged("iso_cts", taus.swapaxes(1, 2), "kernel").T, torch, atol=1e-4)
    assert np.abs(merged("iso_cts", taus.swapaxes(1, 2)).T - torch).max() > 1e-3


def test_subspace_ranks_are_the_released_ones():
    assert subspace_ranks(768, 8, 0.8) == (616, 19)
    assert subspace_ranks(8, 20, 0.8) == (8, 0)
    assert subspace_ranks(8, 5, 0.0) == (3, 1)  # rounding up would not fit


def test_knots_counts_existing_coordinates():
    """Two LoRA experts of rank 2 span 4 directions of 30: 50 % are 2 x 30 entries per task, not 15 x 30."""
    taus = low_rank_taus(2, 30, 2)
    kept = tv.chain(tv.in_shared_basis(tv.trim_present(0.5)), tv.sum_tasks())
    coordinates, bases = oracles._in_basis({"w": taus})
    assert coordinates["w"].shape == (2, 4, 30)
    x = coordinates["w"] * (
        np.abs(coordinates["w"]) >= np.sort(np.abs(coordinates["w"]).reshape(2, -1))[:, 60, None, None]
    )
    assert_near(merged(kept, taus), bases["w"] @ x.sum(0), 1e-4)


def test_any_chain_runs_in_the_shared_basis():
    """Sums and what is orthogonally invariant are the same in any basis; tensor-wide measures are taken there."""
    taus = RNG.standard_normal((3, 10, 14))
    np.testing.assert_allclose(merged(tv.in_shared_basis(tv.sum_tasks()), taus), taus.sum(0), atol=1e-5)
    trimmed = merged(tv.chain(tv.in_shared_basis(tv.trim(0.3, scope="tensor")), tv.sum_tasks()), taus)
    coordinates, bases = oracles._in_basis({"w": taus})
    x = coordinates["w"]
    x = x * (np.abs(x) >= np.sort(np.abs(x).reshape(3, -1))[:, -42, None, None])
    assert_near(trimmed, bases["w"] @ x.sum(0), 1e-4)


@pytest.mark.parametrize(
    "inner",
    [
        tv.merge_singular_vectors(),
        tv.chain(tv.trim(0.2, scope="tensor"), tv.elect_signs(), tv.disjoint_mean()),
        tv.chain(tv.trim(0.2), tv.sum_tasks(), tv.scale(0.3)),
    ],
    ids=["matrix", "tensor", "model"],
)
def test_fused_by_a_view_equals_split(inner):
    split = [{part: RNG.standard_normal((4, 6)).astype(np.float32) for part in ("k", "q", "v", "w")} for _ in range(3)]
    fuse = lambda p: {"in_proj": np.concatenate([p["q"], p["k"], p["v"]]), "w": p["w"]}
    zeros = jax.tree.map(np.zeros_like, split[0])
    apart = tv.merge(inner, zeros, split)
    fused = tv.merge(tv.split_view(inner, "in_proj", 3), fuse(zeros), [fuse(p) for p in split])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), fused, fuse(apart))


def test_views_say_what_does_not_fit():
    with pytest.raises(ValueError, match=r"axis 0 of shape .* does not split into 3 parts"):
        merged(tv.split_view(tv.sum_tasks(), "w", 3), RNG.standard_normal((2, 4, 6)))
    with pytest.raises(ValueError, match="cannot run a task-conditioned chain"):
        merged(tv.split_view(tv.keep_task_ranks(), "w", 2), RNG.standard_normal((2, 4, 6)))


def test_svc_shrinks_what_tasks_share():
    """Identical tasks: every direction is counted T times, and calibration divides by T; orthogonal ones stay."""
    tau = RNG.standard_normal((8, 8))
    same = merged("svc_ta", np.stack([tau] * 4), scale=1.0)
    np.testing.assert_allclose(same, tau, atol=1e-4)
    apart = np.stack([np.outer(a, b) for a, b in zip(np.eye(8), np.eye(8)[::-1], strict=True)][:3])
    apart *= np.array([3.0, 2.0, 1.0])[:, None, None]
    share = 3 / (1 + 2 / 3)  # own task 1, the two others alpha = 1/3
    np.testing.assert_allclose(merged("svc_ta", apart, scale=1.0), share * apart.sum(0), atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantised_rows_come_back(bits):
    x = jnp.asarray(RNG.standard_normal((3, 5, 131)), jnp.float32)
    codes, levels = quantise(x, bits, 128)
    step = np.asarray(levels[..., 1], np.float32).max()
    assert codes.dtype == jnp.uint8 and codes.shape == (3, 5, 2 * 128 * bits // 8)
    assert np.abs(dequantise(codes, levels, bits, 131) - x).max() < 0.51 * step + 2e-3


def test_graft_bits_are_the_published_ones():
    """Codes of a 4096 x 4096 attention matrix are 7.6 % of its bf16 bits, those of a 4096 x 14336 one 6.4 %."""
    for (m, n), rank, percent in [((4096, 4096), 1000, 7.57), ((4096, 14336), 1400, 6.43)]:
        shapes = [(1, m, rank), (1, rank), (1, rank, n)]
        make = lambda u, s, vt: Quantised.make(u, s, vt, BANDS, 128)
        stored = jax.eval_shape(make, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
        codes = sum(8 * x.size for x in jax.tree.leaves(stored.codes))
        assert round(100 * codes / (16 * m * n), 2) == pytest.approx(percent, abs=0.01)
        levels = 2 * 16 * rank * (m + n) // 128
        assert sum(8 * x.size * x.dtype.itemsize for x in jax.tree.leaves(stored)) == codes + levels + 16 * rank


def rounded(rows, bits, group):
    """Every group of a row to the nearest of its levels, which are kept in float16."""
    out = np.zeros(rows.shape)
    for i, row in enumerate(rows):
        for at in range(0, len(row), group):
            part = row[at : at + group]
            low, step = np.float16(part.min()), np.float16((part.max() - part.min()) / (2**bits - 1))
            codes = np.clip(np.round((part - float(low)) / float(step)), 0, 2**bits - 1)
            out[i, at : at + group] = float(low) + float(step) * codes
    return out


def test_graft_compress_in_bands_is_the_rounded_factors():
    """Singular vectors have no sign of their own, and rounding sees it: some choice of signs gives the result."""
    [tau] = RNG.standard_normal((1, 24, 16))
    result = merged("graft_compress", [tau], "mlp", ranks=(("mlp", 4),), bands=((1, 8), (3, 4), (None, 2)), group=8)
    u, s, vt = np.linalg.svd(tau.astype(np.float32).astype(np.float64))
    s = np.asarray(jnp.asarray(s[:4], jnp.bfloat16), np.float64)
    bits = (8, 4, 4, 2)
    part = lambda k, sign: (
        s[k] * np.outer(rounded(sign * u[None, :, k], bits[k], 8), rounded(sign * vt[None, k], bits[k], 8))
    )
    sums = [sum(part(k, sign) for k, sign in enumerate(signs)) for signs in itertools.product((1, -1), repeat=4)]
    found = np.asarray(result.params(0)["mlp"])
    assert min(np.abs(found - each).max() for each in sums) < 1e-5
    assert np.abs(found - (u[:, :4] * s) @ vt[:4]).max() > 0.05


def test_graft_compress_with_bands():
    taus = RNG.standard_normal((2, 24, 16))
    result = merged("graft_compress", taus, "mlp", ranks=(("mlp", 16),), bands=((8, 8), (None, 4)))
    for t in range(2):
        assert_near(np.asarray(result.params(t)["mlp"]), taus[t], 0.05)
    model = 32 * 24 * 16
    assert result.bits() == model + 2 * (8 * 8 + 4 * 8) * (24 + 16) + 2 * 2 * 16 * 2 * 16 + 2 * 16 * 16


def test_tsv_compress_bits():
    """32 k (m + n + 1) a task and matrix (specification, storage accounting)."""
    result = merged("tsv_compress", RNG.standard_normal((4, 24, 16)))
    assert result.bits() == 32 * 24 * 16 + 4 * 32 * 4 * (24 + 16 + 1)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("iso_cts", {"common": 1.5}, r"common must lie in \[0, 1\]"),
        ("svc_ta", {"alpha": -1.0}, "alpha must be positive or '1/T'"),
        ("cart", {"density": 12}, r"density must lie in \(0, 1\]"),
        ("graft_compress", {"bands": ((20, 3), (None, 2))}, "2, 4 or 8 bits"),
        ("iso_c", {"solver": "qr"}, "allowed: gram, svd"),
        (tv.chain(tv.sum_tasks(), tv.flatten_spectrum()), {}, "put it before a reduction"),
        (tv.chain(tv.calibrate_spectrum(), tv.sum_tasks()), {}, "takes a merged vector"),
    ],
)
def test_messages(method, settings, message):
    with pytest.raises(ValueError, match=message):
        merged(method, RNG.standard_normal((2, 4, 4)), **settings)


def test_stacked_matrices_are_factorised_one_after_the_other():
    """Batched factorisations side by side in one program have hung; here in a process of its own, with a limit."""
    program = (
        "import jax, taskvec as tv\n"
        "of = lambda seed: {'blocks': {'w': jax.random.normal(jax.random.key(seed), (6, 128, 128))}}\n"
        "jax.block_until_ready(tv.merge('tsv_m', of(0), [of(i) for i in range(1, 5)]))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
