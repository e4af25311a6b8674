"""What FusionBench and this library are both given: a tiny CLIP image tower, experts, images, heads and draws.

Needs numpy alone, and makes everything from seeds, so that the recording script (tests/parity/record_adaptive.py) and
the tests build the same arrays. Tensors have the names of transformers' CLIPVisionModel, in its order.
"""

import numpy as np

CONFIG = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32,
    "patch_size": 16, "projection_dim": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3,
}  # fmt: skip
TASKS, CLASSES, ROWS = ("sun", "cars", "dtd"), (5, 3, 7), 4
SCALE = 20.0  # exp of the logit scale
STEPS = 20
MASK_STEPS = 10  # of the STEPS of Concrete AdaMerging; the others learn coefficients
RATE, MASK_RATE = 0.01, 0.05  # so that 20 steps go somewhere
# The published 1 throws every coefficient 1 up or down by the sign of a small gradient, so that the rounding of float32
# grows thirtyfold a step and no two programs stay together.
INNER_RATE = 0.05
RANK = 16  # FusionBench's, of the adapters of Surgery
PROBES = 8  # entries of every tensor that are recorded where whole trees are too many


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors."""
    d, hidden, patch = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["patch_size"]
    norm = lambda name: {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    dense = lambda name, out, inner: {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}
    found = {"embeddings.class_embedding": (d,), "embeddings.patch_embedding.weight": (d, 3, patch, patch)}
    found |= {"embeddings.position_embedding.weight": ((CONFIG["image_size"] // patch) ** 2 + 1, d)}
    found |= norm("pre_layrnorm")
    for i in range(CONFIG["num_hidden_layers"]):
        at = f"encoder.layers.{i}"
        for name in ("k", "v", "q", "out"):
            found |= dense(f"{at}.self_attn.{name}_proj", d, d)
        found |= norm(f"{at}.layer_norm1")
        found |= dense(f"{at}.mlp.fc1", hidden, d) | dense(f"{at}.mlp.fc2", d, hidden)
        found |= norm(f"{at}.layer_norm2")
    return found | norm("post_layernorm")


def _normal(*seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weights(expert: int | None = None) -> dict[str, np.ndarray]:
    """Pretrained weights, or those of an expert, float32."""
    out = {}
    for i, (name, shape) in enumerate(shapes().items()):
        size = np.float32(1 / np.sqrt(np.prod(shape[1:]))) if len(shape) > 1 else np.float32(0.1)
        out[name] = size * _normal(0, i, shape=shape)
        if "norm" in name and name.endswith("weight"):
            out[name] += np.float32(1)
        if expert is not None:
            out[name] += np.float32(0.4) * size * _normal(1, expert, i, shape=shape)
    return out


def images(task: int, batch: int) -> np.ndarray:
    """``[ROWS, 3, size, size]``, of one batch of one task."""
    size = CONFIG["image_size"]
    return _normal(2, task, batch, shape=(ROWS, 3, size, size))


def projection() -> np.ndarray:
    """The visual projection, ``[projection_dim, hidden_size]``."""
    return _normal(3, shape=(CONFIG["projection_dim"], CONFIG["hidden_size"]))


def text(task: int) -> np.ndarray:
    """Unit-norm text embeddings, ``[classes, projection_dim]``."""
    rows = _normal(4, task, shape=(CLASSES[task], CONFIG["projection_dim"]))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def uniforms(draw: int) -> dict[str, np.ndarray]:
    """What the draw-th mask is made of: float32 in [0.01, 0.99] for every entry."""
    one = lambda i, shape: np.random.default_rng((5, draw, i)).random(shape)
    return {n: (0.01 + 0.98 * one(i, shape)).astype(np.float32) for i, (n, shape) in enumerate(shapes().items())}


def down() -> np.ndarray:
    """Start of the adapters' first matrices, ``[tasks, RANK, projection_dim]``."""
    width = CONFIG["projection_dim"]
    return _normal(6, shape=(len(TASKS), RANK, width)) / np.float32(np.sqrt(width))


def probed(tree: dict[str, np.ndarray]) -> np.ndarray:
    """Some entries of every tensor, float32 ``[tensors, PROBES]``."""
    picked = []
    for i, (name, shape) in enumerate(shapes().items()):
        at = np.random.default_rng((7, i)).integers(0, np.prod(shape), PROBES)
        picked.append(np.asarray(tree[name]).reshape(-1)[at])
    return np.stack(picked).astype(np.float32)


def checksum() -> float:
    """Tells a changed random generator from a changed library."""
    parts = [*weights(len(TASKS) - 1).values(), images(1, STEPS - 1), text(2), projection(), down()]
    return float(sum(np.abs(x.astype(np.float64)).sum() for x in [*parts, *uniforms(STEPS).values()]))
