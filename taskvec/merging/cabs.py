"""CABS: n:m sparsity without overlap, one task after the other."""

from collections.abc import Sequence

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, block_prune, chain, scale as scale_by, sum_tasks


@method(
    "cabs",
    Card(
        title="CABS: Conflict-Aware and Balanced Sparsification for Enhancing Model Merging",
        arxiv="2503.01874",
        year=2025,
        summary="each task in turn keeps n of every m entries that no earlier task keeps",
        released_code="cuts flattened tensors and drops the entries that do not fill a block (blocks='tensor', "
        "leftover='drop'); the program for 7B models keeps 64:256 and lets tasks overlap if n >= m / 2 "
        "(overlap='half'); both are written for two tasks",
        ordered=True,
    ),
)
def cabs(
    n: int = 3,
    m: int = 32,
    scale: float = 1.0,
    leftover: str = "short",
    blocks: str = "row",
    overlap: str = "none",
    weights: Sequence[float] | None = None,
) -> Chain:
    """``theta_0 + scale sum_t w_t block_prune(tau)_t``; nothing is rescaled, the weights make up for what is pruned.

    Args:
      n, m: a task keeps n of every m consecutive entries: 3:32 is a density of 9.4 %.
      scale: factor of the sum.
      leftover, blocks, overlap: see `block_prune`.
      weights: lambda_t; the paper searches 0.4 to 0.9 for two tasks. 1 if not given.
    """
    return chain(block_prune(n, m, leftover, blocks, overlap), sum_tasks(weights), scale_by(scale))
