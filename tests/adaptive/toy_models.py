"""A scanned toy transformer, and trees of task vectors for it."""

import jax
import jax.numpy as jnp
import numpy as np

from taskvec.models import layers

LAYERS, WIDTH, HIDDEN, VOCAB, POSITIONS = 3, 8, 16, 50, 6


def params(rng: np.random.Generator, size: float, dtype=jnp.float32) -> dict:
    normal = lambda *shape: jnp.asarray(size * rng.standard_normal(shape), dtype)
    return {
        "embeddings": {"word": normal(VOCAB, WIDTH), "position": normal(POSITIONS, WIDTH)},
        "blocks": {
            "attention": {"qkv": normal(LAYERS, WIDTH, 3 * WIDTH), "out": normal(LAYERS, WIDTH, WIDTH)},
            "mlp": {
                "up": normal(LAYERS, WIDTH, HIDDEN),
                "bias": normal(LAYERS, HIDDEN),
                "down": normal(LAYERS, HIDDEN, WIDTH),
            },
        },
        "norm": {"scale": 1 + normal(WIDTH)},
    }


def model(seed: int, tasks: int, dtype=jnp.float32) -> tuple[dict, dict]:
    """theta0 and task vectors ``[T, ...]``, ``[L, T, ...]``."""
    rng = np.random.default_rng(seed)
    tau = [params(rng, 0.1, dtype) for _ in range(tasks)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *tau)
    stacked["blocks"] = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), stacked["blocks"])
    return params(rng, 0.4, dtype), stacked


def batch(seed: int, rows: int) -> dict:
    return {"ids": np.random.default_rng(seed).integers(0, VOCAB, (rows, POSITIONS)).astype(np.int32)}


def apply(weights: dict, batch: dict, *, layer_params=lambda layer: layer, checkpoint=True) -> dict:
    """`checkpoint`: whether the scan's body keeps products only, as models of the library do."""
    x = weights["embeddings"]["word"].take(batch["ids"], axis=0)
    x = x + weights["embeddings"]["position"][None]

    def block(x, layer):
        layer = layer_params(layer)
        q, k, v = jnp.split(x @ layer["attention"]["qkv"], 3, axis=-1)
        attention = jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2) / np.sqrt(WIDTH), axis=-1)
        x = x + attention @ v @ layer["attention"]["out"]
        return x + jnp.tanh(x @ layer["mlp"]["up"] + layer["mlp"]["bias"][None, None]) @ layer["mlp"]["down"], None

    if checkpoint:
        block = jax.checkpoint(block, policy=layers.REMAT["dots"], prevent_cse=False)
    x, _ = jax.lax.scan(block, x, weights["blocks"])
    return {"features": x.mean(1) * weights["norm"]["scale"][None]}
