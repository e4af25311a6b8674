"""A small MLP with gradients by hand in float64, for loops that re-derive a method without the library's code."""

import jax
import jax.numpy as jnp
import numpy as np

from taskvec.adaptive import rows as rows_lib
from taskvec.adaptive.learn import Problem
from taskvec.training.heads import make_heads

TASKS, ROWS, D_IN, HIDDEN, D = 3, 4, 5, 7, 6
CLASSES = (4, 2, 3)
SCALE = 20.0
NAMES = ("b1", "b2", "w1", "w2")  # the order of leaves
SHAPES = {"b1": (HIDDEN,), "b2": (D,), "w1": (D_IN, HIDDEN), "w2": (HIDDEN, D)}


def setting(seed=0):
    """theta0, tau, kernels in float64; rows."""
    rng = np.random.default_rng(seed)
    theta0 = {k: rng.normal(0, 0.7, SHAPES[k]) for k in NAMES}
    tau = {k: rng.normal(0, 0.4, (TASKS, *SHAPES[k])) for k in NAMES}
    kernels = [rng.normal(size=(D, c)) for c in CLASSES]
    kernels = [k / np.linalg.norm(k, axis=0) for k in kernels]
    inputs = [{"x": rng.normal(size=(n, D_IN)).astype(np.float32)} for n in (9, ROWS, 30)]
    return theta0, tau, kernels, rows_lib.arrays(inputs)


def apply_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w1"] + params["b1"][None])
    return {"features": hidden @ params["w2"] + params["b2"][None]}


def as_jax(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def problem(theta0, tau, kernels):
    return Problem(apply_fn, as_jax(theta0), as_jax(tau), make_heads(kernels, SCALE), scanned=False)


def features(theta, x):
    h = np.tanh(x @ theta["w1"] + theta["b1"])
    return h, h @ theta["w2"] + theta["b2"]


def logits_of(z, kernel):
    return SCALE * z / np.linalg.norm(z, axis=1, keepdims=True) @ kernel


def teacher_logits(theta0, tau, kernels, x):
    """What each task's own expert says of each task's rows, ``[T * B, D_IN]`` -> T times ``[B, C]``."""
    out = []
    for t, rows in enumerate(np.split(x, TASKS)):
        expert = {k: theta0[k] + tau[k][t] for k in NAMES}
        out.append(logits_of(features(expert, rows)[1], kernels[t]))
    return out


def gradients(theta, x, kernels, objective):
    """Loss, its gradient by every weight, and by every kernel.

    ``objective(i, logits [B, C]) -> (value, gradient by logits)``, for the i-th of the kernels on the i-th part of x.
    """
    x = x.astype(np.float64)
    h, z = features(theta, x)
    dz, total, d_kernels = np.zeros_like(z), 0.0, []
    for i, kernel in enumerate(kernels):
        rows = slice(i * len(x) // len(kernels), (i + 1) * len(x) // len(kernels))
        norm = np.linalg.norm(z[rows], axis=1, keepdims=True)
        unit = z[rows] / norm
        value, d_logits = objective(i, SCALE * unit @ kernel)
        total += value
        d_kernels.append(SCALE * unit.T @ d_logits)
        d_unit = SCALE * d_logits @ kernel.T
        dz[rows] = (d_unit - unit * (unit * d_unit).sum(1, keepdims=True)) / norm
    dh = (dz @ theta["w2"].T) * (1 - h**2)
    return total, {"b1": dh.sum(0), "b2": dz.sum(0), "w1": x.T @ dh, "w2": h.T @ dz}, d_kernels


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def entropy(i, logits):
    p = softmax(logits)
    each = -(p * np.log(p)).sum(1, keepdims=True)
    return each.mean(), -p * (np.log(p) + each) / len(p)


class Adam:
    """Adam on a dict of arrays."""

    def __init__(self, rate):
        self.rate, self.steps, self.m, self.v = rate, 0, {}, {}

    def step(self, values, grads):
        self.steps += 1
        out = {}
        for k, g in grads.items():
            self.m[k] = 0.9 * self.m.get(k, 0.0) + 0.1 * g
            self.v[k] = 0.999 * self.v.get(k, 0.0) + 0.001 * g**2
            m, v = self.m[k] / (1 - 0.9**self.steps), self.v[k] / (1 - 0.999**self.steps)
            out[k] = values[k] - self.rate * m / (np.sqrt(v) + 1e-8)
        return out


def merged(theta0, tau, lam):
    """Coefficients ``[4, T]`` in the order of `NAMES`, or ``[1, T]`` for all."""
    return {k: theta0[k] + np.tensordot(lam[i % len(lam)], tau[k], 1) for i, k in enumerate(NAMES)}


def by_coefficients(grads, tau, groups):
    """The gradient by coefficients ``[groups, T]``, groups 4 or 1."""
    g = np.stack([[np.sum(grads[k] * tau[k][t]) for t in range(TASKS)] for k in NAMES])
    return g if groups == 4 else g.sum(0, keepdims=True)
