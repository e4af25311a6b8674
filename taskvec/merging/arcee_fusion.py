"""Arcee Fusion: only the important changes of one model."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, keep_important, sum_tasks


@method(
    "arcee_fusion",
    Card(
        title="Arcee's MergeKit: A Toolkit for Merging Large Language Models",
        arxiv="2403.13257",
        year=2024,
        summary="keeps the changes whose size times divergence of the row is an outlier of the tensor",
        released_code="quartiles of tensors above a million entries come from a random sample; here they are exact. "
        "There is no paper",
        tasks=(1, 1),
    ),
)
def arcee_fusion(spread: float = 1.5) -> Chain:
    """``theta_0 + tau`` where the importance of an entry is at least ``median + spread (q_75 - q_25)``.

    Args:
      spread: quartile distances above the median; see `keep_important`.
    """
    return chain(keep_important(spread), sum_tasks())
