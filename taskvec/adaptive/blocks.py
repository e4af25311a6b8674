"""One block of a model at a time, through nothing but its `apply_fn`.

A model that scans over stacked blocks and takes hooks (`taskvec.models.layers.Options`) runs whatever stack it gets.
With a stack of one layer, and a hook that puts another input in the place of what the embeddings gave, it runs that
layer alone on that input: masks, positions and precision are the model's own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from taskvec import tree as trees
from taskvec.tree import Tree

Array = jax.Array


def stack_of(params: Tree) -> str:
    """The path of the one dict of stacked layers.

    Raises:
      ValueError: there is none, or several (two towers, an encoder and a decoder).
    """
    paths = [path.split("/") for path in trees.flatten(params) if trees.is_stacked(path)]
    found = sorted({"/".join(keys[: keys.index(trees.STACK) + 1]) for keys in paths})
    if len(found) != 1:
        raise ValueError(
            f"this method works block by block and needs one dict of stacked {trees.STACK!r}; the model has "
            f"{', '.join(found) or 'none'} (of CLIP load a tower: models.load(folder, part='vision_projected'))"
        )
    return found[0]


def get(params: Tree, path: str) -> Tree:
    """What stands at a path."""
    for name in path.split("/"):
        params = params[name]
    return params


def replaced(params: Tree, path: str, value: Tree) -> Tree:
    """The tree with something else at a path."""
    first, _, rest = path.partition("/")
    return {**params, first: replaced(params[first], rest, value) if rest else value}


def one_layer(blocks: Tree, layer: int) -> Tree:
    """A layer's slice of a stack, or of the task vectors of one."""
    return jax.tree.map(lambda x: x[layer], blocks)


def run_block(apply_fn: Callable, outside: Tree, path: str, weights: Tree, batch: Mapping[str, Any], x: Array) -> Array:
    """One block's output on tokens x.

    Args:
      apply_fn: of the model.
      outside: its params; what stands at `path` does not matter.
      path: see `stack_of`.
      weights: of the block.
      batch: the rows of x, for masks.
      x: ``[B, N, D]``.
    """
    stack = jax.tree.map(lambda w: w[None], {"weights": weights, "x": x})
    hook = lambda run, given, _: run(given["weights"], given["x"])
    return apply_fn(replaced(outside, path, stack), batch, hooks={"block": hook}, capture=("block",))["block"][0]


def embedded(apply_fn: Callable, outside: Tree, path: str, weights: Tree, batch: Mapping[str, Any]) -> Array:
    """The input of the first block, ``[B, N, D]``; arguments as `run_block`, `weights` of any block."""
    stack = jax.tree.map(lambda w: w[None], weights)
    hook = lambda run, given, x: x
    return apply_fn(replaced(outside, path, stack), batch, hooks={"block": hook}, capture=("block",))["block"][0]


def token_weights(x_BxNxD: Array, batch: Mapping[str, Any]) -> Array:
    """Which tokens count, ``[B, N]``: those of the batch's ``mask``, else all.

    Raises:
      ValueError: rows are packed, so that tokens of a row belong to several sentences.
    """
    if "sentence" in batch:
        raise ValueError("this method works on tokens of a row and cannot take packed sentences: give padded ones")
    ones = jnp.ones(x_BxNxD.shape[:2], jnp.float32)
    return ones * batch["mask"] if "mask" in batch else ones
