"""KnOTS: merging in a basis that the singular vectors of all tasks span together."""

from taskvec.merging.registry import Card, method
from taskvec.merging.ties import aggregate_by
from taskvec.transforms import Chain, chain, drop, elect_signs, in_shared_basis, scale as scale_by, trim_present

_CARD = {
    "title": "Model Merging with SVD to Tie the Knots",
    "arxiv": "2410.19735",
    "year": 2024,
    "released_code": "merges the matrices with LoRA only (LeafPolicy(include=...)); keeps one entry more "
    "(rule='released'); elects the majority sign of the model where signs cancel (zero='majority')",
}


@method("knots_ties", Card(**_CARD, summary="TIES on the coordinates of all tasks in one basis of outputs"))
def knots_ties(
    density: float = 0.2, scale: float = 0.6, aggregate: str = "mean", rule: str = "paper", zero: str = "zero"
) -> Chain:
    """``theta_0 + scale * U TIES(U^T tau_1, .., U^T tau_T)`` with one threshold per task for the whole model.

    Args:
      density: fraction kept of a task's coordinates; coordinates beyond the rank do not count.
      scale: searched on validation data; 0.6 is the released setting for ViT-B/32.
      aggregate, rule, zero: as `ties`.
    """
    inner = chain(trim_present(density, rule), elect_signs(zero), aggregate_by(aggregate))
    return chain(in_shared_basis(inner), scale_by(scale))


@method("knots_dare_ties", Card(**_CARD, ordered=True, summary="DARE and TIES on coordinates in one basis of outputs"))
def knots_dare_ties(
    density: float = 0.9,
    scale: float = 0.7,
    trim_density: float = 1.0,
    aggregate: str = "mean",
    zero: str = "zero",
    seed: int = 0,
) -> Chain:
    """As `knots_ties`, on coordinates thinned at random: each is kept with probability `density` and rescaled.

    Args:
      density: 1 minus the drop rate, which is 0.1 in the released settings.
      scale: 0.7 in the released settings.
      trim_density: fraction kept by TIES afterwards; 1 leaves trimming out.
      aggregate, zero: as `ties`.
      seed: of the masks.
    """
    inner = chain(drop(density, seed=seed), trim_present(trim_density), elect_signs(zero), aggregate_by(aggregate))
    return chain(in_shared_basis(inner), scale_by(scale))
