"""TALL-masks, Consensus and EMR: storage to the bit, statistics of masks, traps."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import taskvec as tv
from taskvec import tree as trees
from taskvec.analysis import storage
from taskvec.analysis.masks import mask_statistics
from taskvec.analysis.storage import Sizes
from taskvec.merging import Method
from taskvec.transforms.stored import Factored
from tests.merging import battery
from tests.models_for_tests import LAYERS, random_models

B32 = Sizes(merged=87_849_216, unmerged=25_599_489)
L14 = Sizes(merged=303_966_208, unmerged=38_595_841)


@pytest.mark.parametrize(
    ("sizes", "tasks", "individual", "masked"),
    [(B32, 20, 57.043, 8.199), (B32, 8, 23.31, 7.14), (B32, 14, 40.18, 7.67), (L14, 20, 195.77, 26.77)],
)
def test_published_storage(sizes, tasks, individual, masked):
    """57 Gb to 8.2 Gb of the abstract of TALL-masks, and its other models."""
    digits = 3 if tasks == 20 and sizes == B32 else 2
    assert round(storage.individual(tasks, sizes) / 1e9, digits) == individual
    assert round(storage.masked(tasks, sizes) / 1e9, digits) == masked


def test_openclip_parameter_count():
    assert sum(B32) == 113_448_705


def some_leaves(seed, tasks, tau_size=0.05):
    """Fewer tensors than `random_models`, to compile less: stacked matrices, one of few entries, ties, integers."""
    pretrained, finetuned = random_models(seed, tasks, tau_size)
    keep = lambda p: {
        "blocks": {"kernel": p["blocks"]["attention"]["kernel"]},
        "head": p["head"]["bias"] + p["head"]["temperature"],
        "table": p["embeddings"]["table"],
        "position_ids": p["position_ids"],
    }
    return keep(pretrained), [keep(f) for f in finetuned]


@pytest.mark.parametrize(("tasks", "include"), [(1, None), (9, None), (3, "blocks|head")])
def test_formula_and_result_agree(tasks, include):
    """Nine tasks and tensors of one entry: masks are not padded in the count, whatever the packing does."""
    pretrained, finetuned = some_leaves(0, tasks)
    policy = tv.LeafPolicy(include)
    sizes = storage.sizes_of(pretrained, policy)
    assert sum(sizes) == sum(x.size for x in jax.tree.leaves(pretrained))
    result = tv.merge("tall_masks", pretrained, finetuned, policy=policy)
    assert storage.bits_of(result) == storage.masked(tasks, sizes) == (64 + tasks) * sizes.merged + 32 * sizes.unmerged
    result = tv.merge("emr", pretrained, finetuned, policy=policy)
    assert storage.bits_of(result) == storage.masked(tasks, sizes, factors=tasks > 1)
    assert storage.bits_of(pretrained) == storage.single(sizes)
    shared = 32 * sizes.unmerged * (tasks - 1)
    assert sum(storage.bits_of(f) for f in finetuned) - shared == storage.individual(tasks, sizes)


def test_bf16_models_take_half():
    pretrained, finetuned = some_leaves(0, 2)
    half = lambda p: jax.tree.map(lambda x: x.astype(jnp.bfloat16) if trees.is_float(x) else x, p)
    result = tv.merge("tall_masks", half(pretrained), [half(f) for f in finetuned])
    sizes = storage.sizes_of(pretrained)
    integers = sizes.unmerged  # the position ids stay int32
    assert storage.bits_of(result) == storage.masked(2, Sizes(sizes.merged, 0), bits=16) + 32 * integers


def test_low_rank_storage():
    m, n, k, tasks = 12, 20, 3, 4
    stored = Factored(*(jnp.zeros(s) for s in ((tasks, m, k), (tasks, k), (tasks, k, n))))
    sizes = Sizes(m * n + 5, 7)
    assert storage.low_rank(tasks, sizes, [(m, n, k)]) - storage.single(sizes) == stored.bits() + 32 * tasks * 5


def masks_and_sums(pretrained, finetuned, thresholds):
    """``{per-layer path: ([T, entries] masks, [entries] sum of the task vectors)}`` by the formula, in float32."""
    named = lambda params: trees.flatten(trees.unstack_layers(params))
    base, models, out = named(pretrained), [named(f) for f in finetuned], {}
    for path, theta0 in base.items():
        if trees.is_float(theta0):
            taus = [np.ravel(np.asarray(m[path], np.float32) - np.asarray(theta0, np.float32)) for m in models]
            total = sum(taus)
            masks = [np.abs(x) > np.float32(h) * np.abs(total - x) for x, h in zip(taus, thresholds, strict=True)]
            out[path] = np.stack(masks), total
    return out


def test_mask_statistics():
    pretrained, finetuned = some_leaves(1, 3, tau_size=1.0)
    found = mask_statistics(tv.merge("tall_masks", pretrained, finetuned, threshold=0.5))
    masks = {path: mask for path, (mask, _) in masks_and_sums(pretrained, finetuned, [0.5] * 3).items()}
    together = np.concatenate(list(masks.values()), axis=1)
    assert found.entries == together.shape[1]
    for path, mask in masks.items():
        np.testing.assert_allclose(found.density[path], mask.mean(1), err_msg=path)
    for a, b in itertools.product(range(3), repeat=2):
        both, either = (together[a] & together[b]).sum(), (together[a] | together[b]).sum()
        assert found.common[a, b] == both
        assert np.isclose(found.iou[a, b], both / either)
        assert np.isclose(found.overlap[a, b], both / min(together[a].sum(), together[b].sum()))
    np.testing.assert_array_equal(found.used_by, np.bincount(together.sum(0), minlength=4))
    assert np.isclose(sum(found.fractions.values()), 1)
    assert np.isclose(found.fractions["selfish"], (together.sum(0) == 1).mean())
    assert sorted(found.by_depth) == [-1, *range(LAYERS)]
    of_block = np.concatenate([mask for path, mask in masks.items() if path.startswith("blocks/1/")], axis=1)
    np.testing.assert_allclose(found.by_depth[1], of_block.mean(1))


def test_statistics_of_empty_and_full_masks():
    """Untouched tensors are in no mask, although a trim whose threshold is zero keeps all their entries."""
    pretrained, _ = some_leaves(0, 1)
    for method, settings in (("tall_masks", {}), ("tall_masks_ties", {"density": 1.0}), ("emr", {})):
        found = mask_statistics(tv.merge(method, pretrained, [pretrained] * 2, **settings))
        assert found.used_by.tolist() == [found.entries, 0, 0] and not found.common.any()
        assert np.isnan(found.iou).all() and found.fractions["catastrophic"] == 1


def test_statistics_need_masks():
    pretrained, finetuned = random_models(0, 2)
    kept = tv.merge(tv.chain(tv.transforms.reduce.keep_tasks()), pretrained, finetuned)
    with pytest.raises(ValueError, match="is stored as Dense, not as a mask"):
        mask_statistics(kept)


def test_masks_of_consensus_are_those_of_tall():
    pretrained, finetuned = some_leaves(3, 4, tau_size=1.0)
    thresholds = (0.2, 0.3, 0.4, 0.5)
    agreed = tv.merge("consensus_ta", pretrained, finetuned, threshold=thresholds, scale=1.0, at_least=3)
    changed = trees.flatten(trees.unstack_layers(agreed))
    start = trees.flatten(trees.unstack_layers(pretrained))
    for path, (masks, total) in masks_and_sums(pretrained, finetuned, thresholds).items():
        kept = (masks.sum(0) >= 3) & (total != 0)
        np.testing.assert_array_equal(np.ravel(changed[path] != start[path]), kept, err_msg=path)


def test_emr_rescale_keeps_the_length():
    """The paper's factors give every task the L1 norm of its own task vector."""
    pretrained, finetuned = some_leaves(2, 3)
    result = tv.merge("emr", pretrained, finetuned)
    length = lambda params: sum(
        float(jnp.abs(x - y).sum()) for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(pretrained), strict=True)
    )
    for t, expert in enumerate(finetuned):
        assert np.isclose(length(result.params(t)), length(expert), rtol=1e-4)


def test_emr_of_a_task_that_agrees_nowhere():
    """Its mask is empty; no factor divides by zero."""
    base = {"w": jnp.zeros((2, 3))}
    models = [{"w": jnp.full((2, 3), 1.0)}, {"w": jnp.full((2, 3), -0.1)}, base]
    result = tv.merge("emr", base, models)
    np.testing.assert_allclose(result.params(0)["w"], 1.0)
    for task in (1, 2):
        np.testing.assert_array_equal(result.params(task)["w"], 0.0)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("tall_masks", {"threshold": 0.0}, "threshold must be positive, got 0.0"),
        ("tall_masks", {"threshold": (0.2, -0.1)}, "threshold must be positive"),
        ("tall_masks", {"threshold": (0.2, 0.3, 0.4)}, "3 values for 2 task vectors: give one, or one per task"),
        ("consensus_ta", {"at_least": 0}, "at_least must be 1 or more"),
        ("emr", {"rescale": "code"}, "unknown rescale 'code'; allowed: paper, released, none"),
        (tv.chain(tv.keep_masked(0.4)), {}, r"keep_masked masks a merged vector: put sum_tasks\(\)"),
        (tv.chain(tv.consensus(0.4)), {}, r"consensus masks a merged vector: put sum_tasks\(\)"),
        (tv.chain(tv.sum_tasks(), tv.elect_and_mask()), {}, "elect_and_mask takes task vectors"),
    ],
)
def test_wrong_settings(method, settings, message):
    with pytest.raises(ValueError, match=message):
        tv.merge(method, *random_models(0, 2), **settings)


def test_compositions():
    """Masks after other transforms: trimmed EMR, masks on a LiNeS vector."""
    pretrained, finetuned = some_leaves(5, 3)
    trimmed = tv.merge(tv.chain(tv.trim(0.3), tv.elect_and_mask()), pretrained, finetuned)
    assert max(mask_statistics(trimmed).density["blocks/0/kernel"]) < 0.7
    scaled = tv.merge(tv.chain(tv.sum_tasks(), tv.scale_by_depth(0.5), tv.keep_masked(0.4)), pretrained, finetuned)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(scaled.params(2)))


def test_streamed_by_rows(tmp_path):
    """The sizes in EMR's released factors are those of whole tensors, not of blocks of rows."""
    card = tv.methods()["emr"].card
    battery.streamed_equals_in_memory(Method("emr", card, lambda: tv.elect_and_mask("released")), tmp_path)


def test_streamed_norms_by_rows(tmp_path):
    chained = lambda: tv.chain(
        tv.restore_norm("l2"), tv.norm_weighting(-1.0, scope="tensor"), tv.norm_weighting(2.0), tv.sum_tasks()
    )
    card = tv.methods()["metagpt"].card
    battery.streamed_equals_in_memory(Method("metagpt", card, chained), tmp_path)
