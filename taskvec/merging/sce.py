"""SCE: select, calculate, erase."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, scale as scale_by, select_calculate_erase


@method(
    "sce",
    Card(
        title="FuseChat: Knowledge Fusion of Chat Models",
        arxiv="2408.07990",
        year=2024,
        summary="in each tensor a mean weighted by the energy of the entries that differ most, minority signs erased",
        released_code="merges unselected entries too (mixed='all'); MergeKit does not, and falls back to a plain mean "
        "for task vectors below 1e-3 (guards='mergekit')",
    ),
)
def sce(
    density: float = 1.0, scale: float = 1.0, normalize: bool = True, mixed: str = "selected", guards: str = "none"
) -> Chain:
    """``theta_0 + scale select_calculate_erase(tau)``.

    Args:
      density: fraction of entries selected by their variance over the tasks (``select_topk``).
      scale: factor of the result.
      normalize, mixed, guards: see `select_calculate_erase`.
    """
    return chain(select_calculate_erase(density, normalize, mixed, guards), scale_by(scale))
