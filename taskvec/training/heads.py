"""Frozen classification heads: from class-name prompts (CLIP), or from the pretrained model's own features.

A class is the direction of its mean unit-norm feature, of prompts or of training rows; logits are scaled cosines. Heads
of T tasks with different numbers of classes are padded to one width, so that all tasks share one compiled program.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

PADDED = -1e9  # logit of a class that a task lacks


class Heads(NamedTuple):
    """Heads of T tasks.

    Attributes:
      kernel: ``[T, d, C]`` float32, unit columns, zeros where a task has fewer than C classes.
      class_mask: ``[T, C]`` bool, true for a task's classes.
      scale: factor on the cosines (the reciprocal of a temperature).
      bias: ``[T, C]``, added to the scaled cosines; ``None`` for none. Heads that are built here have none.
    """

    kernel: Array
    class_mask: Array
    scale: float | Array
    bias: Array | None = None


def normalise(features: Array) -> Array:
    """``z / |z|_2`` over the last axis; zero stays zero, with a finite gradient."""
    return features * jax.lax.rsqrt(jnp.maximum(jnp.square(features).sum(-1, keepdims=True), 1e-12))


def class_means(features: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """One task's kernel ``[d, C]``: ``w_c = normalise(mean_{i: y_i = c} z_i / |z_i|)``.

    Args:
      features: ``[N, d]``, pooled features of the pretrained model on training rows.
      labels: ``[N]`` int.
      num_classes: C.

    Raises:
      ValueError: a class has no row.
    """
    counts = np.bincount(labels, minlength=num_classes)
    if len(counts) > num_classes or not counts.all():
        empty = np.flatnonzero(counts == 0).tolist()
        raise ValueError(
            f"labels must be 0..{num_classes - 1} with a row each; found up to {len(counts) - 1}, none for {empty}"
        )
    unit = np.asarray(normalise(jnp.asarray(features, jnp.float32)))
    sums = np.zeros((num_classes, features.shape[1]), np.float32)
    np.add.at(sums, labels, unit)
    return np.asarray(normalise(jnp.asarray(sums / counts[:, None]))).T


def zero_shot(
    encode_text: Callable[[dict[str, np.ndarray]], Array],
    tokenize: Callable[[list[str]], dict[str, np.ndarray]],
    classes: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 256,
) -> np.ndarray:
    """One task's kernel ``[d, C]`` from prompts: ``w_c = normalise(mean_t normalise(E(template_t with c)))``.

    Ilharco's line (open_clip) and FusionBench (Hugging Face CLIP) build it alike; what differs is the class names, and
    for neither are the rows multiplied here: the logits' factor ``exp(logit_scale)``, 100 for OpenAI's weights, is
    `make_heads`' scale. ``taskvec.data.clip_suites`` has names and templates of the published tasks.

    Args:
      encode_text: batch of tokens -> projected features ``[B, d]`` (not normalised); jit it: batches have one shape.
      tokenize: texts -> arrays with a leading row axis, the same widths whatever the texts (CLIP pads to 77).
      classes: C names as they stand in a prompt.
      templates: with one ``{}`` for the name.
      batch_size: prompts at once; the last batch is filled with repeats.

    Raises:
      ValueError: no class, no template, or a template without exactly one ``{}``.
    """
    bad = [t for t in templates if t.count("{}") != 1]
    if bad or not templates or not classes:
        raise ValueError(
            f"want classes and templates with one {{}} each; found {len(classes)} classes, {bad or templates}"
        )
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    size, features = min(batch_size, len(prompts)), []
    for at in range(0, len(prompts), size):
        part = prompts[at : at + size]
        rows = encode_text(tokenize(part + [part[0]] * (size - len(part))))
        features.append(np.asarray(normalise(jnp.asarray(rows, jnp.float32)))[: len(part)])
    unit_CxTxd = np.concatenate(features).reshape(len(classes), len(templates), -1)
    return np.asarray(normalise(jnp.asarray(unit_CxTxd.mean(1)))).T


def make_heads(kernels: Sequence[np.ndarray], scale: float = 20.0) -> Heads:
    """Pads kernels ``[d, C_t]`` to the largest C and stacks them."""
    width = max(kernel.shape[1] for kernel in kernels)
    padded = [np.pad(kernel, ((0, 0), (0, width - kernel.shape[1]))) for kernel in kernels]
    mask = np.stack([np.arange(width) < kernel.shape[1] for kernel in kernels])
    return Heads(jnp.asarray(np.stack(padded), jnp.float32), jnp.asarray(mask), scale)


def logits(
    kernel_dxC: Array, mask_C: Array, scale: float | Array, features_Bxd: Array, bias_C: Array | None = None
) -> Array:
    """``scale * cos(z, w_c) + b_c``: ``[B, d] -> [B, C]``; -1e9 for classes that the task lacks."""
    scores = scale * (normalise(features_Bxd) @ kernel_dxC)
    scores = scores if bias_C is None else scores + bias_C[None, :]
    return jnp.where(mask_C[None, :], scores, PADDED)


def task_logits(heads: Heads, task: int, features_Bxd: Array) -> Array:
    """One task's logits: ``[B, d] -> [B, C]``."""
    bias_C = None if heads.bias is None else heads.bias[task]
    return logits(heads.kernel[task], heads.class_mask[task], heads.scale, features_Bxd, bias_C)


def all_logits(heads: Heads, features_TxBxd: Array) -> Array:
    """Every task's logits on its own rows: ``[T, B, d] -> [T, B, C]``."""
    arrays = heads.kernel, heads.class_mask, heads.scale, features_TxBxd, heads.bias
    return jax.vmap(logits, (0, 0, None, 0, 0))(*arrays)
