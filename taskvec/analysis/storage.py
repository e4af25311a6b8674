"""How many bits models take: T fine-tuned ones, one merged, or one with masks or low-rank vectors for every task.

Two ways that must agree: formulas on parameter counts (for tables), and the arrays of an actual result.
With P merged and F unmerged entries of b bits each, and a merged vector of 32 bits per entry:

* T fine-tuned models that share what is not merged: ``b (T P + F)``;
* TALL-masks, EMR-Merging: ``(b + 32 + T) P + b F``, and 32 T for EMR's factors;
* one merged model: ``b (P + F)``.

At b = 32 these are the figures of TALL-masks (arXiv 2405.07813): 20 tasks of a CLIP ViT-B/32 (P = 87,849,216,
F = 25,599,489) take 57.0 Gbit, masked 8.2.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from taskvec import tree as trees
from taskvec.merging.results import PerTask
from taskvec.transforms.plan import LeafPolicy
from taskvec.transforms.stored import Masked
from taskvec.tree import Tree


class Sizes(NamedTuple):
    """Entries of a model: those that are merged, and those that all tasks share as they are."""

    merged: int
    unmerged: int


def sizes_of(params: Tree, policy: LeafPolicy = LeafPolicy()) -> Sizes:
    """Counts the entries of floating-point leaves that the policy takes, and all others."""
    merged, total = 0, 0
    for path, x in trees.flatten(params).items():
        total += int(np.prod(x.shape))
        if trees.is_float(x) and policy.takes(trees.layer_path(path, 0) if trees.is_stacked(path) else path):
            merged += int(np.prod(x.shape))
    return Sizes(merged, total - merged)


def individual(num_tasks: int, sizes: Sizes, bits: int = 32) -> int:
    """Bits of all fine-tuned models, what is not merged once."""
    return bits * (num_tasks * sizes.merged + sizes.unmerged)


def single(sizes: Sizes, bits: int = 32) -> int:
    """Bits of one merged model."""
    return bits * (sizes.merged + sizes.unmerged)


def masked(num_tasks: int, sizes: Sizes, bits: int = 32, factors: bool = False) -> int:
    """Bits of a pretrained model, a merged vector, and a mask (and, as in EMR, a factor) for every task."""
    return single(sizes, bits) + (32 + num_tasks) * sizes.merged + 32 * num_tasks * factors


def low_rank(num_tasks: int, sizes: Sizes, shapes: Iterable[tuple[int, int, int]], bits: int = 32) -> int:
    """Bits of a pretrained model and, for every task, ``(m, n, k)`` factors ``32 k (m + n + 1)`` of some matrices.

    Merged entries outside these matrices are stored for every task as they are, 32 bits each.
    """
    shapes = list(shapes)
    rest = sizes.merged - sum(m * n for m, n, _ in shapes)
    return single(sizes, bits) + 32 * num_tasks * (rest + sum(k * (m + n + 1) for m, n, k in shapes))


def bits_of(result: Tree | PerTask) -> int:
    """Bits of a result of `merge`: all arrays of a parameter tree, or all that a `PerTask` stores.

    Masks are counted without the padding of rows to whole bytes; EMR's T factors, which every tensor carries, once.
    """
    if not isinstance(result, PerTask):
        return sum(8 * x.nbytes for x in trees.flatten(result).values())
    stored = result.stored.values()
    factors = any(isinstance(x, Masked) and bool((np.asarray(x.scale) != 1).any()) for x in stored)
    return result.bits() + 32 * result.num_tasks * factors
