"""Random masks: right rate, unbiased, independent, and the same whatever the layout."""

import jax.numpy as jnp
import numpy as np

import taskvec as tv

ONES = {"a": jnp.ones((3, 200, 300)), "b": jnp.ones((3, 200, 300))}
ZERO = {"a": jnp.zeros((200, 300)), "b": jnp.zeros((200, 300))}


def test_rate_scale_and_independence():
    out = tv.transform_task_vectors(tv.drop(0.1), ZERO, ONES)
    kept = np.stack([np.asarray(out[k][t]).ravel() != 0 for k in out for t in range(3)])
    assert np.abs(kept.mean(1) - 0.1).max() < 4 * np.sqrt(0.09 / 60_000)
    np.testing.assert_allclose(np.unique(out["a"]), [0.0, 10.0], rtol=1e-6)
    correlation = np.corrcoef(kept) - np.eye(6)
    assert np.abs(correlation).max() < 5 / np.sqrt(60_000)
    rows = np.asarray(out["a"][0]) != 0
    assert np.abs(np.corrcoef(rows[:50]) - np.eye(50)).max() < 5.5 / np.sqrt(300)


def test_seed_decides_and_order_of_leaves_does_not():
    first = tv.transform_task_vectors(tv.drop(0.5, seed=1), ZERO, ONES)
    alone = tv.transform_task_vectors(tv.drop(0.5, seed=1), {"b": ZERO["b"]}, {"b": ONES["b"]})
    other = tv.transform_task_vectors(tv.drop(0.5, seed=2), ZERO, ONES)
    np.testing.assert_array_equal(first["b"], alone["b"])
    assert np.mean(np.asarray(first["b"]) == np.asarray(other["b"])) < 0.52


def test_l1_rescale_restores_the_norm():
    x = {"a": jnp.asarray(np.random.default_rng(0).standard_normal((2, 40, 50)), jnp.float32)}
    out = tv.transform_task_vectors(tv.drop(0.3, rescale="l1"), {"a": x["a"][0]}, x)["a"]
    np.testing.assert_allclose(np.abs(out).sum((1, 2)), np.abs(x["a"]).sum((1, 2)), rtol=1e-5)
