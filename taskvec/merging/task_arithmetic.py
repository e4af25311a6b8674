"""Task arithmetic: adding, negating and composing task vectors."""

from collections.abc import Sequence

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, scale as scale_by, sum_tasks

_PAPER = {"title": "Editing Models with Task Arithmetic", "arxiv": "2212.04089", "year": 2022}


@method("task_arithmetic", Card(**_PAPER, summary="scaled sum of the task vectors"))
def task_arithmetic(scale: float = 0.3, weights: Sequence[float] | None = None) -> Chain:
    """``theta = theta_0 + scale sum_t w_t tau_t``; 0.3 is the usual choice for eight tasks without validation data."""
    return chain(sum_tasks(weights), scale_by(scale))


@method("task_negation", Card(**_PAPER, summary="forgets what the fine-tuned models learned"))
def task_negation(scale: float = 1.0) -> Chain:
    """``theta = theta_0 - scale sum_t tau_t``; scale is searched on data of the task and of a control task."""
    return chain(sum_tasks(), scale_by(-scale))


@method(
    "task_analogy",
    Card(**_PAPER, summary='three models a, b, c: "a is to b as c is to the result"', tasks=(3, 3), ordered=True),
)
def task_analogy(scale: float = 1.0) -> Chain:
    """``theta = theta_0 + scale (tau_c + tau_b - tau_a)`` for fine-tuned models given in the order a, b, c."""
    return chain(sum_tasks((-1.0, 1.0, 1.0)), scale_by(scale))
