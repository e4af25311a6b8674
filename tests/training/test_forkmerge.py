"""ForkMerge: the greedy rule and the whole search against plain NumPy; branches keep their optimisers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from taskvec.io.checkpoints import Checkpoint
from taskvec.training import heads as heads_lib
from taskvec.training.branches import Trainer, make_branches
from taskvec.training.forkmerge import ALPHAS, forkmerge, greedy_merge, probabilities, total_steps


def rule(models, scores, evaluate):
    """The released loop in float64: every alpha is tried, 0 as well, strictly better wins."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    lam = np.zeros(len(models))
    lam[order[0]], best = 1.0, -np.inf
    mix = lambda lam: sum(w * m for w, m in zip(lam, models, strict=True)) / lam.sum()
    if len(models) == 1:
        best = scores[0]
    for i, b in enumerate(order[1:]):
        bound, kept = lam.sum() / (i + 1), 0.0
        for alpha in ALPHAS:
            lam[b] = alpha * bound
            if evaluate(mix(lam)) > best:
                best, kept = evaluate(mix(lam)), lam[b]
        lam[b] = kept
    return mix(lam), lam, best


@pytest.mark.parametrize("seed, number", [(0, 1), (1, 2), (2, 3), (3, 5)])
def test_greedy_rule(seed, number):
    rng = np.random.default_rng(seed)
    goal = rng.normal(size=6)
    models = [goal + rng.normal(size=6) * rng.uniform(0.5, 2) for _ in range(number)]
    evaluate = lambda m: -float(np.square(np.asarray(m, np.float64) - goal).sum())
    scores = [evaluate(m) for m in models]
    as_tree = lambda m: {"w": jnp.asarray(m, jnp.float32), "n": jnp.arange(2)}
    found = greedy_merge([as_tree(m) for m in models], scores, lambda p: evaluate(p["w"]))
    params, lam, best = rule(models, scores, evaluate)
    np.testing.assert_allclose(found.coefficients, lam, atol=1e-6)
    np.testing.assert_allclose(found.params["w"], params, atol=1e-5)
    np.testing.assert_allclose(found.score, best, rtol=1e-4)
    assert number < 3 or sum(x > 0 for x in lam) > 1
    assert found.params["n"].tolist() == [0, 1]


def test_probabilities():
    np.testing.assert_allclose(probabilities(4, [1], [0, 2]), [0.25, 0.5, 0.25, 0])
    np.testing.assert_allclose(probabilities(3, [0, 2], []), [0.5, 0, 0.5])


GOALS = np.array([[1.0, 0, 0], [0.9, 0.4, 0], [-3.0, 1, 1], [1.1, -0.2, 0.5]])  # the target, a friend, a foe, a friend


def descend(theta, velocity, chances, first, steps):
    """Gradient descent with momentum towards the mean goal, with a wobble of the branch's own."""
    for step in range(first, first + steps):
        wobble = 0.1 * np.sin(np.arange(3) * (1 + np.flatnonzero(chances).sum()) + step)
        velocity = 0.5 * velocity - 0.2 * (theta - chances @ GOALS + wobble)
        theta = theta + velocity
    return theta, velocity


def search(evaluate, **settings):
    double = lambda tree: np.asarray(tree["w"], np.float64)
    single = lambda x: {"w": jnp.asarray(x, jnp.float32)}

    def train(params, state, chances, first, steps, on_chunk):
        theta, velocity = descend(double(params), double(state), chances, first, steps)
        if on_chunk is not None:
            on_chunk(first + steps, {})
        return single(theta), single(velocity)

    trainer = Trainer(lambda params: jax.tree.map(jnp.zeros_like, params), train)
    return forkmerge(
        trainer, lambda p: evaluate(p["w"]), {"w": jnp.full(3, 2.0)}, num_tasks=4, targets=[0], steps=10, interval=4,
        evaluate_every=2, rank_steps=3, branches=(0, 1, 2), **settings,
    )  # fmt: skip


def score(theta):
    return -float(np.square(np.asarray(theta, np.float64) - GOALS[0]).sum())


def test_the_whole_search():
    found = search(score)

    def follow(theta, velocity, chances, first, last, best):
        for at in range(first, last, 2):
            theta, velocity = descend(theta, velocity, chances, at, min(2, last - at))
            if score(theta) > best[0]:
                best = score(theta), theta
        return best, velocity

    start, nothing = np.full(3, 2.0), (-np.inf, np.full(3, 2.0))
    rank = {t: follow(start, np.zeros(3), np.eye(4)[[0, t]].mean(0), 0, 3, nothing)[0][0] for t in (1, 2, 3)}
    ranked = sorted(rank, key=lambda t: -rank[t])
    assert [t for t, _ in found.ranking] == ranked and ranked[-1] == 2
    np.testing.assert_allclose([x for _, x in found.ranking], [rank[t] for t in ranked], rtol=1e-3, atol=1e-6)
    best, velocity, theta = dict.fromkeys((0, 1, 2), nothing), dict.fromkeys((0, 1, 2), np.zeros(3)), start
    for n, (first, last) in enumerate([(0, 4), (4, 8), (8, 10)]):
        for k in best:
            chances = np.zeros(4)
            chances[0] = 1
            chances[ranked[:k]] = 1 / max(k, 1)
            best[k], velocity[k] = follow(theta, velocity[k], chances / chances.sum(), first, last, best[k])
        scores = [best[k][0] for k in best]
        theta, lam, merged = rule([best[k][1] for k in best], scores, score)
        np.testing.assert_allclose(found.intervals[n].coefficients, lam, atol=1e-6)
        np.testing.assert_allclose(found.intervals[n].scores, scores, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(found.intervals[n].score, merged, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.params["w"], theta, atol=1e-4)
    with pytest.raises(ValueError, match="at most 3 auxiliary"):
        forkmerge(None, score, {}, num_tasks=4, targets=[0], steps=1, interval=1, evaluate_every=1, rank_steps=1)


@pytest.mark.parametrize("kill_at", [4, 9, 20])  # calls of evaluate: while it ranks, in a branch, after a merge
def test_a_killed_search_goes_on_with_the_same_bits(tmp_path, kill_at):
    calls, steps = [], []

    def killed(theta):
        calls.append(theta)
        if len(calls) == kill_at:
            raise KeyboardInterrupt
        return score(theta)

    with Checkpoint(tmp_path, every=4, keep=1) as checkpoint, pytest.raises(KeyboardInterrupt):
        search(killed, checkpoint=checkpoint)
    with Checkpoint(tmp_path, every=4, keep=1) as checkpoint:
        resumed = search(score, checkpoint=checkpoint, on_chunk=lambda step, metrics: steps.append(step))
    assert steps[0] > 4 and steps[-1] == total_steps(3, 3, 10, 3) == 39
    whole = search(score)
    assert resumed[1:] == whole[1:]
    np.testing.assert_array_equal(resumed.params["w"], whole.params["w"])


def test_branches_keep_their_optimisers():
    """Two calls are one call: momentum and schedule go on; task and head are those drawn."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)}
    heads = heads_lib.make_heads(
        [np.asarray(heads_lib.normalise(jnp.asarray(rng.normal(size=(c, 5)))).T) for c in (3, 2)]
    )
    asked = []

    def batches(task):
        def batch(step):
            asked.append((task, step))
            rng = np.random.default_rng([task, step])
            label = rng.integers(0, 3 - task, 8).astype(np.int32)
            return {"x": rng.normal(size=(8, 6)).astype(np.float32), "label": label}

        return batch

    apply_fn = lambda params, batch: {"features": jnp.tanh(batch["x"] @ params["w"])}
    optimiser = optax.sgd(optax.cosine_decay_schedule(0.1, 12), momentum=0.9)
    trainer = make_branches(apply_fn, optimiser, heads, [batches(0), batches(1)])
    chances, begin = np.array([0.7, 0.3]), trainer.init(params)
    whole = trainer.train(params, begin, chances, 0, 12)
    assert {task for task, _ in asked} == {0, 1} and {step for _, step in asked} == set(range(12))
    half = trainer.train(params, begin, chances, 0, 5)
    jax.tree.map(np.testing.assert_array_equal, trainer.train(*half, chances, 5, 7), whole)
    assert np.abs(np.asarray(whole[0]["w"] - params["w"])).max() > 0.01
