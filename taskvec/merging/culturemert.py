"""CultureMERT: task arithmetic over models that were pre-trained further on one musical culture each."""

from collections.abc import Sequence

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, scale as scale_by, sum_tasks


@method(
    "culturemert",
    Card(
        title="CultureMERT: Continual Pre-Training for Cross-Cultural Music Representation Learning",
        arxiv="2506.17818",
        year=2025,
        summary="task arithmetic over single-culture models: one general model for several cultures",
        released_code="only the merged model is released: its model card names scale 0.2 for four cultures, the best "
        "of those tried; weights other than 1 are not published",
    ),
)
def culturemert(scale: float = 0.2, weights: Sequence[float] | None = None) -> Chain:
    """``theta_0 + scale sum_c w_c tau_c`` over models of single cultures.

    Args:
      scale: lambda.
      weights: one a culture; 1 if not given.
    """
    return chain(sum_tasks(weights), scale_by(scale))
