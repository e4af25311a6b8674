"""Merging of expert language models."""

from collections.abc import Sequence

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, mean_of


@method(
    "elm",
    Card(
        title="Exploring the Benefits of Training Expert Language Models over Instruction Tuning",
        arxiv="2302.03202",
        year=2023,
        summary="mean of some chosen experts, such as those retrieved for an unseen task",
        released_code="averages adapters; their retrieval is not part of the merge (select= takes what it found)",
        base="optional",
    ),
)
def elm(select: Sequence[int] = ()) -> Chain:
    """``theta = mean_{t in select} theta_t``.

    Args:
      select: indices of the chosen experts, from 0; all if empty.
    """
    return chain(mean_of(tuple(select)))
