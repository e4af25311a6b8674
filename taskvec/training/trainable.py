"""What is trained: all weights, some of them, a linear model around the start, or chosen entries.

A `Trainable` says which numbers an optimiser gets and how they make the weights. Whatever is no learnable stays as it
is, bit for bit: no weight decay reaches it, and its task vector is exactly zero. Low-rank factors are in `lora`.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from taskvec import tree as trees
from taskvec.tree import Tree

ATTENTION = r"attention/(query|key|value|qkv|output)/kernel$"


def _run_whole(apply_fn: Callable, weights: Callable, learnables: Tree, fixed: Tree, batch: Any) -> Any:
    return apply_fn(weights(learnables, fixed), batch)


class Trainable(NamedTuple):
    """How learnables make weights.

    Attributes:
      init: ``params -> (learnables, fixed)``; `fixed` is what does not change but is needed (an argument of the
        compiled step, never a constant of it). Deterministic.
      weights: ``(learnables, fixed) -> params``, the fine-tuned weights.
      run: ``(apply_fn, weights, learnables, fixed, batch) -> outputs``; given the weights by default.
    """

    init: Callable[[Tree], tuple[Tree, Tree]]
    weights: Callable[[Tree, Tree], Tree]
    run: Callable[..., Any] = _run_whole

    def apply(self, apply_fn: Callable[..., Any], learnables: Tree, fixed: Tree, batch: Any) -> Any:
        """Outputs of the model that learnables and `fixed` make."""
        return self.run(apply_fn, self.weights, learnables, fixed, batch)


def full() -> Trainable:
    """All weights."""
    return Trainable(lambda params: (params, ()), lambda learnables, fixed: learnables)


def matching(include: str, exclude: str | None = None) -> Trainable:
    """The leaves whose paths `include` matches somewhere and `exclude` nowhere (regular expressions).

    Raises:
      ValueError: in ``init``, if no leaf is left; lists some paths.
    """

    def init(params: Tree) -> tuple[Tree, Tree]:
        return trees.unflatten(chosen(params, include, exclude)), params

    return Trainable(init, lambda learnables, fixed: updated(fixed, learnables))


def attention_only(biases: bool = False) -> Trainable:
    """The linear maps of attention alone (arXiv 2407.07089): query, key, value, output; `biases`: theirs as well.

    The authors' released code leaves every weight frozen (its test for the layers is never true).
    """
    return matching(ATTENTION.replace("kernel", "(kernel|bias)") if biases else ATTENTION)


def linearised(apply_fn: Callable[..., Any], params0: Tree) -> Callable[..., Any]:
    """The first-order model ``f(x; params0) + J(x; params0) (params - params0)`` (arXiv 2305.12827, eq. 3).

    For training in tangent space, and for linearising after the fact: ``linearised(apply_fn, theta0)(theta0 + tau,
    batch)``. Features are affine in `params`; a head that normalises them is outside. Each call costs about two of
    `apply_fn`. Inside jit make it from an argument: ``params0`` closed over would be a constant of the program.

    Args:
      apply_fn: ``(params, batch, **options) -> {name: array}``; every float output is linearised.
      params0: where. Leaves that are not float stay as they are there.
    """

    def apply(params: Tree, batch: Any, **options: Any) -> Any:
        still = lambda x0: np.zeros(x0.shape, jax.dtypes.float0)  # what jax takes for the step of an integer
        step = jax.tree.map(lambda x, x0: x - x0 if trees.is_float(x0) else still(x0), params, params0)
        value, slope = jax.jvp(lambda p: apply_fn(p, batch, **options), (params0,), (step,))
        return jax.tree.map(lambda y, dy: y + dy if trees.is_float(y) else y, value, slope)

    return apply


def tangent() -> Trainable:
    """All weights of the model linearised at its start; nothing else of a recipe changes."""

    def run(apply_fn: Callable, weights: Callable, learnables: Tree, fixed: Tree, batch: Any) -> Any:
        return linearised(apply_fn, fixed)(learnables, batch)

    return Trainable(lambda params: (params, params), lambda learnables, fixed: learnables, run)


def masked() -> Trainable:
    """The entries that a mask chooses; the others have the values of the start whatever the optimiser does.

    `fixed` is ``{"params", "mask"}``; ``init`` gives the mask of everything. One compiled step serves every mask.
    """

    def init(params: Tree) -> tuple[Tree, Tree]:
        return params, {"params": params, "mask": jax.tree.map(lambda x: jnp.ones(x.shape, bool), params)}

    def weights(learnables: Tree, fixed: Tree) -> Tree:
        return jax.tree.map(jnp.where, fixed["mask"], learnables, fixed["params"])

    return Trainable(init, weights)


def chosen(params: Tree, include: str, exclude: str | None = None) -> dict[str, Any]:
    """``{path: leaf}`` of the leaves that regular expressions choose; raises `ValueError` if there are none."""
    flat = trees.flatten(params)
    found = {
        path: x
        for path, x in flat.items()
        if re.search(include, path) and not (exclude and re.search(exclude, path)) and trees.is_float(x)
    }
    if not found:
        raise ValueError(f"no leaf matches {include!r} without {exclude!r}; there is {', '.join(list(flat)[:8])}, ...")
    return found


def updated(tree: Tree, other: Tree) -> Tree:
    """A nested dict with what `other` has in place of its own, and more if `other` has more."""
    out = dict(tree)
    for key, value in other.items():
        out[key] = updated(out[key], value) if isinstance(value, dict) and key in out else value
    return out
