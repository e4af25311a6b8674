"""Running a model on merged weights without holding the whole merged model.

Where a model scans over its layers, one layer is merged at a time *inside* that scan, from task vectors that stay where
they are (`parametrisation.LayerOf`). `jax.checkpoint` around the merge keeps what it makes out of what is stored for
the backward pass. The merged weights themselves are stored there unless the model's scan body stands under a
`jax.checkpoint` of its own, with a policy that keeps products of matrices (`taskvec.models.layers.REMAT`): then weights
are merged again, and no whole merged model exists. Large embedding tables are merged only in the rows that are looked
up.

Temporary memory of a gradient by XLA's account (MiniLM, 22.7 M parameters, 8 tasks of 8 rows of 32 tokens, float32,
CPU): 780 MiB with a whole merge, 293 with one in the scan, whatever the number of tasks. Masks, and coefficients per
entry or part of a tensor, need a layer's vectors as a whole: there memory grows with the tasks.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from taskvec import tree as trees
from taskvec.adaptive.parametrisation import LayerOf, LowRank, Parametrisation, check_task_axes
from taskvec.training.trainable import linearised
from taskvec.tree import Tree

Array = jax.Array

TABLE_ROWS = 8192  # more rows than hidden widths have: such a matrix is a vocabulary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LazyTable:
    """An embedding table that is merged where it is looked up.

    Attributes:
      theta0: ``[V, d]``.
      tau: ``[T, V, d]``.
      factor: ``[T]``, one coefficient per task.
      merge_tensor: see `Parametrisation.merge_tensor`.
    """

    theta0: Array
    tau: Array
    factor: Array
    merge_tensor: Callable = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.theta0.shape

    @property
    def dtype(self):
        return self.theta0.dtype

    def take(self, ids: Array, axis: int = 0) -> Array:
        """Merged rows: int ``[...] -> [..., d]``, as ``jnp.take(merged, ids, axis=0)``."""
        if axis != 0:
            raise ValueError(f"a lazily merged table is looked up along axis 0, got axis={axis}")
        return self.merge_tensor(jnp.take(self.theta0, ids, axis=0), jnp.take(self.tau, ids, axis=1), self.factor)

    def __jax_array__(self) -> Array:
        """The whole merged table, for a model that also multiplies by it (tied output embeddings)."""
        return self.merge_tensor(self.theta0, self.tau, self.factor)

    @property
    def T(self) -> Array:
        return self.__jax_array__().T


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InStack:
    """Stands for task vectors ``[L, T, ...]`` among what a scan over layers slices.

    Attributes:
      layer: ``[L]`` numbers of the layers; of one of them in the scan.
      path: which stack.
    """

    layer: Array
    path: str = dataclasses.field(metadata={"static": True})


def is_table(path: str, shape: tuple[int, ...]) -> bool:
    """The default of `merged_apply`'s `lazy`: matrices outside the blocks with at least 8192 rows."""
    return not trees.is_stacked(path) and len(shape) == 2 and shape[0] >= TABLE_ROWS


def merged_apply(
    apply_fn: Callable[..., Any],
    parametrisation: Parametrisation,
    *,
    scanned: bool,
    lazy: Callable[[str, tuple[int, ...]], bool] = is_table,
    linear: bool = False,
) -> Callable[..., Any]:
    """Composes merge and forward pass.

    Args:
      apply_fn: ``(params, batch) -> outputs``; if `scanned`, it also takes `layer_params` and maps each layer's slice
        of every dict called ``blocks`` through it inside its scan.
      parametrisation: how learnables make weights.
      scanned: merge layer by layer in the model's scan. False merges the whole tree first (any model).
      lazy: ``(path, shape) -> bool``, tables of which the model only ever calls ``.take(ids, axis=0)``; only those
        with one factor per task are left unmerged.
      linear: run the model linearised at theta0 (`taskvec.training.trainable.linearised`), for task vectors of models
        that were fine-tuned so; merges the whole tree, whatever `scanned`.

    Returns:
      ``(learnables, (theta0, tau), batch, key=None, **options) -> outputs``; the key is the parametrisation's, options
      go to `apply_fn`. Pass the two trees as arguments of whatever is jitted: closed over, they would be constants of
      the program.
    """

    def whole(learnables, weights, batch, key=None, **options):
        return apply_fn(parametrisation.merge(*weights, learnables, key), batch, **options)

    def tangent(learnables, weights, batch, key=None, **options):
        return linearised(apply_fn, weights[0])(parametrisation.merge(*weights, learnables, key), batch, **options)

    def leaf(path, theta0, tau, factor):
        if lazy(path, theta0.shape) and getattr(factor, "ndim", None) == 1 and not isinstance(tau, LowRank):
            return LazyTable(theta0, tau, factor, parametrisation.merge_tensor)
        return parametrisation.merge_tensor(theta0, tau, factor)

    def layer_by_layer(learnables, weights, batch, key=None, **options):
        check_task_axes(*weights)
        theta0, tau = weights
        stacks = {}

        def numbered(path, base, vectors):
            if isinstance(vectors, LowRank) or not trees.is_stacked(path):
                return vectors
            stacks[path] = vectors
            return InStack(jnp.arange(len(base)), path)

        tau = trees.map_with_path(numbered, theta0, tau)

        def read(x):
            return LayerOf(stacks[x.path], x.layer) if isinstance(x, InStack) else x

        # Forward and backward of a scan are two loops, between which nothing can be common: no barriers are needed.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def merge_layer(layer):
            vectors = jax.tree.map(read, layer["tau"], is_leaf=lambda x: isinstance(x, InStack))
            return jax.tree.map(parametrisation.merge_tensor, layer["theta0"], vectors, layer["factor"])

        params = packed(leaf, theta0, tau, parametrisation.spread(learnables, key))
        return apply_fn(params, batch, layer_params=merge_layer, **options)

    return tangent if linear else layer_by_layer if scanned else whole


def packed(leaf: Callable[..., Any], theta0: Tree, tau: Tree, factors: Tree) -> Tree:
    """Weights for a model that merges its layers itself: of every stack the three trees side by side, else `leaf`.

    Args:
      leaf: ``(path, theta0, tau, factor) -> weight``, for what is outside the stacks.
      theta0, tau, factors: see `Parametrisation`.

    Raises:
      ValueError: there is no stack.
    """
    found = False

    def walk(path: str, *trees_: Any) -> Any:
        nonlocal found
        if not isinstance(trees_[0], dict):
            return leaf(path, *trees_)
        if path.split("/")[-1] == trees.STACK and trees.is_stacked(f"{path}/{next(iter(trees_[0]))}"):
            found = True
            return dict(zip(("theta0", "tau", "factor"), trees_, strict=True))
        return {name: walk(f"{path}/{name}".lstrip("/"), *(t[name] for t in trees_)) for name in trees_[0]}

    params = walk("", theta0, tau, factors)
    if not found:
        raise ValueError(f"scanned=True needs stacked {trees.STACK!r}, found {sorted(theta0)}; pass scanned=False")
    return params
