"""LiNeS: layer-increasing scaling of a merged vector."""

from taskvec.merging.registry import Card, method
from taskvec.merging.ties import aggregate_by
from taskvec.transforms import Chain, chain, elect_signs, scale_by_depth, sum_tasks, trim

_CARD = {
    "title": "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging",
    "arxiv": "2410.17146",
    "year": 2024,
}


@method("lines", Card(**_CARD, summary="task arithmetic whose scale grows linearly with depth"))
def lines(scale: float = 0.3) -> Chain:
    """Block l of L is scaled by ``1/T + scale l/(L-1)``, everything outside the blocks by 1/T."""
    return chain(sum_tasks(), scale_by_depth(beta=scale))


@method("lines_ties", Card(**_CARD, summary="TIES whose scale grows linearly with depth"))
def lines_ties(scale: float = 0.3, density: float = 0.2, aggregate: str = "sum") -> Chain:
    """As `lines` on a TIES vector; the first block's scale matches the L1 norm of the summed task vectors."""
    return chain(trim(density), elect_signs(), aggregate_by(aggregate), scale_by_depth(beta=scale))
