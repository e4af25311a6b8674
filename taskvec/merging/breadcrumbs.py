"""Model Breadcrumbs: drop the outliers and the small perturbations of every layer."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, crumbs, scale as scale_by, sum_tasks


@method(
    "breadcrumbs",
    Card(
        title="Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
        arxiv="2312.06795",
        year=2023,
        summary="per layer, drops the largest and the smallest entries, then task arithmetic",
        released_code="ranks along the last axis of each tensor as torch stores it, [out, in]; axis='row' takes the "
        "last axis as stored here",
    ),
)
def breadcrumbs(density: float = 0.14, gamma: float = 0.01, scale: float = 0.3, axis: str = "tensor") -> Chain:
    """``theta_0 + scale sum_t crumbs(tau_t)``.

    Args:
      density: fraction kept; the paper's (beta, gamma) = (85 %, 99 %) keeps 14 %.
      gamma: fraction of largest entries dropped.
      scale: alpha of the paper.
      axis: see `crumbs`.
    """
    return chain(crumbs(density, gamma, axis), sum_tasks(), scale_by(scale))
