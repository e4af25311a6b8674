"""ForkMerge: the greedy rule and the whole search against plain NumPy; branches keep their optimisers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from taskvec.training import heads as heads_lib
from taskvec.training.forkmerge import ALPHAS, forkmerge, greedy_merge, make_branches, probabilities


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


def descend(theta, chances, name, first, steps):
    """Gradient descent towards the mean goal, with a wobble of the branch's own."""
    for step in range(first, first + steps):
        wobble = 0.1 * np.sin(np.arange(3) * (1 + len(str(name))) + step)
        theta = theta - 0.2 * (theta - chances @ GOALS + wobble)
    return theta


def test_the_whole_search():
    evaluate = lambda theta: -float(np.square(np.asarray(theta, np.float64) - GOALS[0]).sum())
    train = lambda params, *args: {"w": jnp.asarray(descend(np.asarray(params["w"], np.float64), *args), jnp.float32)}
    found = forkmerge(
        train, lambda p: evaluate(p["w"]), {"w": jnp.full(3, 2.0)},
        num_tasks=4, targets=[0], steps=10, interval=4, evaluate_every=2, rank_steps=3, branches=(0, 1, 2),
    )  # fmt: skip

    def follow(theta, chances, name, first, last, best):
        for at in range(first, last, 2):
            theta = descend(theta, chances, name, at, min(2, last - at))
            if evaluate(theta) > best[0]:
                best = evaluate(theta), theta
        return best

    start = np.full(3, 2.0)
    rank = {t: follow(start, np.eye(4)[[0, t]].mean(0), ("rank", t), 0, 3, (-np.inf, start))[0] for t in (1, 2, 3)}
    ranked = sorted(rank, key=lambda t: -rank[t])
    assert [t for t, _ in found.ranking] == ranked and ranked[-1] == 2
    best, theta = dict.fromkeys((0, 1, 2), (-np.inf, start)), start
    for n, (first, last) in enumerate([(0, 4), (4, 8), (8, 10)]):
        for k in best:
            chances = np.zeros(4)
            chances[0] = 1
            chances[ranked[:k]] = 1 / max(k, 1)
            best[k] = follow(theta, chances / chances.sum(), ("branch", k), first, last, best[k])
        scores = [best[k][0] for k in best]
        theta, lam, score = rule([best[k][1] for k in best], scores, evaluate)
        np.testing.assert_allclose(found.intervals[n].coefficients, lam, atol=1e-6)
        np.testing.assert_allclose(found.intervals[n].scores, scores, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(found.intervals[n].score, score, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.params["w"], theta, atol=1e-4)
    with pytest.raises(ValueError, match="at most 3 auxiliary"):
        forkmerge(train, evaluate, {}, num_tasks=4, targets=[0], steps=1, interval=1, evaluate_every=1, rank_steps=1)


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
    train = make_branches(apply_fn, optimiser, heads, [batches(0), batches(1)], chunk=4)
    chances = np.array([0.7, 0.3])
    whole = train(params, chances, "a", 0, 12)
    assert {task for task, _ in asked} == {0, 1} and {step for _, step in asked} == set(range(12))
    half = train(params, chances, "b", 0, 5)
    jax.tree.map(np.testing.assert_array_equal, train(half, chances, "b", 5, 7), whole)
    assert np.abs(np.asarray(whole["w"] - params["w"])).max() > 0.01
    with pytest.raises(ValueError, match="has done 12 steps"):
        train(params, chances, "a", 5, 1)
