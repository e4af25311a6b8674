"""A step in pieces: less memory for activations, the same gradient but for rounding."""

from typing import Any

import jax
import jax.numpy as jnp

from taskvec.adaptive.fit import Gradient
from taskvec.adaptive.rows import Batch
from taskvec.tree import Tree

Array = jax.Array


def in_pieces(gradient: Gradient, pieces: int) -> Gradient:
    """The mean of the gradients of `pieces` parts of a batch, taken one after the other.

    Args:
      gradient: of `learn.make_loss`, for batches of any number of rows per task.
      pieces: n, which divides every task's rows.

    Raises:
      ValueError: rows do not divide, or texts are packed: where a task ends is not told by rows then.
    """

    def cut(batch: Batch, num_tasks: int) -> tuple[Batch, Batch]:
        if "sentence" in batch:
            raise ValueError("packed texts cannot be cut into pieces: give padded ones, or leave out Loop(pieces=...)")
        of_rows = {name: x for name, x in batch.items() if name != "tasks"}
        sizes = {x.shape[0] for x in jax.tree.leaves(of_rows)}
        tasks = len(batch["tasks"]) if "tasks" in batch else num_tasks
        if len(sizes) != 1 or min(sizes) % (tasks * pieces):
            raise ValueError(f"arrays of {sorted(sizes)} rows of {tasks} tasks cannot be cut into {pieces} pieces")
        split = lambda x: jnp.moveaxis(x.reshape(tasks, pieces, -1, *x.shape[1:]), 1, 0)
        parts = jax.tree.map(lambda x: split(x).reshape(pieces, -1, *x.shape[1:]), of_rows)
        return parts, {name: x for name, x in batch.items() if name == "tasks"}

    def apply(state: Tree, learnables: Tree, frozen: Any, batch: Batch, key: Array) -> tuple:
        parts, whole = cut(batch, frozen[-1].kernel.shape[0])
        one = lambda state, part: gradient.apply(state, learnables, frozen, {**part, **whole}, key)

        def step(carry, part):
            state, total = carry
            *found, state = one(state, part)
            return (state, jax.tree.map(lambda a, b: a + b / pieces, total, tuple(found))), None

        shapes = jax.eval_shape(one, state, jax.tree.map(lambda x: x[0], parts))[:-1]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (state, (loss, metrics, grads)), _ = jax.lax.scan(step, (state, zeros), parts)
        return loss, metrics, grads, state

    return Gradient(gradient.init, apply)
