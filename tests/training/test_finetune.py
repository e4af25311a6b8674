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


def by_hand(recipe, rho=0.0, trained=slice(None)):
    """AdamW in float64; gradients come from differences of the loss. `trained`: entries of (w, b) that move."""
    params, made = start()
    batch = task(0, 3)

    def loss(flat, step):
        w, b = flat[: D_IN * D].reshape(D_IN, D), flat[D_IN * D :]
        z = np.tanh(batch(step)["x"].astype(np.float64) @ w) + b
        logits = 20 * (z / np.linalg.norm(z, axis=1, keepdims=True)) @ np.asarray(made.kernel[0][:, :3], np.float64)
        e = np.exp(logits - logits.max(1, keepdims=True))
        return -np.log((e / e.sum(1, keepdims=True))[np.arange(16), batch(step)["label"]]).mean()

    def gradient(x, step):
        out = np.zeros(len(x))
        out[trained] = [(loss(x + e, step) - loss(x - e, step)) / 2e-6 for e in 1e-6 * np.eye(len(x))[trained]]
        return out

    x = np.concatenate([np.asarray(params["w"], np.float64).ravel(), np.zeros(D)])
    moving = np.zeros(len(x))
    moving[trained] = 1
    m = v = 0.0
    for step in range(recipe.steps):
        warmup = recipe.warmup_steps
        after = (step - warmup) / (recipe.steps - warmup)
        factor = (step + 1) / warmup if step < warmup else 0.5 * (1 + np.cos(np.pi * after))
        grad = gradient(x, step)
        if rho:
            grad = gradient(x + rho * grad / np.linalg.norm(grad), step)
        grad *= min(1, (recipe.clip or np.inf) / np.linalg.norm(grad))
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        update = (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        x = x - recipe.learning_rate * factor * (update + recipe.weight_decay * x * moving)
    return {"w": x[: D_IN * D].reshape(D_IN, D), "b": x[D_IN * D :]}


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(3, 16, 1e-2, warmup=2, weight_decay=0.1, clip=0.05),
        dataclasses.replace(recipes.get("ft_fusionbench"), steps=3, learning_rate=1e-2),
        Recipe(2, 16, 1e-2, sam_rho=0.3),
    ],
    ids=["ilharco", "fusionbench", "sam"],
)
def test_a_step_is_the_recipes(recipe):
    params, made = start()
    tuned = make_finetune(encoder(), recipe)(params, *first_head(made), task(0, 3))
    expected = by_hand(recipe, recipe.sam_rho)
    for name in ("w", "b"):
        np.testing.assert_allclose(tuned[name], expected[name], atol=2e-5)


def test_the_published_recipes():
    ilharco, fusion, peta = (recipes.get(name) for name in ("ft_ilharco", "ft_fusionbench", "ft_peta"))
    assert ilharco.for_task("mnist", 55000).steps == 5 * 430 and ilharco.for_task("mine", 9).steps == 2000
    assert fusion.for_task("mnist", 55000) is fusion
    rate = ilharco.for_task("mine", 9).schedule()
    np.testing.assert_allclose(
        [rate(s) for s in (0, 249, 499, 500, 1250, 2000)], np.array([1 / 500, 0.5, 1, 1, 0.5, 0]) * 1e-5, atol=1e-11
    )
    np.testing.assert_allclose([fusion.schedule()(s) for s in (0, 2000)], [1e-5, 0.5e-5], rtol=1e-5)
    assert (ilharco.weight_decay, ilharco.clip, fusion.weight_decay, fusion.clip) == (0.1, 1.0, 0.0, None)
    assert (peta.warmup_steps, peta.steps) == (600, 6000)
    assert ilharco.with_steps(40).warmup_steps == 10 and recipes.get("small").warmup_steps == 4
    with pytest.raises(ValueError, match="warm-up of 500 steps does not fit into 100"):
        dataclasses.replace(ilharco, steps=100)
    with pytest.raises(ValueError, match="call for_task first"):
        make_finetune(encoder(), ilharco)
    with pytest.raises(ValueError, match="ft_ilharco, ft_fusionbench"):
        recipes.get("ilharco")


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
