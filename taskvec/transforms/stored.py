"""Results with one vector per task, in the form in which they are stored.

A chain whose last transform returns one of these is *task-conditioned*: ``theta_0 + vector(task)`` are the weights of
a task. They are pytrees of one tensor; the layers of a stack have one more leading axis in every array (use
`jax.vmap`, as `decoded` does).
"""

import functools
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

Array = jax.Array


@runtime_checkable
class Stored(Protocol):
    """What a compressed tensor can do. `arrays` names the fields that must be stored, for counting and for files."""

    def vector(self, task: int) -> Array:
        """What task `task` adds to the pretrained tensor, float32 ``[...]``."""

    def bits(self) -> int:
        """Size in bits."""


class Masked(NamedTuple):
    """One merged tensor, and one bit per entry and task that says where the task uses it.

    Attributes:
      merged: ``[...]``, the vector that tasks share.
      mask: uint8, eight entries a byte: rows (axis 0 of `merged`; 1 for vectors and scalars) first, so that a tensor
        can be stored by rows: ``[rows, T, ceil(entries of a row / 8)]``.
      scale: ``[T]``, a factor for each task.
    """

    merged: Array
    mask: Array
    scale: Array

    @classmethod
    def make(cls, merged: Array, mask: Array, scale: Array | None = None) -> "Masked":
        """Packs a boolean mask ``[T, ...]``; `scale` is 1 if not given."""
        tasks, rows = mask.shape[0], merged.shape[0] if merged.ndim > 1 else 1
        packed = jnp.packbits(jnp.moveaxis(mask.reshape(tasks, rows, -1), 0, 1), axis=-1)
        return cls(merged, packed, jnp.ones(tasks, jnp.float32) if scale is None else scale)

    def vector(self, task: int) -> Array:
        """``scale_t * mask_t * merged``."""
        rows = self.mask.shape[0]
        here = jnp.unpackbits(self.mask[:, task], axis=-1, count=self.merged.size // rows)
        return self.scale[task] * self.merged * here.reshape(self.merged.shape).astype(self.merged.dtype)

    def bits(self) -> int:
        """32 per merged entry and one per entry and task; the T factors of the whole model are left to the caller."""
        return 8 * self.merged.nbytes + self.merged.size * self.mask.shape[-2]


class Factored(NamedTuple):
    """A low-rank vector for each task, ``shared + u_t diag(s_t) vt_t``.

    Attributes:
      u, s, vt: ``[T, M, k]``, ``[T, k]``, ``[T, k, N]``.
      shared: ``[M, N]`` that all tasks share, or ``None``.
    """

    u: Array
    s: Array
    vt: Array
    shared: Array | None = None

    def vector(self, task: int) -> Array:
        """``shared + u_t diag(s_t) vt_t``."""
        own = (self.u[task] * self.s[task]) @ self.vt[task]
        return own if self.shared is None else self.shared + own

    def bits(self) -> int:
        """Of all factors, ``32 k (M + N + 1)`` a task, and of the shared part."""
        return sum(8 * x.nbytes for x in self if x is not None)


class Dense(NamedTuple):
    """Nothing compressed.

    Attributes:
      vectors: ``[T, ...]``.
      shared: ``[...]`` that all tasks share, or ``None``.
    """

    vectors: Array
    shared: Array | None = None

    def vector(self, task: int) -> Array:
        """``shared + vectors[task]``."""
        return self.vectors[task] if self.shared is None else self.shared + self.vectors[task]

    def bits(self) -> int:
        """Of all vectors and the shared one."""
        return sum(8 * x.nbytes for x in self if x is not None)


def decoded(stored: Stored, task: int, stacked: bool = False) -> Array:
    """`Stored.vector` of one tensor, or of a stack of layers."""
    vector = functools.partial(lambda each, task: each.vector(task), task=task)
    return jax.vmap(vector)(stored) if stacked else vector(stored)
