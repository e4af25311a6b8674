"""RAM and RAM+: shared changes are averaged, changes of one task alone are kept whole."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, merge_overlap, scale as scale_by

_PAPER = {"title": "Behavior Knowledge Merge in Reinforced Agentic Models", "arxiv": "2601.13572", "year": 2026}


@method("ram", Card(**_PAPER, summary="averages entries that several tasks changed, keeps those that one task changed"))
def ram(threshold: float = 1e-5, scale: float = 1.0) -> Chain:
    """``theta_0 + scale mean of the tau_t with |tau_t| > threshold``, entry by entry.

    Args:
      threshold: smaller changes count as none.
      scale: factor of the result.
    """
    return chain(merge_overlap(threshold), scale_by(scale))


@method(
    "ram_plus",
    Card(
        **_PAPER,
        summary="as ram, and enlarges what one task alone changed by how much it shares elsewhere",
        released_code="its default run is r=0.05, alpha=1; MergeKit counts in each tensor (scope='tensor')",
    ),
)
def ram_plus(
    threshold: float = 1e-5, r: float = 0.1, alpha: float = 0.2, scale: float = 1.0, scope: str = "model"
) -> Chain:
    """As `ram`; an entry that task t alone changed is multiplied by ``1 + r min(shared_t / unique_t, alpha)``.

    Args:
      threshold: smaller changes count as none.
      r, alpha, scope: see `merge_overlap`.
      scale: factor of the result.
    """
    return chain(merge_overlap(threshold, r, alpha, scope), scale_by(scale))
