"""Fine-tuning under a frozen head: how task vectors are made.

A `recipes.Recipe` gives the optimiser, a `trainable.Trainable` what it moves, an objective the loss.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskvec.adaptive import objectives
from taskvec.adaptive.fit import Loop, make_fit
from taskvec.adaptive.optimisers import sharpness_aware
from taskvec.training import heads
from taskvec.training.recipes import Recipe
from taskvec.training.trainable import Trainable, full
from taskvec.tree import Tree

Array = jax.Array
Batch = dict[str, np.ndarray]
Objective = Callable[..., tuple[Array, dict[str, Array]]]  # (outputs, head, batch) -> (loss, metrics)


def classify(
    outputs: dict[str, Array], head: tuple[Array, Array, Array], batch: dict[str, Array], label_smoothing: float = 0.0
) -> tuple:
    """Cross-entropy and accuracy of a head's logits at ``batch["label"]``."""
    logits_BxC = heads.logits(*head, outputs["features"])
    loss = objectives.cross_entropy(logits_BxC, batch["label"], smoothing=label_smoothing)
    return loss, {"accuracy": (logits_BxC.argmax(-1) == batch["label"]).mean()}


def answer(outputs: dict[str, Array], head: None, batch: dict[str, Array], label_smoothing: float = 0.0) -> tuple:
    """Mean cross-entropy of a text-to-text model's tokens (``logits [B, M, V]``) at ``batch["target"]``.

    `accuracy` is the share of rows all of whose tokens are right, given the true ones before.
    """
    logits_BxMxV, target, mask = outputs["logits"], batch["target"], batch["target_mask"]
    count = mask.sum()
    per_row = objectives.cross_entropy(logits_BxMxV, target, mask.astype(jnp.float32), label_smoothing)
    loss = (per_row * mask.sum(-1)).sum() / jnp.maximum(count, 1)
    right = (logits_BxMxV.argmax(-1) == target) | ~mask
    return loss, {"accuracy": right.all(-1).mean()}


def teacher_forced(apply_fn: Callable[..., Any], start: int) -> Callable[..., Any]:
    """`apply_fn` with ``decoder_ids``: the targets of the batch, one place later, behind the token `start`."""

    def apply(params: Tree, batch: dict[str, Array], **options: Any) -> Any:
        target = batch["target"]
        first = jnp.full((target.shape[0], 1), start, target.dtype)
        ids = jnp.concatenate([first, target[:, :-1]], axis=1)
        return apply_fn(params, batch | {"decoder_ids": ids}, **options)

    return apply


def make_finetune(
    apply_fn: Callable[..., dict[str, Array]],
    recipe: Recipe,
    *,
    trainable: Trainable | None = None,
    objective: Objective = classify,
) -> Callable[..., Tree]:
    """Returns ``finetune(params, kernel, mask, scale, batches, *, start, seed, checkpoint, on_chunk) -> learnables``.

    Make it once and call it for every task: tasks whose heads are padded to one width share the compiled step. Its
    result is what was trained: the fine-tuned params with `trainable.full` and `trainable.tangent`, else see
    `weights_of`. Its arguments:

    * params: pretrained parameters; left intact.
    * kernel, mask, scale: one task's head, ``[d, C]``, ``[C]``, factor (`heads.Heads`); None for an objective without.
    * batches: ``i -> inputs`` and what the objective reads (``label`` int32 ``[B]``), for all ``recipe.batches``.
    * start: ``(learnables, fixed)``, by default ``trainable.init(params)``.
    * seed, checkpoint, on_chunk: see `adaptive.fit.Loop`; the metrics are ``loss`` and ``accuracy`` of the batches.

    Args:
      apply_fn: ``(params, batch) -> {"features": [B, d], ...}``; with dropout it is given ``dropout`` and a ``key``,
        which differs from batch to batch.
      recipe: with its steps settled.
      trainable: what is trained; all weights by default.
      objective: ``(outputs, head, batch) -> (loss, metrics)``; with label smoothing it is given ``label_smoothing``.

    Raises:
      ValueError: a recipe whose steps depend on the task.
    """
    trainable = trainable or full()
    smoothing = {"label_smoothing": recipe.label_smoothing} if recipe.label_smoothing else {}

    def loss_fn(learnables, frozen, batch, key):
        fixed, head = frozen
        model = functools.partial(apply_fn, dropout=recipe.dropout, key=key) if recipe.dropout else apply_fn
        return objective(trainable.apply(model, learnables, fixed, batch), head, batch, **smoothing)

    gradient = sharpness_aware(recipe.sam_rho)(loss_fn) if recipe.sam_rho else loss_fn
    run = make_fit(gradient, recipe.optimiser(), accumulate=recipe.accumulate)

    def finetune(
        params: Tree,
        kernel: Array | None,
        mask: Array | None,
        scale: float | None,
        batches: Callable[[int], Batch],
        *,
        start: tuple[Tree, Tree] | None = None,
        seed: int = 0,
        checkpoint: Any = None,
        on_chunk: Callable | None = None,
    ) -> Tree:
        head = None if kernel is None else (kernel, mask, np.float32(scale))
        learnables, fixed = start or trainable.init(params)
        done = run(
            learnables, batches, recipe.batches, frozen=(fixed, head), seed=seed,
            loop=Loop(checkpoint=checkpoint, on_chunk=on_chunk),
        )  # fmt: skip
        return done.learnables

    return finetune


def weights_of(trainable: Trainable, params: Tree, learnables: Tree) -> Tree:
    """The fine-tuned weights from what `finetune` returned."""
    return trainable.weights(learnables, trainable.init(params)[1])
