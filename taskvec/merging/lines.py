"""LiNeS: layer-increasing scaling, of a merged vector, of one fine-tuned model, of a soup."""

from taskvec.merging.registry import Card, method
from taskvec.merging.ties import aggregate_by
from taskvec.transforms import Chain, chain, elect_signs, mean_tasks, scale as scale_by, scale_by_depth, sum_tasks, trim

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


@method(
    "lines_edit",
    Card(
        **_CARD,
        summary="one fine-tuned model, or the mean of several of one task, drawn to the pretrained in its lower layers",
        released_code="has the single-task edit only; settings of the soups and of WiSE-FT are not in it",
    ),
)
def lines_edit(alpha: float = 0.1, scale: float = 1.0) -> Chain:
    """``theta_0 + scale lambda_l mean_t(tau_t)``, ``lambda_l = alpha + (1 - alpha) l/(L-1)``, alpha outside the blocks.

    With one model and scale 1 this is the edit of a fine-tuned model that keeps it from forgetting; with several models
    of the same task, LiNeS on their soup; with a scale below 1, on WiSE-FT's interpolation.

    Args:
      alpha: what the first block keeps; searched in {0, .1, ..., 1} for the largest sum of twice the target's
        normalised accuracy and the control tasks' (`search.trade_off`).
      scale: interpolation between the pretrained (0) and the edited model (1).
    """
    return chain(mean_tasks(), scale_by_depth(beta=1.0 - alpha, alpha=alpha), scale_by(scale))
