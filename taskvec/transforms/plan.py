"""What a chain will do with a model, from names, shapes and dtypes alone: which leaves take part, and what they are."""

import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from taskvec import tree as trees
from taskvec.transforms.base import Array, Chain, Leaf, ModelInfo


class LeafPolicy(NamedTuple):
    """Which leaves take part in a merge.

    Attributes:
      include: regular expression searched in the per-layer path, or ``path -> bool``; ``None`` takes every
        floating-point leaf. Leaves left out, and integer leaves, are copied from the pretrained model.
      count_excluded: whether the entries of floating-point leaves left out count in a density's denominator. The CLIP
        literature counts 25.6 M frozen text-side entries of a B/32 model.
    """

    include: str | Callable[[str], bool] | None = None
    count_excluded: bool = False

    def takes(self, path: str) -> bool:
        """Whether the tensor at a per-layer path takes part."""
        if self.include is None:
            return True
        return bool(self.include(path) if callable(self.include) else re.search(self.include, path))


class Tensor(NamedTuple):
    """The static description of a leaf: one tensor, or L of them stacked.

    Attributes:
      stacked: whether the data below have a leading layer axis.
      shape: of one layer's tensor.
      depth, path_hash: as in `Leaf`; ``[L]`` for a stacked leaf.
      holds: predicates of the chain that are true.
    """

    stacked: bool
    shape: tuple[int, ...]
    depth: np.ndarray
    path_hash: np.ndarray
    holds: frozenset


class Plan(NamedTuple):
    """What a chain will do with a model: the leaves that take part, and the whole model's sizes."""

    tensors: dict[str, Tensor]
    info: ModelInfo


def path_hash(path: str) -> int:
    """By which `Leaf.path_hash` knows a per-layer path; uint32."""
    return zlib.crc32(path.encode())


def make_plan(stages: Chain, specs: Mapping[str, Any], num_tasks: int, policy: LeafPolicy = LeafPolicy()) -> Plan:
    """Describes every leaf that takes part, from shapes and dtypes alone.

    Args:
      stages: the chain.
      specs: ``{path: array or ShapeDtypeStruct}`` of the pretrained model.
      num_tasks: T.
      policy: which leaves take part.

    Raises:
      ValueError: no task, no leaf takes part, or the policy takes some layers of a stacked leaf only.
    """
    if num_tasks < 1:
        raise ValueError("a merge needs at least one fine-tuned model")
    predicates = [p for stage in stages.stages for p in stage.predicates]
    tensors, size, unseen, blocks = {}, 0, 0, 0
    _check_specs(specs)
    for path, spec in specs.items():
        if not trees.is_float(spec):
            continue
        stacked = trees.is_stacked(path)
        names = [trees.layer_path(path, i) for i in range(spec.shape[0])] if stacked else [path]
        shape = tuple(spec.shape[1:]) if stacked else tuple(spec.shape)
        taken = {policy.takes(name) for name in names}
        if len(taken) > 1:
            raise ValueError(f"include takes some layers of the stacked leaf {path!r} and not others; unstack it first")
        blocks = max([blocks, *((trees.depth(name) or 0) + 1 for name in names if trees.depth(name) is not None)])
        count = int(np.prod(spec.shape))
        if not taken.pop():
            unseen += count
            continue
        size += count
        depth = np.array([-1 if trees.depth(n) is None else trees.depth(n) for n in names], np.int32)
        hashes = np.array([path_hash(n) for n in names], np.uint32)
        holds = frozenset(p for p in predicates if all(p(name, shape) for name in names))
        tensors[path] = Tensor(stacked, shape, *((depth, hashes) if stacked else (depth[0], hashes[0])), holds)
    if not tensors:
        some = ", ".join(list(specs)[:5])
        raise ValueError(f"no floating-point leaf matches include={policy.include!r}; the model has {some}, ...")
    unseen = unseen if policy.count_excluded else 0
    return Plan(tensors, ModelInfo(num_tasks, size + unseen, unseen, blocks))


def _check_specs(specs: Mapping[str, Any]) -> None:
    """Raises `ValueError` for what cannot be merged: float64 without x64, stacks of different numbers of layers."""
    wide = [path for path, spec in specs.items() if spec.dtype == np.float64]
    if wide and not jax.config.jax_enable_x64:
        raise ValueError(f"{wide[0]} is float64, which jax would cut to float32: cast it, or set jax_enable_x64")
    stacks: dict[str, dict[str, tuple]] = {}
    for path, spec in specs.items():
        if trees.is_stacked(path):
            stacks.setdefault(path.split(f"{trees.STACK}/")[0], {})[path] = tuple(spec.shape)
    for shapes in stacks.values():
        if len({shape[:1] for shape in shapes.values()}) > 1 or () in shapes.values():
            raise ValueError(
                f"leaves under a dict named {trees.STACK!r} are taken for stacked layers, but differ in length: "
                f"{shapes}. Number its children, or give the dict another name"
            )


def make_leaf(tensor: Tensor, info: ModelInfo, theta0: Array, tau: Any, extras: dict, row0: int = 0) -> Leaf:
    """Puts arrays and description together.

    Args:
      tensor, info: from the plan.
      theta0: pretrained weights.
      tau: the task vectors of the leaf, or a tuple of its T fine-tuned versions.
      extras: as in `Leaf`.
      row0: first row, if this is a block of rows.
    """
    row0 = np.full_like(tensor.depth, row0)
    return Leaf(theta0, tau, extras, tensor.depth, tensor.path_hash, row0, info, tensor.holds)
