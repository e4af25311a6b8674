"""The MLP of `mlp_oracle` with labelled rows, for as many tasks, classes and rows as wanted."""

import numpy as np

from taskvec.adaptive import rows as rows_lib
from taskvec.adaptive.learn import Problem
from taskvec.training.heads import make_heads
from tests.adaptive.mlp_oracle import (
    CLASSES,
    D_IN,
    HIDDEN,
    NAMES,
    ROWS,
    SCALE,
    SHAPES,
    TASKS,
    D,
    apply_fn,
    as_jax,
    features,
    gradients,
    softmax,
)

__all__ = ["D_IN", "HIDDEN", "NAMES", "ROWS", "SCALE", "TASKS", "features", "softmax"]


def setting(classes=CLASSES, tasks=TASKS, counts=(9, 8, 30), seed=0):
    """float64 weights and heads, and labelled rows."""
    rng = np.random.default_rng(seed)
    theta0 = {k: rng.normal(0, 0.7, SHAPES[k]) for k in NAMES}
    tau = {k: rng.normal(0, 0.4, (tasks, *SHAPES[k])) for k in NAMES}
    kernels = [rng.normal(size=(D, c)) for c in classes]
    kernels = [k / np.linalg.norm(k, axis=0) for k in kernels]
    inputs = [{"x": rng.normal(size=(n, D_IN)).astype(np.float32)} for n in counts]
    labels = [rng.integers(0, c, n) for c, n in zip(classes, counts, strict=True)]
    return theta0, tau, kernels, rows_lib.arrays(inputs, labels)


def problem(theta0, tau, kernels, **kwargs):
    return Problem(apply_fn, as_jax(theta0), as_jax(tau), make_heads(kernels, SCALE), scanned=False, **kwargs)


def loss_and_gradient(theta, batch, kernels, signs):
    """Sum over tasks of signed mean cross-entropies, and its gradient by every weight; all by hand."""
    labels = np.split(batch["label"], len(kernels))

    def objective(i, logits):
        p, rows = softmax(logits), np.arange(len(logits))
        value = signs[i] * -np.log(p[rows, labels[i]]).mean()
        return value, signs[i] * (p - np.eye(logits.shape[1])[labels[i]]) / len(logits)

    return gradients(theta, batch["x"], kernels, objective)[:2]


def predictions(theta, x, kernel):
    return (features(theta, x)[1] @ kernel).argmax(1)
