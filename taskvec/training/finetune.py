"""Fine-tuning of the whole encoder under a frozen head: how task vectors are made."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from taskvec.adaptive import objectives
from taskvec.adaptive.fit import make_fit
from taskvec.training import heads
from taskvec.tree import Tree

Array = jax.Array


def warmup_cosine(learning_rate: float, steps: int, warmup_fraction: float) -> optax.Schedule:
    """Linear warm-up, from ``learning_rate / (warm-up steps + 1)`` at the first step, then a cosine to zero."""
    warmup = round(warmup_fraction * steps)
    return optax.warmup_cosine_decay_schedule(learning_rate / (warmup + 1), learning_rate, warmup, steps)


def make_finetune(
    apply_fn: Callable[..., dict[str, Array]],
    *,
    steps: int,
    learning_rate: float,
    warmup_fraction: float = 0.1,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    chunk: int | None = None,
) -> Callable[..., Tree]:
    """Returns ``finetune(params, kernel, mask, scale, batches, *, seed=0, checkpoint=None, on_chunk=None) -> params``.

    It minimises the cross-entropy of a frozen head's logits over all weights of the encoder, by AdamW with a linear
    warm-up and a cosine. Make it once and call it for every task: tasks whose heads are padded to one width share the
    compiled step. Its arguments:

    * params: pretrained parameters; left intact.
    * kernel, mask, scale: one task's head, ``[d, C]``, ``[C]``, factor (`heads.Heads`).
    * batches: ``step -> inputs`` and ``label`` int32 ``[B]``.
    * seed, checkpoint, on_chunk: see `adaptive.fit.fit`; the metrics are ``loss`` and ``accuracy`` of the batches.

    Args:
      apply_fn: ``(params, batch) -> {"features": [B, d], ...}``.
      steps: of AdamW.
      learning_rate: peak, reached after warm-up.
      warmup_fraction: share of `steps` with rising learning rate, in [0, 1).
      weight_decay: decoupled, towards zero.
      clip: largest global norm of a gradient.
      chunk: see `adaptive.fit.make_fit`.

    Raises:
      ValueError: steps below 1 or a warm-up outside [0, 1).
    """
    if steps < 1 or not 0 <= warmup_fraction < 1:
        raise ValueError(f"steps must be at least 1 and warmup_fraction in [0, 1), got {steps} and {warmup_fraction}")

    def loss_fn(params, head, batch, key):
        logits_BxC = heads.logits(*head, apply_fn(params, batch)["features"])
        loss = objectives.cross_entropy(logits_BxC, batch["label"])
        return loss, {"accuracy": (logits_BxC.argmax(-1) == batch["label"]).mean()}

    schedule = warmup_cosine(learning_rate, steps, warmup_fraction)
    optimiser = optax.chain(optax.clip_by_global_norm(clip), optax.adamw(schedule, weight_decay=weight_decay))
    run = make_fit(loss_fn, optimiser, chunk=chunk)

    def finetune(
        params: Tree,
        kernel: Array,
        mask: Array,
        scale: float,
        batches: Callable[[int], dict[str, np.ndarray]],
        *,
        seed: int = 0,
        checkpoint: Any = None,
        on_chunk: Callable | None = None,
    ) -> Tree:
        head = (kernel, mask, np.float32(scale))
        done = run(params, batches, steps, frozen=head, seed=seed, checkpoint=checkpoint, on_chunk=on_chunk)
        return done.learnables

    return finetune
