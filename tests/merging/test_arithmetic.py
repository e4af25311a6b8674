"""Averages, norm weights, experts, layer swapping, LiNeS' edit, restored norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import taskvec as tv
from taskvec import tree as trees
from tests.models_for_tests import random_models


def close(a, b, atol=1e-6):
    for (path, x), y in zip(trees.flatten(a).items(), trees.flatten(b).values(), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, err_msg=path)


@pytest.mark.parametrize("method", ["weight_average", "checkpoint_average", "run_average", "elm"])
def test_averages_need_no_pretrained_model(method):
    """Integers come from the first model; with a pretrained model the mean is the same."""
    pretrained, models = random_models(0, 3)
    models[0]["position_ids"] = models[0]["position_ids"] + 5
    alone = tv.merge(method, None, models)
    close(alone["blocks"], tv.merge(method, pretrained, models)["blocks"])
    np.testing.assert_array_equal(alone["position_ids"], models[0]["position_ids"])
    for path, x in trees.flatten(alone).items():
        if trees.is_float(x):
            np.testing.assert_allclose(x, np.mean([trees.flatten(m)[path] for m in models], 0), atol=1e-6)


def test_average_of_one_checkpoint_is_that_checkpoint():
    _, (model,) = random_models(0, 1)
    close(tv.merge("checkpoint_average", None, [model]), model, atol=0)


def test_metagpt_of_equal_norms_is_the_average():
    pretrained, finetuned = random_models(1, 1)
    tau = jax.tree.map(jnp.subtract, finetuned[0], pretrained)
    mirrored = jax.tree.map(jnp.subtract, pretrained, tau)
    close(tv.merge("metagpt", pretrained, [finetuned[0], mirrored]), pretrained)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("power", [2.0, 1.0, 0.0, -1.0])
def test_norm_weighting(power, scope):
    """Weights by hand; an untouched task has none, and takes nothing from the others."""
    sizes = {"a": np.array([3.0, 1.0, 0.0]), "b": np.array([4.0, 2.0, 0.0])}
    models = [{k: jnp.array([v[t]], jnp.float32) for k, v in sizes.items()} for t in range(3)]
    base = {k: jnp.zeros(1) for k in sizes}
    merged = tv.merge(tv.chain(tv.norm_weighting(power, 6.0, scope=scope), tv.sum_tasks()), base, models)
    for k, values in sizes.items():
        norms = np.abs(values) if scope == "tensor" else np.hypot(sizes["a"], sizes["b"])
        powers = np.array([n**power if n > 0 or power == 0 else 0.0 for n in norms])
        np.testing.assert_allclose(merged[k], [(6.0 * powers / powers.sum() * values).sum()], rtol=1e-5)


def test_norm_weighting_of_weights():
    """The norms of the fine-tuned weights instead of those of the vectors."""
    base, models = {"a": jnp.array([3.0, 0.0])}, [{"a": jnp.array([3.0, 4.0])}, {"a": jnp.array([6.0, 8.0])}]
    merged = tv.merge(tv.chain(tv.norm_weighting(-1.0, of="weights"), tv.sum_tasks()), base, models)
    expected = np.array([3.0, 0.0]) + 2 / 3 * np.array([0.0, 4.0]) + 1 / 3 * np.array([3.0, 8.0])
    np.testing.assert_allclose(merged["a"], expected, rtol=1e-6)


def test_norm_weighting_of_nothing():
    pretrained, _ = random_models(0, 1)
    for power in (2.0, -1.0):
        close(tv.merge(tv.chain(tv.norm_weighting(power), tv.sum_tasks()), pretrained, [pretrained] * 2), pretrained, 0)


def test_layer_swapping_of_a_deep_model():
    """32 blocks: 5 bottom and 2 top blocks of the language's expert, one transition block at either side."""
    models = [{"blocks": {"w": jnp.full((32, 2), value)}, "head": jnp.full(3, value)} for value in (0.0, 1.0)]
    merged = tv.merge("layer_swapping", None, models)
    expected = [1.0] * 5 + [0.5] + [0.0] * 23 + [0.5] + [1.0] * 2
    np.testing.assert_array_equal(merged["blocks"]["w"][:, 0], expected)
    np.testing.assert_array_equal(merged["head"], 1.0)
    merged = tv.merge("layer_swapping", None, models, bottom=1, top=0, transition=2, weight=0.25, outside="mean")
    np.testing.assert_array_equal(merged["blocks"]["w"][:4, 0], [1.0, 0.25, 0.25, 0.0])
    np.testing.assert_array_equal(merged["blocks"]["w"][-3:, 0], [0.0, 0.25, 0.25])
    np.testing.assert_array_equal(merged["head"], 0.5)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (
            "layer_swapping",
            {"bottom": 2, "top": 1},
            "2 bottom and 1 top blocks of 3 leave nothing of the task's expert",
        ),
        ("layer_swapping", {"bottom": 1.5}, r"bottom must be a number of blocks or a fraction in \[0, 1\), got 1.5"),
        ("layer_swapping", {"outside": "base"}, "unknown outside 'base'; allowed: language, task, mean"),
        ("elm", {"select": (0, 2)}, "there are tasks 0 to 1, got 2"),
        ("elm", {"select": (0, 0)}, "tasks must be different indices"),
        (tv.chain(tv.sum_tasks(), tv.norm_weighting(2.0)), {}, r"put it before sum_tasks\(\)"),
    ],
)
def test_wrong_settings(method, settings, message):
    with pytest.raises(ValueError, match=message):
        tv.merge(method, *random_models(0, 2), **settings)


def test_layer_swapping_takes_two():
    with pytest.raises(ValueError, match="layer_swapping takes 2 fine-tuned models, got 3"):
        tv.merge("layer_swapping", *random_models(0, 3))


def test_layer_swapping_needs_blocks():
    base = {"w": jnp.zeros(3)}
    with pytest.raises(ValueError, match="no block index in the parameter names"):
        tv.merge("layer_swapping", base, [base, base])


def test_lines_edit_at_its_ends():
    """alpha 1 keeps the model, alpha 0 gives the first block and everything outside back to the pretrained one."""
    pretrained, (model,) = random_models(2, 1)
    close(tv.merge("lines_edit", pretrained, [model], alpha=1.0), model)
    edited = tv.merge("lines_edit", pretrained, [model], alpha=0.0)
    close(edited["embeddings"], pretrained["embeddings"], 0)
    kernel = [p["blocks"]["attention"]["kernel"] for p in (pretrained, model, edited)]
    np.testing.assert_array_equal(kernel[2][0], kernel[0][0])
    np.testing.assert_allclose(kernel[2][-1], kernel[1][-1], atol=1e-6)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_restore_norm(norm, scope):
    """After trimming every task vector, and after merging, has the length that it had."""
    some = lambda p: {"blocks": p["blocks"]["attention"], "stem": p["stem"]}
    pretrained, finetuned = random_models(3, 3)
    pretrained, finetuned = some(pretrained), [some(f) for f in finetuned]
    tau = tv.task_vectors(pretrained, finetuned)
    order = 1 if norm == "l1" else 2
    single = lambda tree: {k: np.asarray(v) for k, v in trees.flatten(trees.unstack_layers(tree)).items()}
    vectors = {k: np.moveaxis(np.asarray(v), 1, 0) if trees.is_stacked(k) else v for k, v in trees.flatten(tau).items()}
    kept = tv.transform_task_vectors(tv.chain(tv.trim(0.3), tv.restore_norm(norm, scope)), pretrained, tau)
    kept = {k: np.moveaxis(np.asarray(v), 1, 0) if trees.is_stacked(k) else v for k, v in trees.flatten(kept).items()}
    if scope == "model":
        length = lambda tree, t: np.linalg.norm(np.concatenate([np.ravel(v[t]) for v in tree.values()]), order)
        for t in range(3):
            assert np.isclose(length(kept, t), length(vectors, t), rtol=1e-5)
    else:
        conv = lambda tree, t: np.linalg.norm(np.ravel(tree["stem/conv"][t]), order)
        assert np.isclose(conv(kept, 1), conv(vectors, 1), rtol=1e-5)
    merged = tv.transform_task_vectors(tv.chain(tv.mean_tasks(), tv.restore_norm(norm, scope)), pretrained, tau)
    plain = tv.transform_task_vectors(tv.sum_tasks(), pretrained, tau)
    for k, x in single(merged).items():
        np.testing.assert_allclose(x, single(plain)[k], atol=1e-5, err_msg=k)


def test_restored_trim_is_mergekits():
    pretrained, finetuned = random_models(4, 2)
    one = tv.chain(tv.trim(0.4, scope="tensor"), tv.restore_norm("l1"), tv.sum_tasks())
    other = tv.chain(tv.trim(0.4, scope="tensor", rescale="l1"), tv.sum_tasks())
    close(tv.merge(one, pretrained, finetuned), tv.merge(other, pretrained, finetuned))
