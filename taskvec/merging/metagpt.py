"""MetaGPT: task arithmetic with weights from the lengths of the task vectors."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, norm_weighting, sum_tasks


@method(
    "metagpt",
    Card(
        title="MetaGPT: Merging Large Language Models Using Model Exclusive Task Arithmetic",
        arxiv="2406.11385",
        year=2024,
        summary="task arithmetic weighted by the squared norms of the task vectors; nothing to search",
        released_code="not released",
    ),
)
def metagpt() -> Chain:
    """``theta_0 + sum_t w_t tau_t``, ``w_t = ||tau_t||^2 / sum_k ||tau_k||^2``, norms over the whole model.

    The optimum for orthogonal task vectors of a model that is linear around theta_0. The weights add up to 1: with
    equal norms this is the average. Trimmed or dropped vectors: ``chain(trim(...), norm_weighting(2.0), sum_tasks())``.
    """
    return chain(norm_weighting(2.0), sum_tasks())
