"""Isotropic merging: all singular values of the merged matrices are made equal."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, common_and_task_subspaces, flatten_spectrum, scale as scale_by

_CARD = {
    "title": "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
    "arxiv": "2502.04959",
    "year": 2025,
    "released_code": "averages the matrix named text_projection (matrices='^(?!.*text_projection)'); raises directions "
    "of pure rounding noise to the mean as well",
}


@method("iso_c", Card(**_CARD, summary="task arithmetic with all singular values of a matrix set to their mean"))
def iso_c(scale: float = 1.0, solver: str = "gram", matrices: str = "") -> Chain:
    """``theta_0 + scale * mean(S) U V`` of ``sum_t tau_t = U S V``.

    Args:
      scale: alpha, searched on validation data in {0.1, ..., 3.0}.
      solver: ``gram`` or ``svd``.
      matrices: regular expression of the matrices that are decomposed; the others are averaged.
    """
    return chain(flatten_spectrum(solver, matrices), scale_by(scale))


@method(
    "iso_cts", Card(**_CARD, summary="Iso-C with a part of the directions kept for what single tasks have of their own")
)
def iso_cts(scale: float = 1.0, common: float = 0.8, solver: str = "gram", matrices: str = "") -> Chain:
    """As `iso_c`, on the leading directions of the sum and those of every task's residual.

    Args:
      scale: alpha, searched on validation data in {0.1, ..., 3.0}; 1.5 in FusionBench's run.
      common: fraction of directions that are common.
      solver, matrices: as `iso_c`.
    """
    return chain(common_and_task_subspaces(common, solver, matrices), scale_by(scale))
