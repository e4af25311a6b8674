"""Joint multi-task training under frozen heads: one encoder for all tasks, the upper row of the tables of merging.

A step takes a batch of every task and goes along ``sum_t w_t g_t``; the weights come from a balancer
(`taskvec.training.balancers`), ones for the plain sum of the losses.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taskvec import tree as trees
from taskvec.adaptive import objectives
from taskvec.adaptive.fit import FitResult, Gradient, Loop, make_fit
from taskvec.adaptive.optimisers import worst_nearby
from taskvec.adaptive.parametrisation import weighted_sum
from taskvec.adaptive.rows import split_tasks
from taskvec.training import balancers, heads as heads_lib
from taskvec.training.balancers import Balancer
from taskvec.training.heads import Heads
from taskvec.training.trainable import Trainable, full
from taskvec.tree import Tree

Array = jax.Array
Batch = dict[str, Any]

_NOT_INPUTS = ("label", "validation")


def concatenated(batches: Sequence[Callable[[int], Batch]]) -> Callable[[int], Batch]:
    """One batch of T tasks from T batches of equal numbers of rows, in the order of the tasks.

    Rows of tokens (``[B, N]``) are padded with zeros to the longest.
    """

    def batch(step: int) -> Batch:
        parts = [each(step) for each in batches]
        rows = [len(part["label"]) for part in parts]
        if len(set(rows)) > 1:
            raise ValueError(f"batches of all tasks need the same number of rows, got {rows}")
        return {name: _concatenate([part[name] for part in parts]) for name in parts[0]}

    return batch


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    if arrays[0].ndim == 2:
        width = max(x.shape[1] for x in arrays)
        arrays = [np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in arrays]
    return np.concatenate(arrays)


def make_joint(
    apply_fn: Callable[..., dict[str, Array]],
    optimiser: optax.GradientTransformation,
    balancer: Balancer | None = None,
    *,
    trainable: Trainable | None = None,
    tasks_at_once: int = 1,
    sam_rho: float = 0.0,
) -> Callable[..., FitResult]:
    """Returns ``joint(params, heads, batches, steps, *, seed=0, loop=Loop()) -> FitResult``.

    Its learnables are the fine-tuned params where all weights are trained, else see `finetune.weights_of`. Arguments:

    * params: pretrained parameters; left intact.
    * heads: frozen heads of the T tasks.
    * batches: ``step -> inputs`` of ``T * B`` rows in the order of the tasks and ``label`` int32 ``[T * B]``, such as
      `concatenated`; for a balancer that needs them also ``validation``, of the same form with any number of rows.
    * steps, seed, loop: see `adaptive.fit.fit`. The metrics of a step are ``loss`` (the weighted sum), ``losses``,
      ``weights`` and ``accuracy``, each ``[T]``.

    Where the balancer does without the Gram matrix, the rows of all tasks pass the encoder as one batch, with one
    backward pass. Otherwise a step holds T gradients of the size of the learnables, and twice as many with SAM, beside
    the activations of `tasks_at_once` tasks; only the Gram matrix and the weighted sum leave it. Arithmetic is that of
    one batch of all tasks either way; SAM doubles it.

    Published (FusionBench): 128 rows per task, ``optax.adam(optax.cosine_decay_schedule(1e-5, 4000))``, 4000 steps, no
    decay, sum of the losses.

    Args:
      apply_fn: ``(params, batch) -> {"features": [rows, d], ...}``.
      optimiser: of optax.
      balancer: `balancers.equal` by default.
      trainable: what is trained; all weights by default.
      tasks_at_once: gradients taken side by side where they are taken task by task.
      sam_rho: if above 0, task-based flat minima (arXiv 2211.13723): beside g_t there is
        ``h_t = grad L_t(theta + rho g_t / |g_t|) - g_t``; both families are balanced on their own, from the same
        memory, and added. The formula is recalled, not checked against the paper.

    Raises:
      ValueError: rows do not divide among the tasks, or validation rows are missing.
    """
    balancer, trainable = balancer or balancers.equal(), trainable or full()
    apply = _gradient(apply_fn, balancer, trainable, tasks_at_once, sam_rho)

    @functools.cache
    def runner(num_tasks: int) -> Callable[..., FitResult]:
        return make_fit(Gradient(lambda learnables: balancer.init(num_tasks), apply), optimiser)

    def joint(
        params: Tree, heads: Heads, batches: Callable[[int], Batch], steps: int, *, seed: int = 0, loop: Loop = Loop()
    ) -> FitResult:
        learnables, fixed = trainable.init(params)
        frozen = fixed, heads._replace(scale=np.float32(heads.scale))
        return runner(heads.kernel.shape[0])(learnables, batches, steps, frozen=frozen, seed=seed, loop=loop)

    return joint


def _gradient(
    apply_fn: Callable, balancer: Balancer, trainable: Trainable, tasks_at_once: int, sam_rho: float
) -> Callable[..., tuple]:
    """The ``apply`` of an `adaptive.fit.Gradient` whose memory is the balancer's."""

    def gradient(memory: Tree, learnables: Tree, frozen: tuple[Tree, Heads], batch: Batch, key: Array) -> tuple:
        fixed, heads = frozen
        run = lambda learnables, inputs: trainable.apply(apply_fn, learnables, fixed, inputs)
        heard = _validation_losses(run, learnables, heads, batch) if balancer.needs_validation else None
        weigh = lambda gram, losses: balancer.weights(gram, memory, losses if heard is None else heard, key)
        if balancer.needs_gram or sam_rho:
            losses, accuracy, families = task_gradients(run, learnables, heads, batch, tasks_at_once, sam_rho)
            gram_of = gram_matrix if balancer.needs_gram else lambda grads: None
            weighed = [weigh(gram_of(grads), losses) for grads in families]
            (weights, after), *_ = weighed
            total, *more = [_combine(grads, w) for grads, (w, _) in zip(families, weighed, strict=True)]
            total = optax.tree.add(total, *more) if more else total
        else:
            loss_fn = lambda learnables: task_losses(run, learnables, heads, batch)
            losses, pull_back, accuracy = jax.vjp(loss_fn, learnables, has_aux=True)
            weights, after = weigh(None, losses)
            (total,) = pull_back(weights.astype(losses.dtype))
        return jnp.vdot(weights, losses), {"losses": losses, "weights": weights, "accuracy": accuracy}, total, after

    return gradient


def _validation_losses(apply_fn: Callable, params: Tree, heads: Heads, batch: Batch) -> Array:
    if "validation" not in batch:
        raise ValueError("this balancer weighs tasks by validation losses: batches lack the entry 'validation'")
    return task_losses(apply_fn, params, heads, batch["validation"])[0]


def task_losses(apply_fn: Callable, params: Tree, heads: Heads, batch: Batch) -> tuple[Array, Array]:
    """Cross-entropies and accuracies, ``[T]`` each, by one pass of all rows through the encoder."""
    num_tasks = heads.kernel.shape[0]
    inputs = {name: x for name, x in batch.items() if name not in _NOT_INPUTS}
    logits = heads_lib.all_logits(heads, split_tasks(apply_fn(params, inputs)["features"], num_tasks))
    label = split_tasks(batch["label"], num_tasks)
    return objectives.cross_entropy(logits, label), (logits.argmax(-1) == label).mean(-1)


def task_gradients(
    apply_fn: Callable, params: Tree, heads: Heads, batch: Batch, tasks_at_once: int = 1, sam_rho: float = 0.0
) -> tuple[Array, Array, list[Tree]]:
    """Losses and accuracies ``[T]``; gradients ``[T, ...]`` of each task, and with `sam_rho` what SAM adds to them."""
    num_tasks = heads.kernel.shape[0]

    def one(task: tuple[Array, Array, Batch]) -> tuple[Array, Array, list[Tree]]:
        kernel, mask, rows = task
        alone = Heads(kernel[None], mask[None], heads.scale)

        def loss_fn(p):
            losses, accuracy = task_losses(apply_fn, p, alone, rows)
            return losses[0], accuracy[0]

        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, accuracy), g = value_and_grad(params)
        if not sam_rho:
            return loss, accuracy, [g]
        _, ahead = value_and_grad(worst_nearby(params, g, sam_rho))
        return loss, accuracy, [g, optax.tree.sub(ahead, g)]

    rows = {name: split_tasks(x, num_tasks) for name, x in batch.items() if name != "validation"}
    at_once = None if tasks_at_once == 1 else min(tasks_at_once, num_tasks)
    return jax.lax.map(one, (heads.kernel, heads.class_mask, rows), batch_size=at_once)


def _combine(grads: Tree, weights: Array) -> Tree:
    return jax.tree.map(lambda g: weighted_sum(jnp.zeros(g.shape[1:], g.dtype), g, weights).astype(g.dtype), grads)


def gram_matrix(grads: Tree) -> Array:
    """``M_st = <g_s, g_t>`` of gradients ``[T, ...]``: ``[T, T]``, in float32 at least."""

    def of_leaf(g):
        rows = g.reshape(g.shape[0], -1).astype(jnp.promote_types(g.dtype, jnp.float32))
        return jnp.dot(rows, rows.T, precision=jax.lax.Precision.HIGHEST)

    return sum(of_leaf(g) for g in trees.flatten(grads).values())
