"""Task vectors: what fine-tuning changed, as one tree with a task axis.

``tau_t = theta_t - theta_0``. T of them are one pytree of float32 leaves ``[T, ...]``; the leaves of scanned blocks are
``[L, T, ...]``, so that a scan over layers slices ``[T, ...]``. Source: Editing Models with Task Arithmetic,
arXiv 2212.04089.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from taskvec import tree as trees
from taskvec.tree import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """T task vectors of a matrix as products that are never made: ``tau_t = up_t @ down_t`` (LoRA, truncated SVD).

    Attributes:
      up: ``[T, m, r]``, ``[L, T, m, r]`` for a stacked leaf.
      down: ``[T, r, n]``, ``[L, T, r, n]``.
    """

    up: jax.Array
    down: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the task vectors that the products stand for."""
        return (*self.up.shape[:-1], self.down.shape[-1])

    @property
    def ndim(self) -> int:
        return self.up.ndim


def check_same_model(pretrained: Tree, other: Tree, name: str) -> None:
    """Raises `ValueError` naming the leaves in which two trees differ in name, shape or kind of dtype."""
    a, b = trees.flatten(pretrained), trees.flatten(other)
    missing, surplus = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
    shapes = [f"{p}: {a[p].shape} and {b[p].shape}" for p in a if p in b and a[p].shape != b[p].shape]
    kinds = [
        f"{p}: {a[p].dtype} and {b[p].dtype}" for p in a if p in b and trees.is_float(a[p]) != trees.is_float(b[p])
    ]
    found = {"is missing": missing, "has besides": surplus, "differs in shape": shapes, "differs in dtype": kinds}
    problems = [
        f"{what} {', '.join(where[:4])}{f' and {len(where) - 4} more' if len(where) > 4 else ''}"
        for what, where in found.items()
        if where
    ]
    if problems:
        raise ValueError(
            f"{name} is not a fine-tuned copy of the pretrained model: it {'; it '.join(problems)}. "
            "All models must come from one pretrained checkpoint and be loaded in the same layout."
        )


def check_finite(params: Tree, name: str) -> None:
    """Raises `ValueError` naming the leaves that hold NaN or infinity."""
    bad = [path for path, finite in _finite(params).items() if not finite]
    if bad:
        raise ValueError(f"{name} holds NaN or infinity in {', '.join(bad[:4])}{' ...' if len(bad) > 4 else ''}")


@jax.jit
def _finite(params: Tree) -> dict[str, jax.Array]:
    return {p: jnp.isfinite(x).all() for p, x in trees.flatten(params).items() if trees.is_float(x)}


def _task_axis(path: str) -> int:
    return 1 if trees.is_stacked(path) else 0


def task_vectors(pretrained: Tree, finetuned: Sequence[Tree], dtype: Any = jnp.float32) -> Tree:
    """Returns the task vectors of T fine-tuned models as one tree.

    Differences are taken in float32 whatever the dtype of the weights. Integer leaves stay as zeros.

    Args:
      pretrained: parameters theta_0.
      finetuned: T parameter trees of the same names and shapes.
      dtype: of the result. bfloat16 halves its memory, which is most of what adaptive merging holds; entries keep 8
        bits, an error of at most 1/256 of each.

    Raises:
      ValueError: no model is given, or one of them differs from the pretrained model in names or shapes.
    """
    finetuned = list(finetuned)
    if not finetuned:
        raise ValueError("task_vectors needs at least one fine-tuned model")
    for i, params in enumerate(finetuned):
        check_same_model(pretrained, params, f"fine-tuned model {i}")

    return _task_vectors(pretrained, finetuned, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=2)
def _task_vectors(pretrained: Tree, finetuned: list[Tree], dtype: Any) -> Tree:
    def stack(path, theta0, *thetas):
        if not trees.is_float(theta0):
            return jnp.stack([jnp.zeros(theta0.shape, dtype) for _ in thetas], _task_axis(path))
        base = theta0.astype(jnp.float32)
        return jnp.stack([(theta.astype(jnp.float32) - base).astype(dtype) for theta in thetas], _task_axis(path))

    return trees.map_with_path(stack, pretrained, *finetuned)


def num_tasks(tau: Tree) -> int:
    """T of a tree of task vectors."""
    path, leaf = next(iter(trees.flatten(tau).items()))
    return leaf.shape[_task_axis(path)]


def take(tau: Tree, tasks: Sequence[int]) -> Tree:
    """The task vectors of some tasks, in that order."""
    return trees.map_with_path(lambda path, x: jnp.take(x, jnp.array(tasks), axis=_task_axis(path)), tau)


def select(tau: Tree, task: int) -> Tree:
    """The task vector of one task, without the task axis."""
    return trees.map_with_path(lambda path, x: jnp.take(x, task, axis=_task_axis(path)), tau)


def apply(pretrained: Tree, vector: Tree, scale: float | jax.Array = 1.0) -> Tree:
    """``theta_0 + scale * vector``, added in float32 and cast once to each leaf's dtype; integer leaves are kept."""

    def add(theta0, x):
        if not trees.is_float(theta0):
            return theta0
        return (theta0.astype(jnp.float32) + scale * x).astype(theta0.dtype)

    return jax.tree.map(add, pretrained, vector)


def negate(pretrained: Tree, finetuned: Tree, scale: float = 1.0) -> Tree:
    """``theta_0 - scale * tau``: a model that forgets the task (arXiv 2212.04089, section 3)."""
    return apply(pretrained, select(task_vectors(pretrained, [finetuned]), 0), -scale)


def analogy(pretrained: Tree, a: Tree, b: Tree, c: Tree, scale: float = 1.0) -> Tree:
    """A is to B as C is to D: ``theta_0 + scale * (tau_c + tau_b - tau_a)`` (arXiv 2212.04089, section 5)."""
    tau = task_vectors(pretrained, [a, b, c])
    tau_a, tau_b, tau_c = (select(tau, t) for t in range(3))
    return apply(pretrained, jax.tree.map(lambda x, y, z: z + y - x, tau_a, tau_b, tau_c), scale)
