"""TALL-masks: one merged vector, and one bit per entry and task that says where the task uses it."""

from collections.abc import Sequence

from taskvec.merging.registry import Card, method
from taskvec.merging.ties import aggregate_by
from taskvec.transforms import Chain, chain, elect_signs, keep_masked, sum_tasks, trim

_CARD = {
    "title": "Localizing Task Information for Improved Model Merging and Compression",
    "arxiv": "2405.07813",
    "year": 2024,
    "result": "task-conditioned",
    "released_code": "searches the threshold for every task on validation data among .2, .3, .4, .5, .6 "
    "(search.per_task); the default here is one number",
}


@method("tall_masks", Card(**_CARD, summary="sum of the task vectors, masked for each task; 1 bit per entry and task"))
def tall_masks(threshold: float | Sequence[float] = 0.4) -> Chain:
    """``theta_0 + m_t tau`` for task t, with ``tau = sum_k tau_k`` and ``m_t = |tau_t| > threshold_t |tau - tau_t|``.

    Args:
      threshold: lambda_t: one number, or one per task.
    """
    return chain(sum_tasks(), keep_masked(threshold))


@method("tall_masks_ties", Card(**_CARD, summary="TIES vector, masked for each task; 1 bit per entry and task"))
def tall_masks_ties(
    density: float = 0.2, threshold: float | Sequence[float] = 0.4, aggregate: str = "sum", rule: str = "paper"
) -> Chain:
    """As `tall_masks`, with a TIES vector as the merged one; masks still compare with the whole task vectors.

    Args:
      density, aggregate, rule: as in `ties`.
      threshold: as in `tall_masks`.
    """
    return chain(trim(density, rule=rule), elect_signs(), aggregate_by(aggregate), keep_masked(threshold))
