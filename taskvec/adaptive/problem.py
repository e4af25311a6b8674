"""What is merged, and what several such problems have in common."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from taskvec import vectors
from taskvec.adaptive.rows import Rows
from taskvec.training.heads import Heads
from taskvec.tree import Tree
from taskvec.vectors import LowRank

Array = jax.Array


class Kind(NamedTuple):
    """What problems have in common that one compiled program serves; hashable, and without arrays.

    Attributes:
      apply_fn, scanned, linear, num_tasks: of a `Problem`.
      structure, shapes: of its parameters.
    """

    apply_fn: Callable[..., dict[str, Array]]
    scanned: bool
    linear: bool
    num_tasks: int
    structure: Any
    shapes: tuple[jax.ShapeDtypeStruct, ...]

    @property
    def theta0(self) -> Tree:
        """Shapes in the place of the parameters."""
        return jax.tree.unflatten(self.structure, self.shapes)


class Problem(NamedTuple):
    """What is merged.

    Attributes:
      apply_fn: ``(params, batch, **options) -> {"features": [rows, d], ...}``; batches may hold more than its inputs.
      theta0: pretrained parameters.
      tau: task vectors, ``[T, ...]``, of stacked leaves ``[L, T, ...]``; of any float dtype, also
        `parametrisation.LowRank`.
      heads: frozen heads of S tasks: the same T, unless a method says otherwise.
      scanned: whether `apply_fn` merges layer by layer (see `merged.merged_apply`).
      linear: whether the model is linearised at `theta0`; the merged model is then to be used so as well.
    """

    apply_fn: Callable[..., dict[str, Array]]
    theta0: Tree
    tau: Tree
    heads: Heads
    scanned: bool
    linear: bool = False

    @property
    def num_tasks(self) -> int:
        return vectors.num_tasks(self.tau)

    @property
    def kind(self) -> Kind:
        leaves, structure = jax.tree.flatten(self.theta0)
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
        return Kind(self.apply_fn, self.scanned, self.linear, self.num_tasks, structure, shapes)

    def check(self, rows: Rows | None = None) -> None:
        """Raises `ValueError` unless every task vector has its head and, if they are given, its rows."""
        if self.heads.kernel.shape[0] != self.num_tasks:
            raise ValueError(f"{self.num_tasks} task vectors but heads of {self.heads.kernel.shape[0]} tasks")
        if rows is not None and len(rows.counts) != self.num_tasks:
            raise ValueError(f"{self.num_tasks} task vectors but rows of {len(rows.counts)} tasks")

    def check_dense(self, name: str) -> None:
        """Raises `ValueError` for `LowRank` task vectors, which method `name` cannot look into."""
        leaves = jax.tree.leaves(self.tau, is_leaf=lambda x: isinstance(x, LowRank))
        if any(isinstance(x, LowRank) for x in leaves):
            raise ValueError(f"{name} needs dense task vectors: multiply the low-rank ones out")

    def check_not_linear(self, name: str) -> None:
        """Raises `ValueError` if the model is linearised, which method `name` does not allow for."""
        if self.linear:
            raise ValueError(f"{name} runs the model itself: it does not take a linearised one (Problem.linear)")


def heads_of(heads: Heads, tasks: Sequence[int]) -> Heads:
    """The heads of some tasks, in that order."""
    own = lambda x: x[jnp.array(tasks)]
    return jax.tree.map(own, heads._replace(scale=None))._replace(scale=heads.scale)
