"""Lottery-ticket sparse fine-tuning (LT-SFT, arXiv 2110.07560): task vectors that are sparse by construction.

Fine-tune everything that takes part; keep the entries that moved most; go back to the start and fine-tune those alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskvec import tree as trees
from taskvec.training.trainable import chosen, masked
from taskvec.tree import Tree


def largest_changes(params: Tree, tuned: Tree, density: float, include: str = ".", exclude: str | None = None) -> Tree:
    """Mask of the ``density * N`` entries with the largest ``|tuned - params|``, N those of all leaves that take part.

    Entries as large as the smallest one that is kept are kept too, as in the authors' code; those that did not move
    never are.

    Args:
      params, tuned: before and after.
      density: in (0, 1].
      include, exclude: regular expressions for the paths that take part; the others get a mask of false.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density={density}, must be in (0, 1]: the fraction of entries that is trained")
    after = trees.flatten(tuned)
    size = {
        path: np.abs(np.asarray(after[path], np.float32) - np.asarray(x, np.float32))
        for path, x in chosen(params, include, exclude).items()
    }
    together = np.concatenate([x.ravel() for x in size.values()])
    keep = max(1, round(density * len(together)))
    least = max(np.partition(together, len(together) - keep)[-keep], np.finfo(np.float32).tiny)
    mask = lambda path, x: jnp.asarray(size[path] >= least) if path in size else jnp.zeros(x.shape, bool)
    return trees.map_with_path(mask, params)


def lt_sft(
    finetune: Callable[..., Tree],
    params: Tree,
    *task: Any,
    density: float,
    include: str = ".",
    exclude: str | None = None,
    checkpoints: tuple[Any, Any] = (None, None),
    on_chunk: Callable | None = None,
    steps: int = 0,
    **settings: Any,
) -> Tree:
    """Runs both phases; returns weights that differ from `params` in at most about ``density * N`` entries.

    Args:
      finetune: of `make_finetune` with ``trainable=masked()``; both phases share its compiled step.
      params: pretrained; left intact.
      *task: head and batches, see `make_finetune`.
      density, include, exclude: see `largest_changes`; what takes no part stays as it is in both phases. The authors
        freeze layer norms: ``exclude="norm"``.
      checkpoints: one a phase.
      on_chunk: as for `finetune`; the second phase counts on from `steps`.
      steps: of a phase.
      **settings: for `finetune`.
    """
    part = chosen(params, include, exclude)
    every = trees.map_with_path(lambda path, x: jnp.full(x.shape, path in part), params)
    start = params, {"params": params, "mask": every}
    first = finetune(params, *task, start=start, checkpoint=checkpoints[0], on_chunk=on_chunk, **settings)
    fixed = {"params": params, "mask": largest_changes(params, jax.device_get(first), density, include, exclude)}
    later = on_chunk and (lambda step, metrics: on_chunk(steps + step, metrics))
    second = finetune(params, *task, start=(params, fixed), checkpoint=checkpoints[1], on_chunk=later, **settings)
    return masked().weights(second, fixed)
