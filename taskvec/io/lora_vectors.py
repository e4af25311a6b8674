"""LoRA adapters as task vectors whose products are never made: from PEFT folders to `taskvec.vectors.LowRank` leaves.

    tau_t = up_t down_t,    up_t = s_t B_t, down_t = A_t    (transposed where the tree has the matrix the other way)

with s the adapter's scaling, ``lora_alpha / r`` or ``lora_alpha / sqrt(r)``, per module where it has patterns.
"""

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from taskvec import tree as trees
from taskvec.io import names
from taskvec.io.folders import Model, open_model
from taskvec.messages import some
from taskvec.tree import Tree
from taskvec.vectors import LowRank

Pair = tuple[np.ndarray, np.ndarray]


def load(table: names.Table, theta0: Tree, base: str | os.PathLike, adapters: Sequence[str | os.PathLike]) -> Tree:
    """The task vectors of T adapters of one base, for `taskvec.adaptive.learn.Problem`.

    A matrix is `LowRank`, stacked over layers as in `theta0`, of the largest rank that any adapter has in any layer of
    it; what has a smaller one is filled up with zeros, and rank 0 means that nobody adapts it. Tensors that are no
    matrices, and those that an adapter stores whole (``modules_to_save``), are dense float32.

    Args:
      table: of the model (`taskvec.models.Model.table`).
      theta0: the base as loaded; only its shapes are used.
      base: its folder or hub id.
      adapters: T folders or hub ids of PEFT LoRA adapters.

    Raises:
      ValueError: no adapter; one that is of another kind or another base (see `lora`), that changes tensors which are
        no part of this model (of its other tower), or that holds NaN or infinity.
    """
    if not adapters:
        raise ValueError("task vectors need at least one adapter")
    below = open_model(base)
    opened = [open_model(ref, below) for ref in adapters]
    for model in opened:
        if model.kind != "lora":
            raise ValueError(
                f"{model.ref} is no LoRA adapter ({model.kind}); load such models with taskvec.models.load"
            )
    name_of = {place.path: (name, place.op) for name, place in names.places(table, below.specs).items()}
    known = {name for name, _ in name_of.values()}
    for model in opened:
        if odd := sorted(model.reader.changed - known):
            raise ValueError(f"{model.ref} adapts {some(odd, 4)}, which the model that is loaded here does not have")

    def leaf(path: str, x) -> LowRank | jax.Array:
        stacked = trees.is_stacked(path)
        layers = [trees.layer_path(path, i) for i in range(x.shape[0])] if stacked else [path]
        axes, shape = ((len(layers), len(opened)), x.shape[1:]) if stacked else ((len(opened),), x.shape)
        places = [name_of.get(layer, ("", "none")) for layer in layers]
        parts = [(model, name, op, model.reader.factors(name)) for name, op in places for model in opened]
        join = lambda arrays: jnp.asarray(np.stack(arrays).reshape(*axes, *arrays[0].shape))
        if len(shape) != 2 or any(f is None and name in model.reader.changed for model, name, _, f in parts):
            return join([_dense(model, below, name, op, shape) for model, name, op, _ in parts])
        up, down = zip(*[_turned(*part, shape) for part in parts], strict=True)
        rank = max(x.shape[1] for x in up)
        wide = [np.pad(x, ((0, 0), (0, rank - x.shape[1]))) for x in up]
        long = [np.pad(x, ((0, rank - x.shape[0]), (0, 0))) for x in down]
        return LowRank(join(wide), join(long))

    return trees.map_with_path(leaf, theta0)


def _turned(model: Model, name: str, op: str, factors: Pair | None, shape: tuple[int, int]) -> Pair:
    """Factors as the tree has the matrix; of rank 0 where there are none."""
    if factors is None:
        return np.zeros((shape[0], 0), np.float32), np.zeros((0, shape[1]), np.float32)
    up, down = factors if op == "none" else (factors[1].T, factors[0].T)
    _check(model, name, (up, down), (up.shape[0], down.shape[1]), shape)
    return up, down


def _dense(model: Model, below: Model, name: str, op: str, shape: tuple[int, ...]) -> np.ndarray:
    """What an adapter adds to a tensor."""
    if name not in model.reader.changed:
        return np.zeros(shape, np.float32)
    change = model.read(name).astype(np.float32) - below.read(name).astype(np.float32)
    change = names.to_tree_array(change, op)
    _check(model, name, (change,), change.shape, shape)
    return change


def _check(model: Model, name: str, arrays: Sequence[np.ndarray], found: tuple, shape: tuple) -> None:
    if tuple(found) != tuple(shape):
        raise ValueError(f"{model.ref} changes {name} of shape {list(found)}, loaded is {list(shape)}: another base?")
    if not all(np.isfinite(x).all() for x in arrays):
        raise ValueError(f"{model.ref} holds NaN or infinity for {name}")
