"""Fine-tuning: one compilation for all tasks, AdamW under the right schedule, a frozen head, and what is trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec.training import heads, recipes
from taskvec.training.finetune import answer, make_finetune, teacher_forced, weights_of
from taskvec.training.recipes import Recipe
from taskvec.training.sparse import largest_changes, lt_sft
from taskvec.training.trainable import masked, matching

D_IN, D = 6, 5


def task(seed, classes):
    rng = np.random.default_rng(seed)
    centres = 2 * rng.normal(size=(classes, D_IN))

    def batch(step):
        rng = np.random.default_rng([seed, step])
        label = rng.integers(0, classes, 16).astype(np.int32)
        return {"x": (centres[label] + rng.normal(size=(16, D_IN))).astype(np.float32), "label": label}

    return batch


def encoder(traces=None):
    def apply_fn(params, batch):
        if traces is not None:
            traces.append(1)
        return {"features": jnp.tanh(batch["x"] @ params["w"]) + params["b"][None]}

    return apply_fn


def start():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(D_IN, D)), jnp.float32), "b": jnp.zeros(D)}
    kernels = [heads.normalise(jnp.asarray(rng.normal(size=(c, D)))).T for c in (3, 4)]
    return params, heads.make_heads(kernels)


def first_head(made):
    return made.kernel[0], made.class_mask[0], made.scale


def test_learns_each_task_and_traces_once():
    traces = []
    params, made = start()
    finetune = make_finetune(encoder(traces), Recipe(60, 16, 3e-2, warmup=0.1, clip=1.0))
    for t, classes in enumerate((3, 4)):
        seen = []
        tuned = finetune(
            params, made.kernel[t], made.class_mask[t], made.scale, task(t, classes),
            on_chunk=lambda step, metrics, seen=seen: seen.append(metrics["loss"]),
        )  # fmt: skip
        loss = np.concatenate(seen)
        assert loss[-10:].mean() < 0.7 * loss[:5].mean()
        assert jax.tree.structure(tuned) == jax.tree.structure(params)
        if t == 0:
            first = len(traces)
    assert len(traces) == first
    assert not params["w"].is_deleted()


def by_hand(recipe, trained=slice(None), batch=task(0, 3)):
    """AdamW in float64; gradients come from differences of the loss. `trained`: entries of (w, b) that move."""
    params, made = start()
    kernel, e, n = np.asarray(made.kernel[0][:, :3], np.float64), recipe.label_smoothing, recipe.accumulate

    def loss(flat, x, label):
        w, b = flat[: D_IN * D].reshape(D_IN, D), flat[D_IN * D :]
        z = np.tanh(x @ w) + b
        logits = 20 * (z / np.linalg.norm(z, axis=1, keepdims=True)) @ kernel
        logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -((1 - e) * logp[np.arange(16), label] + e * logp.mean(1)).mean()

    def slope(x, rows):
        out = np.zeros(len(x))
        steps = 1e-6 * np.eye(len(x))[trained]
        out[trained] = [(loss(x + d, *rows) - loss(x - d, *rows)) / 2e-6 for d in steps]
        return out

    def gradient(x, i):
        rows = batch(i)["x"].astype(np.float64), batch(i)["label"]
        grad = slope(x, rows)
        return slope(x + recipe.sam_rho * grad / np.linalg.norm(grad), rows) if recipe.sam_rho else grad

    x = np.concatenate([np.asarray(params["w"], np.float64).ravel(), np.zeros(D)])
    moving = np.zeros(len(x))
    moving[trained] = 1
    m = v = 0.0
    for step in range(recipe.steps):
        warmup = recipe.warmup_steps
        after = (step - warmup) / (recipe.steps - warmup)
        factor = (step + 1) / warmup if step < warmup else 0.5 * (1 + np.cos(np.pi * after))
        grad = sum(gradient(x, n * step + i) for i in range(n)) / (1 if recipe.accumulate_by == "sum" else n)
        grad *= min(1, (recipe.clip or np.inf) / np.linalg.norm(grad))
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        update = (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        x = x - recipe.learning_rate * factor * (update + recipe.weight_decay * x * moving)
    return {"w": x[: D_IN * D].reshape(D_IN, D), "b": x[D_IN * D :]}


SUMMED = Recipe(3, 16, 1e-2, warmup=1, weight_decay=0.1, clip=12.0, accumulate=2, accumulate_by="sum")


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(3, 16, 1e-2, warmup=2, weight_decay=0.1, clip=0.05),
        dataclasses.replace(recipes.get("ft_fusionbench"), steps=3, learning_rate=1e-2),
        Recipe(2, 16, 1e-2, sam_rho=0.3, label_smoothing=0.2),
        SUMMED,
        dataclasses.replace(SUMMED, accumulate_by="mean"),
    ],
    ids=["ilharco", "fusionbench", "sam", "summed", "averaged"],
)
def test_a_step_is_the_recipes(recipe):
    params, made = start()
    tuned = make_finetune(encoder(), recipe)(params, *first_head(made), task(0, 3))
    expected = by_hand(recipe)
    for name in ("w", "b"):
        np.testing.assert_allclose(tuned[name], expected[name], atol=2e-5)


def test_clipping_comes_after_the_sum():
    """Else the two tests above would be one."""
    summed, averaged = (by_hand(dataclasses.replace(SUMMED, accumulate_by=how))["w"] for how in ("sum", "mean"))
    assert np.abs(summed - averaged).max() > 1e-4


def test_dropout_draws_anew_for_every_batch():
    def dropped(params, batch, *, dropout, key):
        keep = jax.random.bernoulli(key, 1 - dropout, batch["x"].shape)
        return encoder()(params, {"x": jnp.where(keep, batch["x"] / (1 - dropout), 0)})

    def seen(i):
        keep = jax.random.bernoulli(jax.random.fold_in(jax.random.key(0), i), 0.75, (16, D_IN))
        return task(0, 3)(i) | {"x": np.where(keep, task(0, 3)(i)["x"] / 0.75, 0)}

    params, made = start()
    recipe = Recipe(3, 16, 1e-2, dropout=0.25)
    tuned = make_finetune(dropped, recipe)(params, *first_head(made), task(0, 3))
    np.testing.assert_allclose(tuned["w"], by_hand(recipe, batch=seen)["w"], atol=2e-5)


def test_the_published_recipes():
    ilharco, fusion, peta = (recipes.get(name) for name in ("ft_ilharco", "ft_fusionbench", "ft_peta"))
    assert ilharco.for_task("mnist", 55000, "task_vectors").steps == 5 * 430
    assert ilharco.for_task("mnist", 9).steps == ilharco.for_task("rte", 9, "glue").steps == 2000
    assert fusion.for_task("stl10", 4500, "fusion_bench") is fusion
    half = recipes.get("ft_ilharco_l14").for_task("stl10", 4500, "tall_masks")
    assert (half.steps, half.batches) == (60 * 71 // 2, 60 * 71)
    assert ilharco == dataclasses.replace(half, steps=None, batch_size=128, accumulate=1, accumulate_by="mean")
    rate = ilharco.for_task("mine", 9).schedule()
    np.testing.assert_allclose(
        [rate(s) for s in (0, 249, 499, 500, 1250, 2000)], np.array([1 / 500, 0.5, 1, 1, 0.5, 0]) * 1e-5, atol=1e-11
    )
    np.testing.assert_allclose([fusion.schedule()(s) for s in (0, 2000)], [1e-5, 0.5e-5], rtol=1e-5)
    assert (ilharco.weight_decay, ilharco.clip, fusion.weight_decay, fusion.clip) == (0.1, 1.0, 0.0, None)
    assert (peta.warmup_steps, peta.steps, peta.batch_size) == (600, 6000, 64)
    assert ilharco.with_steps(40).warmup_steps == 10 and recipes.get("small").warmup_steps == 4
    with pytest.raises(ValueError, match="warm-up of 500 steps does not fit into 100"):
        dataclasses.replace(ilharco, steps=100)
    with pytest.raises(ValueError, match="call for_task first"):
        make_finetune(encoder(), ilharco)
    with pytest.raises(ValueError, match=r"task_vectors has no 'stl10'.* it has cars, dtd"):
        ilharco.for_task("stl10", 4500, "task_vectors")
    with pytest.raises(ValueError, match="accumulate_by='max'; allowed: mean, sum"):
        dataclasses.replace(ilharco, accumulate_by="max")
    with pytest.raises(ValueError, match=r"dropout=1.0, must be in \[0, 1\)"):
        dataclasses.replace(ilharco, dropout=1.0)
    with pytest.raises(ValueError, match="ft_ilharco_l14, ft_fusionbench"):
        recipes.get("ilharco")


def test_what_the_loss_does_not_depend_on_stays():
    """A text tower beside the image tower: trained with the rest, it has no gradient, and so no weight decay."""
    params, made = start()
    idle = jnp.asarray(np.random.default_rng(1).normal(size=7), jnp.float32)
    recipe = Recipe(3, 16, 1e-2, weight_decay=0.1, clip=0.05)
    tuned = make_finetune(encoder(), recipe)({**params, "idle": idle}, *first_head(made), task(0, 3))
    np.testing.assert_array_equal(tuned["idle"], idle)
    for name, x in by_hand(recipe).items():
        np.testing.assert_allclose(tuned[name], x, atol=2e-5)


def test_what_is_not_trained_stays():
    """Weight decay and clipping see what is trained alone; the task vector of the rest is exactly zero."""
    params, made = start()
    recipe = Recipe(2, 16, 1e-2, weight_decay=0.1, clip=0.05)
    learnables = make_finetune(encoder(), recipe, trainable=matching("w"))(params, *first_head(made), task(0, 3))
    assert set(learnables) == {"w"}
    tuned = weights_of(matching("w"), params, learnables)
    np.testing.assert_array_equal(tuned["b"], params["b"])
    np.testing.assert_allclose(tuned["w"], by_hand(recipe, trained=slice(D_IN * D))["w"], atol=2e-5)
    with pytest.raises(ValueError, match=r"no leaf matches 'attention'.*there is b, w"):
        matching("attention").init(params)


def test_lt_sft_trains_the_entries_that_moved_most():
    params, made = start()
    traces, recipe = [], Recipe(4, 16, 1e-2, weight_decay=0.1)
    finetune = make_finetune(encoder(traces), recipe, trainable=masked())
    dense = make_finetune(encoder(), recipe)(params, *first_head(made), task(0, 3))
    steps = []
    tuned = lt_sft(
        finetune, params, *first_head(made), task(0, 3), density=0.2, steps=4, on_chunk=lambda s, m: steps.append(s)
    )
    assert steps[-1] == 8
    moved = np.concatenate([np.abs(dense[k] - params[k]).ravel() for k in ("w", "b")])
    changed = np.concatenate([np.asarray(tuned[k] != params[k]).ravel() for k in ("w", "b")])
    np.testing.assert_array_equal(changed, moved >= np.sort(moved)[-7])  # 0.2 of 35
    # What is excluded does not move while the others are chosen either.
    tuned = lt_sft(finetune, params, *first_head(made), task(0, 3), density=22 / 30, exclude="b")
    moved = np.abs(by_hand(recipe, trained=slice(D_IN * D))["w"] - params["w"])
    np.testing.assert_array_equal(tuned["w"] != params["w"], moved >= np.sort(moved, None)[-22])
    np.testing.assert_array_equal(tuned["b"], params["b"])
    mask = largest_changes(params, dense, 1.0, exclude="b")
    assert mask["w"].all() and not mask["b"].any()
    assert not any(x.any() for x in largest_changes(params, params, 0.5).values())  # nothing moved
    with pytest.raises(ValueError, match="density=20"):
        largest_changes(params, dense, 20)


def test_answers_of_a_text_to_text_model():
    seen = {}

    def model(params, batch):
        seen.update(batch)
        return {"logits": jax.nn.one_hot(batch["decoder_ids"] + 1, 9) * params["w"]}

    batch = {"target": jnp.array([[5, 6, 1], [5, 1, 0]]), "target_mask": jnp.array([[1, 1, 1], [1, 1, 0]], bool)}
    outputs = teacher_forced(model, 4)({"w": 50.0}, batch)
    np.testing.assert_array_equal(seen["decoder_ids"], [[4, 5, 6], [4, 5, 1]])
    loss, metrics = answer(outputs, None, batch)
    np.testing.assert_allclose(loss, 2 * 50 / 5, rtol=1e-6)  # both ends are told wrong: 7 and 6 instead of 1
    assert metrics["accuracy"] == 0
    right = {"target": jnp.array([[5, 6, 7], [5, 6, 0]]), "target_mask": batch["target_mask"]}
    assert answer(teacher_forced(model, 4)({"w": 50.0}, right), None, right)[1]["accuracy"] == 1
