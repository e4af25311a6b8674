"""A model of stacked blocks that takes hooks, small enough to differentiate by hand; random task vectors for it."""

import jax
import jax.numpy as jnp
import numpy as np

from taskvec.adaptive import rows as rows_lib
from taskvec.adaptive.learn import Problem
from taskvec.models import layers
from taskvec.training.heads import make_heads

LAYERS, TASKS, D_IN, WIDTH, FEATURES, TOKENS, COUNTS = 3, 2, 4, 6, 5, 3, (7, 5)


def apply_fn(params, batch, **how):
    """``x <- x + tanh(x w + b)``, block after block; features are a projection of the mean over tokens."""
    options = layers.options_of(how)

    def block(weights, x, tap, state):
        return x + jnp.tanh(x @ weights["w"] + weights["b"]), state

    x, captured, _ = layers.run_blocks(block, params["blocks"], batch["x"] @ params["embed"], options)
    weight = batch["mask"][..., None] / batch["mask"].sum(1)[:, None, None]
    return {"features": (x * weight).sum(1) @ params["project"], **captured}


def normal(rng, size, lead=()):
    shapes = {"w": (WIDTH, WIDTH), "b": (WIDTH,)}
    return {
        "embed": rng.normal(0, size, (*lead, D_IN, WIDTH)),
        "blocks": {name: rng.normal(0, size, (LAYERS, *lead, *shape)) for name, shape in shapes.items()},
        "project": rng.normal(0, size, (*lead, WIDTH, FEATURES)),
    }


def as_jax(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def setting(seed=0):
    """``(theta0, tau, rows, problem)``, the first two in float64."""
    rng = np.random.default_rng(seed)
    theta0, tau = normal(rng, 0.5), normal(rng, 0.2, (TASKS,))
    inputs = []
    for n in COUNTS:
        mask = np.arange(TOKENS)[None] < rng.integers(1, TOKENS + 1, (n, 1))
        inputs.append({"x": rng.normal(size=(n, TOKENS, D_IN)).astype(np.float32), "mask": mask})
    heads = make_heads([np.eye(FEATURES, 3), np.eye(FEATURES, 2)])
    labels = [rng.integers(0, c, n) for c, n in zip((3, 2), COUNTS, strict=True)]
    problem = Problem(apply_fn, as_jax(theta0), as_jax(tau), heads, scanned=True)
    return theta0, tau, rows_lib.arrays(inputs, labels), problem


def select(tau, task):
    return {k: {n: x[:, task] for n, x in v.items()} if k == "blocks" else v[task] for k, v in tau.items()}


def add(theta0, vector, scale=1.0):
    return jax.tree.map(lambda a, b: a + scale * b, theta0, vector)
