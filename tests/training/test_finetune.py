"""Fine-tuning: one compilation for all tasks, AdamW under the right schedule, a frozen head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec.training import heads
from taskvec.training.finetune import make_finetune, warmup_cosine

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


def test_learns_each_task_and_traces_once():
    traces = []
    params, made = start()
    finetune = make_finetune(encoder(traces), steps=60, learning_rate=3e-2)
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


def test_schedule():
    rate = warmup_cosine(1.0, steps=40, warmup_fraction=0.1)
    np.testing.assert_allclose([rate(s) for s in range(5)], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    np.testing.assert_allclose([rate(22), rate(40)], [0.5, 0.0], atol=1e-6)


def test_a_step_is_adamw_of_the_clipped_gradient():
    """Two steps by hand; the gradient comes from differences of the loss in float64."""
    params, made = start()
    batch, clip, decay, rate = task(0, 3), 0.05, 0.1, 1e-2
    tuned = make_finetune(encoder(), steps=2, learning_rate=rate, warmup_fraction=0, weight_decay=decay, clip=clip)(
        params, made.kernel[0], made.class_mask[0], made.scale, batch
    )

    def loss(flat, step):
        w, b = flat[: D_IN * D].reshape(D_IN, D), flat[D_IN * D :]
        z = np.tanh(batch(step)["x"].astype(np.float64) @ w) + b
        logits = 20 * (z / np.linalg.norm(z, axis=1, keepdims=True)) @ np.asarray(made.kernel[0][:, :3], np.float64)
        e = np.exp(logits - logits.max(1, keepdims=True))
        return -np.log((e / e.sum(1, keepdims=True))[np.arange(16), batch(step)["label"]]).mean()

    x = np.concatenate([np.asarray(params["w"], np.float64).ravel(), np.zeros(D)])
    m = v = 0.0
    for step, factor in enumerate((1.0, 0.5)):  # the cosine over two steps
        eye = 1e-6 * np.eye(len(x))
        grad = np.array([(loss(x + e, step) - loss(x - e, step)) / 2e-6 for e in eye])
        grad *= min(1, clip / np.linalg.norm(grad))
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        update = (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        x = x - rate * factor * (update + decay * x)
    np.testing.assert_allclose(tuned["w"].ravel(), x[: D_IN * D], atol=2e-5)
    np.testing.assert_allclose(tuned["b"], x[D_IN * D :], atol=2e-5)


def test_settings_are_checked_at_once():
    with pytest.raises(ValueError, match="warmup_fraction"):
        make_finetune(encoder(), steps=10, learning_rate=1e-3, warmup_fraction=1.0)
