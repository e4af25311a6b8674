"""Small parameter trees with everything that trips merging code up: odd shapes, ties, zeros, scalars, integers."""

import jax
import jax.numpy as jnp
import numpy as np

LAYERS = 3


def random_params(rng: np.random.Generator, size: float = 1.0) -> dict:
    """A scanned model: stacked blocks, an embedding, a convolution, a scalar, a one-entry bias, an integer buffer."""
    normal = lambda *shape: jnp.asarray(size * rng.standard_normal(shape), jnp.float32)
    return {
        "embeddings": {"table": normal(37, 8)},
        "blocks": {
            "attention": {"kernel": normal(LAYERS, 8, 8), "bias": normal(LAYERS, 8)},
            "mlp": {"down": normal(LAYERS, 20, 8)},
        },
        "stem": {"conv": normal(3, 3, 2, 5)},
        "head": {"bias": normal(1), "temperature": normal()},
        "position_ids": jnp.arange(7, dtype=jnp.int32),
    }


def random_models(seed: int, tasks: int, tau_size: float = 0.05) -> tuple[dict, list[dict]]:
    """A pretrained model and fine-tuned copies; one tensor is untouched, one is rounded so that magnitudes tie."""
    rng = np.random.default_rng(seed)
    pretrained = random_params(rng)
    # Multiples of 1/64: sums stay exact in float32, so that ties stay ties.
    pretrained["embeddings"]["table"] = jnp.round(pretrained["embeddings"]["table"] * 64) / 64

    def finetune():
        tau = random_params(rng, tau_size)
        tau["head"]["bias"] = jnp.zeros(1)
        tau["embeddings"]["table"] = jnp.round(tau["embeddings"]["table"] * 40) / 64
        tau["position_ids"] = jnp.zeros(7, jnp.int32)
        return jax.tree.map(jnp.add, pretrained, tau)

    return pretrained, [finetune() for _ in range(tasks)]


def small(params: dict) -> dict:
    """The part with a stacked matrix, a stacked vector, a large table and an integer: three shapes to compile."""
    return {
        "blocks": {"attention": params["blocks"]["attention"]},
        **{k: params[k] for k in ("embeddings", "position_ids")},
    }


def small_models(seed: int, tasks: int, tau_size: float = 0.05) -> tuple[dict, list[dict]]:
    """`random_models` of fewer tensors, for checks whose compilation takes long."""
    pretrained, finetuned = random_models(seed, tasks, tau_size)
    return small(pretrained), [small(params) for params in finetuned]
