"""Magnitude pruning: the largest entries of every task vector, then task arithmetic."""

from collections.abc import Sequence

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, scale as scale_by, sum_tasks, trim


@method(
    "magnitude_pruning",
    Card(
        title="Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        arxiv="2311.03099",
        year=2023,
        summary="keeps the largest entries of each task vector, then task arithmetic (the baseline of DARE)",
        released_code="drops int((1 - density) n) entries of a tensor instead of keeping int(density n), and all "
        "entries equal to the last one dropped",
    ),
)
def magnitude_pruning(
    density: float = 0.1, scale: float = 0.3, scope: str = "tensor", weights: Sequence[float] | None = None
) -> Chain:
    """``theta_0 + scale sum_t w_t trim(tau_t)``.

    Args:
      density: fraction kept of every task vector.
      scale: factor of the sum.
      scope: ``tensor`` ranks each tensor (the paper), ``model`` the whole model.
      weights: one per task; 1 if not given.
    """
    return chain(trim(density, scope), sum_tasks(weights), scale_by(scale))
