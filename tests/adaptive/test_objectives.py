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


@pytest.mark.parametrize("fill", [-1e9, -np.inf])
def test_entropy_with_epsilon(fill):
    """FusionBench's, with an epsilon that can be seen."""
    expected = [np.mean([-(p * np.log(p + 0.05)).sum() for p in probabilities(t)]) for t in (0, 1)]
    np.testing.assert_allclose(objectives.entropy(padded(fill), eps=0.05), expected, rtol=1e-5)
    grad = jax.grad(lambda x: objectives.entropy(x, eps=0.05).sum())(padded(fill))
    for t in (0, 1):
        p = probabilities(t)
        slope = np.log(p + 0.05) + p / (p + 0.05)
        wanted = -p * (slope - (p * slope).sum(-1, keepdims=True)) / 5
        np.testing.assert_allclose(grad[t, :, : CLASSES[t]], wanted, rtol=1e-4, atol=1e-6)
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


TEACHER = RNG.normal(0, 3, (2, 5, 4))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def of_tasks(function):
    """The mean over rows of ``function(student [C], teacher [C])`` probabilities and logits of existing classes."""
    rows = [[function(LOGITS[t, b, : CLASSES[t]], TEACHER[t, b, : CLASSES[t]]) for b in range(5)] for t in (0, 1)]
    return np.mean(rows, axis=1)


def padded_teacher(fill):
    logits = TEACHER.copy()
    logits[1, :, 3] = fill
    return jnp.asarray(logits, jnp.float32)


def js(x, y):
    p, q = softmax(x), softmax(y)
    m = (p + q) / 2
    return 0.5 * (p * np.log(p / m)).sum() + 0.5 * (q * np.log(q / m)).sum()


def mean_logit(x, y):
    m = softmax((x + y) / 2)
    return sum((p * np.log(p / m)).sum() for p in (softmax(x), softmax(y)))


@pytest.mark.parametrize("fill", [-1e9, -np.inf])
@pytest.mark.parametrize(
    "name, reference",
    [
        ("kl", lambda x, y: (softmax(y / 2) * np.log(softmax(y / 2) / softmax(x / 2))).sum()),
        ("jensen_shannon", js),
        ("mean_logit_divergence", mean_logit),
        ("pseudo_label", lambda x, y: -np.log(softmax(x)[y.argmax()])),
    ],
)
def test_distances_to_a_teacher(name, reference, fill):
    function = {
        "kl": lambda x, y: objectives.kl(x, y, temperature=2.0),
        "jensen_shannon": objectives.jensen_shannon,
        "mean_logit_divergence": objectives.mean_logit_divergence,
        "pseudo_label": objectives.pseudo_label,
    }[name]
    np.testing.assert_allclose(function(padded(fill), padded_teacher(fill)), of_tasks(reference), rtol=1e-5)
    grad = jax.grad(lambda x: function(x, padded_teacher(fill)).sum())(padded(fill))
    assert jnp.isfinite(grad).all() and (grad[1, :, 3] == 0).all() and jnp.abs(grad).max() > 0
    if name != "pseudo_label":
        np.testing.assert_allclose(function(padded(fill), padded(fill)), 0, atol=1e-6)


def test_jensen_shannon_is_bounded():
    far = jnp.array([[[50.0, 0.0]]]), jnp.array([[[0.0, 50.0]]])
    np.testing.assert_allclose(objectives.jensen_shannon(*far), np.log(2), rtol=1e-5)


def test_rows_that_cannot_be_trusted_do_not_count():
    # Agree; disagree, the teacher more certain; disagree, the student more certain (left out).
    mine = jnp.log(jnp.array([[[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]]]))
    theirs = jnp.log(jnp.array([[[0.6, 0.4], [0.2, 0.8], [0.4, 0.6]]]))
    expected = np.mean([-np.log(0.7), -np.log(0.4)])
    np.testing.assert_allclose(objectives.confident_pseudo_label(mine, theirs), [expected], rtol=1e-5)
    nothing = objectives.confident_pseudo_label(mine[:, 2:], theirs[:, 2:])
    grad = jax.grad(lambda x: objectives.confident_pseudo_label(x, theirs[:, 2:]).sum())(mine[:, 2:])
    assert nothing == 0 and (grad == 0).all()
    target = jnp.array([[[0.995, 0.005], [0.98, 0.02], [0.002, 0.998]]])
    expected = np.mean([-(0.995 * np.log(0.7) + 0.005 * np.log(0.3)), -(0.002 * np.log(0.9) + 0.998 * np.log(0.1))])
    np.testing.assert_allclose(objectives.certain_target(mine, target), [expected], rtol=1e-5)
    assert objectives.certain_target(mine[:, 1:2], target[:, 1:2]) == 0


def test_info_nce():
    z, y = RNG.normal(size=(2, 6, 3)), RNG.normal(size=(2, 6, 3))
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    logits = np.einsum("tid,tjd->tij", unit(z), unit(y)) / 0.05
    expected = [np.mean([-np.log(softmax(logits[t, i])[i]) for i in range(6)]) for t in (0, 1)]
    np.testing.assert_allclose(objectives.info_nce(jnp.asarray(z), jnp.asarray(y)), expected, rtol=1e-4)


def test_half_precision_is_summed_in_float32():
    rng = np.random.default_rng(0)
    pair = [jnp.asarray(rng.normal(size=(1, 3, 384)), jnp.bfloat16) for _ in range(2)]
    for loss in (objectives.l1, objectives.mse, objectives.info_nce):
        found = loss(*pair)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, loss(*(x.astype(jnp.float32) for x in pair)), rtol=1e-6)
