"""ATM: one round of one step is a step on the mean loss, bit for bit; budgets; merges of all kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import taskvec as tv
from taskvec.adaptive.fit import fit
from taskvec.training import heads as heads_lib
from taskvec.training.atm import atm, budget, make_train

NUM_TASKS = 4


def test_one_round_of_one_step_is_a_step_on_the_mean_loss():
    """On small integers, where every sum and product is exact."""
    rng = np.random.default_rng(0)
    integers = lambda *shape: jnp.asarray(rng.integers(-3, 4, shape), jnp.float32)
    params, x, y = {"w": integers(5, 2), "b": integers(2)}, integers(NUM_TASKS, 8, 5), integers(NUM_TASKS, 8, 2)
    loss = lambda p, x, y: jnp.square(x @ p["w"] + p["b"][None] - y).sum() / 8
    mean_loss = lambda p: jax.vmap(loss, (None, 0, 0))(p, x, y).mean()

    def train(params, task, first, steps):
        task_loss = lambda p, frozen, batch, key: (loss(p, x[task], y[task]), {})
        return fit(task_loss, params, optax.sgd(0.25), lambda step: np.zeros(1), steps).learnables

    merged = atm(train, params, NUM_TASKS, rounds=1, steps=1)
    expected = jax.tree.map(lambda p, g: p - 0.25 * g, params, jax.grad(mean_loss)(params))
    jax.tree.map(np.testing.assert_array_equal, merged, expected)
    before = float(mean_loss(merged))
    small = jax.tree.map(lambda p, g: p - 1e-3 * g, merged, jax.grad(mean_loss)(merged))
    assert mean_loss(small) < before  # it is not a fixed point by accident


def test_budget():
    assert budget(10, 4) == [3, 3, 2, 2] and budget(6, 1) == [6] and sum(budget(2000, 7)) == 2000
    with pytest.raises(ValueError, match="rounds=5 of 4 steps"):
        budget(4, 5)


@pytest.fixture(scope="module")
def setting():
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), "b": jnp.zeros(5)}
    heads = heads_lib.make_heads([np.asarray(heads_lib.normalise(jnp.asarray(rng.normal(size=(3, 5)))).T)] * NUM_TASKS)
    centres = 2 * rng.normal(size=(NUM_TASKS, 3, 6))
    asked = []

    def batches(task):
        def batch(step):
            asked.append((task, step))
            rng = np.random.default_rng([task, step])
            label = rng.integers(0, 3, 16).astype(np.int32)
            return {"x": (centres[task][label] + rng.normal(size=(16, 6))).astype(np.float32), "label": label}

        return batch

    apply_fn = lambda params, batch: {"features": jnp.tanh(batch["x"] @ params["w"]) + params["b"][None]}
    results = []
    train = make_train(
        apply_fn, lambda steps: optax.adam(optax.cosine_decay_schedule(0.02, steps)), heads,
        [batches(t) for t in range(NUM_TASKS)], on_fit=lambda task, result: results.append((task, result)),
    )  # fmt: skip
    return params, train, asked, results


def test_rounds_spend_one_budget_and_learn(setting):
    params, train, asked, results = setting
    asked.clear()
    seen = []
    final = atm(train, params, NUM_TASKS, steps=24, rounds=3, on_round=lambda k, params: seen.append((k, params)))
    assert {step for task, step in asked if task == 2} == set(range(24))  # its rounds follow each other
    assert [k for k, _ in seen] == [1, 2, 3]
    loss = lambda rows: np.mean([result.history["loss"][:2] for _, result in rows])
    assert loss(results[-NUM_TASKS:]) < 0.9 * loss(results[:NUM_TASKS])
    by_hand = tv.merge("weight_average", params, [train(params, t, 0, 8) for t in range(NUM_TASKS)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), seen[0][1], by_hand)
    resumed = atm(train, seen[1][1], NUM_TASKS, steps=24, rounds=3, done=2)
    jax.tree.map(np.testing.assert_array_equal, resumed, final)


def test_any_merge_is_the_outer_step(setting):
    params, train, _, _ = setting
    found = atm(train, params, NUM_TASKS, steps=2, rounds=1, method="ties", settings={"density": 0.5})
    expected = tv.merge("ties", params, [train(params, t, 0, 2) for t in range(NUM_TASKS)], density=0.5)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    with pytest.raises(ValueError, match="tall_masks gives a model for each task"):
        atm(train, params, NUM_TASKS, steps=2, rounds=1, method="tall_masks")
