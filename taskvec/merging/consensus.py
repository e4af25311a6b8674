"""Consensus merging: keep the entries that at least two tasks need."""

from collections.abc import Sequence

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, consensus, elect_signs, scale as scale_by, sum_tasks, trim

_CARD = {
    "title": "Localizing Task Information for Improved Model Merging and Compression",
    "arxiv": "2405.07813",
    "year": 2024,
    "released_code": "searches the mask threshold for every task on validation data (search.per_task); the default "
    "here is one number",
}


@method("consensus_ta", Card(**_CARD, summary="task arithmetic on the entries that several tasks need"))
def consensus_ta(scale: float = 0.3, threshold: float | Sequence[float] = 0.4, at_least: int = 2) -> Chain:
    """``theta_0 + scale * consensus(sum_t tau_t)``.

    Args:
      scale: lambda.
      threshold: lambda_t of the TALL-masks, in {.2, ..., .6}: one number, or one per task.
      at_least: number of tasks that must need an entry.
    """
    return chain(sum_tasks(), consensus(threshold, at_least), scale_by(scale))


@method("consensus_ties", Card(**_CARD, summary="TIES on the entries that several tasks need"))
def consensus_ties(
    density: float = 0.2, scale: float = 0.3, threshold: float | Sequence[float] = 0.4, at_least: int = 2
) -> Chain:
    """As `consensus_ta`, with the TIES vector (disjoint sum) as the merged one."""
    return chain(trim(density), elect_signs(), sum_tasks(), consensus(threshold, at_least), scale_by(scale))
