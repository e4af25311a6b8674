"""What a task-conditioned merge gives: one model per task, in compressed form."""

import dataclasses
from typing import Any

import jax

from taskvec import tree as trees
from taskvec.transforms.stored import Stored, decoded
from taskvec.tree import Tree


@dataclasses.dataclass(frozen=True)
class PerTask:
    """A pretrained model and, for every tensor that was merged, what each task adds to it.

    Attributes:
      pretrained: theta_0.
      stored: ``{path: Stored}``.
      num_tasks: T.
    """

    pretrained: Tree
    stored: dict[str, Stored]
    num_tasks: int

    def params(self, task: int) -> Tree:
        """``theta_0 + vector(task)``, in the dtypes of `pretrained`."""
        if not 0 <= task < self.num_tasks:
            raise ValueError(f"there are tasks 0 to {self.num_tasks - 1}, got {task}")
        flat = trees.flatten(self.pretrained)
        return trees.unflatten({**flat, **{p: _added(flat[p], x, task, p) for p, x in self.stored.items()}})

    def bits(self) -> int:
        """Bits of the pretrained model and of all that is stored for the T tasks."""
        pretrained = sum(8 * x.nbytes for x in jax.tree.leaves(self.pretrained))
        return pretrained + sum(x.bits() for x in self.stored.values())


def _added(theta0: Any, stored: Stored, task: int, path: str) -> jax.Array:
    return (theta0.astype("float32") + decoded(stored, task, trees.is_stacked(path))).astype(theta0.dtype)
