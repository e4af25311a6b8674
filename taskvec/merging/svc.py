"""Singular value calibration of a merged vector."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, calibrate_spectrum, chain, scale as scale_by, sum_tasks


@method(
    "svc_ta",
    Card(
        title="When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging",
        arxiv="2602.05536",
        year=2026,
        summary="task arithmetic, then directions that several tasks share are shrunk",
        released_code="FusionBench's alpha is 0.1; for other merges chain calibrate_spectrum after them",
    ),
)
def svc_ta(scale: float = 0.3, alpha: float | str = "1/T", solver: str = "gram") -> Chain:
    """``theta_0 + calibrate_spectrum(scale sum_t tau_t)``.

    Args:
      scale: lambda of task arithmetic.
      alpha: least share of a task in a direction; ``1/T`` as the paper, or a positive number.
      solver: ``gram`` or ``svd``.
    """
    return chain(sum_tasks(), scale_by(scale), calibrate_spectrum(alpha, solver))
