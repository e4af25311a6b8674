"""EMR-Merging: elect, mask and rescale."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, elect_and_mask


@method(
    "emr",
    Card(
        title="EMR-Merging: Tuning-Free High-Performance Model Merging",
        arxiv="2405.17461",
        year=2024,
        summary="one elected vector; a mask and a factor for each task; nothing to search",
        result="task-conditioned",
        released_code="takes the factors from sums of every tensor's mean magnitude instead of the norms of the model: "
        "rescale='released'",
    ),
)
def emr(rescale: str = "paper") -> Chain:
    """``theta_0 + f_t m_t tau`` for task t; tau has the elected sign and the largest magnitude with that sign.

    Args:
      rescale: ``paper``, ``released`` or ``none``; see `elect_and_mask`.
    """
    return chain(elect_and_mask(rescale))
