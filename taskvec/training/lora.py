"""LoRA (arXiv 2106.09685) as something to train: ``W + (alpha / rank) A B`` for kernels ``[in, out]``.

The factors form a tree like the params, with ``{"a": [..., in, r], "b": [..., r, out]}`` in place of a kernel; stacked
kernels ``[L, in, out]`` have stacked factors. A starts uniform in ``+- 1 / sqrt(in)`` (PyTorch's Kaiming-uniform, as
PEFT) and B at zero. `taskvec.io.peft` writes them as a PEFT adapter. Two ways to merge adapters differ: by *deltas*,
``scaling A B`` as a task vector, dense or as factors stacked to a higher rank, and by *factors*, mean of the A times
mean of the B, which is no mean of deltas.

PEFT's dropout acts on the input of A alone and cannot be said of merged weights; it is not offered.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from taskvec import tree as trees
from taskvec.training.trainable import ATTENTION, Trainable, chosen, updated
from taskvec.tree import Tree

Array = jax.Array


def lora(
    rank: int, alpha: float, targets: str = ATTENTION, *, scanned: bool = False, train_a: bool = True, seed: int = 0
) -> Trainable:
    """Low-rank factors of some kernels; everything else is frozen.

    Args:
      rank: r.
      alpha: the product is scaled by ``alpha / r``.
      targets: regular expression for the paths of the kernels.
      scanned: merge one layer at a time inside the model's scan over ``blocks``, by `layer_params`, instead of the
        whole tree before it.
      train_a: False trains B alone under a frozen A. That is L-LoRA (arXiv 2310.04742), LoRA linearised around its
        start: with B = 0 there, the tangent along A is zero. The mean of such B is the mean of the deltas.
      seed: of the A.

    Raises:
      ValueError: a rank below 1; in ``init``: targets that match nothing, or what is no matrix.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}, must be at least 1")
    scaling = alpha / rank

    def init(params: Tree) -> tuple[Tree, Tree]:
        start = {path: _start(path, x, rank, seed) for path, x in chosen(params, targets).items()}
        a, b = (trees.unflatten({f"{path}/{k}": pair[k] for path, pair in start.items()}) for k in ("a", "b"))
        return (updated(a, b), {"params": params, "a": {}}) if train_a else (b, {"params": params, "a": a})

    def weights(learnables: Tree, fixed: Tree) -> Tree:
        return merged(fixed["params"], factors(learnables, fixed), scaling)

    def run(apply_fn: Callable, weights: Callable, learnables: Tree, fixed: Tree, batch: Any) -> Any:
        if not scanned:
            return apply_fn(weights(learnables, fixed), batch)
        params = _layer_by_layer(fixed["params"], factors(learnables, fixed), scaling)
        return apply_fn(params, batch, layer_params=lambda x: merged(x["base"], x["factors"], scaling))

    return Trainable(init, weights, run)


def factors(learnables: Tree, fixed: Tree) -> Tree:
    """The tree of factors, those that are frozen included."""
    return updated(fixed["a"], learnables)


def merged(params: Tree, factors: Tree, scaling: float) -> Tree:
    """``W + scaling A B`` wherever there are factors, computed in float32, in the dtype of W."""
    out = dict(params)
    for key, node in factors.items():
        if isinstance(params[key], dict):
            out[key] = merged(params[key], node, scaling)
        else:
            product = node["a"].astype(jnp.float32) @ node["b"].astype(jnp.float32)
            out[key] = (params[key] + scaling * product).astype(params[key].dtype)
    return out


def deltas(factors: Tree, scaling: float) -> Tree:
    """``scaling A B``, the task vector's leaves that are not zero."""
    if set(factors) == {"a", "b"} and not isinstance(factors["a"], dict):
        return scaling * (factors["a"].astype(jnp.float32) @ factors["b"].astype(jnp.float32))
    return {key: deltas(node, scaling) for key, node in factors.items()}


def _start(path: str, kernel: Any, rank: int, seed: int) -> dict[str, Array]:
    if kernel.ndim != 2 + trees.is_stacked(path):
        raise ValueError(f"{path} has shape {kernel.shape}; low-rank factors are for matrices [in, out]")
    *layers, n, m = kernel.shape
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
    a = jax.random.uniform(key, (*layers, n, rank), jnp.float32, -1, 1) * n**-0.5
    return {"a": a, "b": jnp.zeros((*layers, rank, m), jnp.float32)}


def _layer_by_layer(params: Tree, factors: Tree, scaling: float) -> Tree:
    """Every stack of layers beside its factors, everything else merged."""
    out = {}
    for key, node in params.items():
        own = factors.get(key, {})
        if key == trees.STACK:
            out[key] = {"base": node, "factors": own}
        elif isinstance(node, dict):
            out[key] = _layer_by_layer(node, own, scaling)
        else:
            out[key] = merged({key: node}, {key: own}, scaling)[key] if own else node
    return out
