"""Tip-Adapter and LP++ against float64 loops with hand-written gradients."""

import numpy as np
import pytest

from taskvec.adaptive.atlas_heads import TipAdapter, cached, classifier, lp_plus_plus, tip_adapter
from tests.adaptive.toy_mlp import SCALE, features, problem, setting, softmax

ROWS, D, CLASSES = 18, 6, 3


def data(seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(ROWS, D))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return z, 20 * rng.uniform(-0.2, 0.2, (ROWS, CLASSES)), np.arange(ROWS) % CLASSES


def test_tip_adapter_trains():
    z, s, labels = data()
    y, size, steps, rate = np.eye(CLASSES)[labels], 6, 12, 0.02
    now = {"keys": z.copy(), "beta": np.array(1.0), "alpha": np.array(2.0)}
    m, v, losses = dict.fromkeys(now, 0.0), dict.fromkeys(now, 0.0), []
    for step in range(steps):
        epoch, at = divmod(step, ROWS // size)
        rows = np.random.default_rng([0, epoch]).permutation(ROWS)[at * size : (at + 1) * size]
        cosines = z[rows] @ now["keys"].T
        affinity = np.exp(now["beta"] * (cosines - 1))
        p = softmax(s[rows] + now["alpha"] * affinity @ y)
        losses.append(-np.log(p[np.arange(size), labels[rows]]).mean())
        d_logits = (p - y[rows]) / size
        d_exponent = now["alpha"] * (d_logits @ y.T) * affinity
        grads = {
            "keys": now["beta"] * d_exponent.T @ z[rows],
            "beta": (d_exponent * (cosines - 1)).sum(),
            "alpha": (d_logits * (affinity @ y)).sum(),
        }
        for k, g in grads.items():
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g**2
            move = (m[k] / (1 - 0.9 ** (step + 1))) / (np.sqrt(v[k] / (1 - 0.999 ** (step + 1))) + 1e-8)
            now[k] = now[k] - rate * 0.5 * (1 + np.cos(np.pi * step / steps)) * (move + 0.1 * now[k])
    z32, s32 = z.astype(np.float32), s.astype(np.float32)
    found, history = tip_adapter(z32, s32, labels, epochs=4, batch_size=size, learning_rate=rate)
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-4)
    for k in now:
        np.testing.assert_allclose(getattr(found, k), now[k], atol=1e-4)
    after = s + now["alpha"] * np.exp(now["beta"] * (z @ now["keys"].T - 1)) @ y
    before = s + 2 * np.exp(z @ z.T - 1) @ y
    loss = lambda logits: -np.log(softmax(logits)[np.arange(ROWS), labels]).mean()
    assert loss(after) < 0.95 * loss(before) and np.abs(now["keys"] - z).max() > 0.05
    np.testing.assert_allclose(found.logits(z32, s32), after, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bias", [False, True])
def test_lp_plus_plus_trains(bias):
    z, s, labels = data(1)
    y, cosines = np.eye(CLASSES)[labels], s / 20
    weight, offset = y.T @ z, np.zeros(CLASSES)
    alpha = np.full(CLASSES, 250 * np.mean([cosines[labels == c, c].mean() for c in range(CLASSES)]))
    rate = 4 * ROWS / np.linalg.eigvalsh(z.T @ z).max()
    rate_alpha = ROWS / (4 * (cosines**2).sum(0).max())
    losses = []
    for step in range(30):
        p = softmax(z @ weight.T + offset + alpha * cosines)
        losses.append(-np.log(p[np.arange(ROWS), labels]).mean())
        d = (p - y) / ROWS
        weight, offset = weight - rate * d.T @ z, offset - bias * rate * d.sum(0)
        alpha = alpha - (rate_alpha * (d * cosines).sum(0) if (step + 1) % 10 == 0 else 0)
    z32, s32 = z.astype(np.float32), s.astype(np.float32)
    found, found_losses = lp_plus_plus(z32, s32, labels, scale=20.0, steps=30, bias=bias)
    np.testing.assert_allclose(found_losses, losses, rtol=1e-3)
    for name, expected in (("weight", weight), ("bias", offset), ("alpha", alpha)):
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-3, atol=1e-3)
    assert bias or (np.diff(losses) < 0).all()
    after = z @ weight.T + offset + alpha * cosines
    np.testing.assert_allclose(found.logits(z32, s32), after, rtol=1e-3, atol=1e-3)


def test_cached_features_are_unit_and_logits_those_of_the_head():
    theta0, tau, kernels, rows = setting((3, 2), 2, (5, 7))
    what = problem(theta0, tau, kernels)
    found, logits = cached(what, what.theta0, rows, 1)
    z = features(theta0, rows.take(1, np.arange(7))["x"])[1]
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    np.testing.assert_allclose(found, unit, atol=1e-5)
    expected = SCALE * unit @ kernels[1]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    keys, values = np.random.default_rng(0).normal(size=(4, z.shape[1])), np.eye(2)[[0, 1, 1, 0]]
    head = TipAdapter(*(np.asarray(x, np.float32) for x in (keys, 0.5, 3.0, values)))
    after = expected + 3 * np.exp(0.5 * (unit @ keys.T - 1)) @ values
    np.testing.assert_allclose(classifier(what, head, 1)(z.astype(np.float32)), after, rtol=1e-4, atol=1e-3)
