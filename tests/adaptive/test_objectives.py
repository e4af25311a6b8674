"""Objectives against float64 numpy, with classes that some tasks lack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec.adaptive import objectives

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (2, 5, 4))
LABELS = RNG.integers(0, 3, (2, 5))
CLASSES = (4, 3)  # of the two tasks


def probabilities(t):
    e = np.exp(LOGITS[t, :, : CLASSES[t]])
    return e / e.sum(-1, keepdims=True)


def padded(fill):
    logits = LOGITS.copy()
    logits[1, :, 3] = fill
    return jnp.asarray(logits, jnp.float32)


@pytest.mark.parametrize("fill", [-1e9, -np.inf])
def test_entropy_and_its_gradient(fill):
    expected = [np.mean([-(p * np.log(p)).sum() for p in probabilities(t)]) for t in (0, 1)]
    np.testing.assert_allclose(objectives.entropy(padded(fill)), expected, rtol=1e-5)
    grad = jax.grad(lambda x: objectives.entropy(x).sum())(padded(fill))
    for t in (0, 1):
        p = probabilities(t)
        h = -(p * np.log(p)).sum(-1, keepdims=True)
        np.testing.assert_allclose(grad[t, :, : CLASSES[t]], -p * (np.log(p) + h) / 5, rtol=1e-4, atol=1e-6)
    assert (grad[1, :, 3] == 0).all()


def test_a_certain_prediction_has_no_entropy_and_a_finite_gradient():
    logits = jnp.array([[[1e4, 0.0, -1e4]]])
    assert objectives.entropy(logits) == 0
    assert jnp.isfinite(jax.grad(lambda x: objectives.entropy(x).sum())(logits)).all()


@pytest.mark.parametrize("fill", [-1e9, -np.inf])
def test_cross_entropy(fill):
    expected = [np.mean([-np.log(p[y]) for p, y in zip(probabilities(t), LABELS[t], strict=True)]) for t in (0, 1)]
    np.testing.assert_allclose(objectives.cross_entropy(padded(fill), jnp.asarray(LABELS)), expected, rtol=1e-5)
    one_task = objectives.cross_entropy(padded(fill)[1], jnp.asarray(LABELS)[1])
    np.testing.assert_allclose(one_task, expected[1], rtol=1e-5)
    grad = jax.grad(lambda x: objectives.cross_entropy(x, jnp.asarray(LABELS)).sum())(padded(fill))
    assert jnp.isfinite(grad).all()


def test_rows_of_weight_zero_do_not_count():
    weight = np.array([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]], np.float32)
    expected = [np.abs(LOGITS[t][weight[t] > 0]).mean() for t in (0, 1)]
    found = objectives.l1(jnp.asarray(LOGITS, jnp.float32), jnp.zeros_like(LOGITS, jnp.float32), jnp.asarray(weight))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (objectives.entropy(padded(-1e9), jnp.zeros((2, 5))) == 0).all()
