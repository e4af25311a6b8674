"""DOGE: data-free adaptive projective gradient descent on the task vectors."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, project_descent, scale as scale_by


@method(
    "doge",
    Card(
        title="Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent",
        arxiv="2501.01230",
        year=2025,
        summary="a shared correction of the task vectors, learned outside their common subspace",
        released_code="as here; trims over the blocks' matrices only (LeafPolicy(include=...) chooses those)",
    ),
)
def doge(
    eta: float = 0.07,
    density: float = 0.3,
    subspace: float = 1 / 6,
    steps: int = 400,
    learning_rate: float = 1e-4,
    scale: float = 1.0,
    others: str = "pretrained",
) -> Chain:
    """``theta_0 + scale * sum_k lambda_k m_k (tau_k + Delta)``, ``lambda_k = eta / ||tau_k||_F``, for every matrix.

    Delta minimises ``sum_j sum_i <tau_j[i], tau_j[i] - sum_k lambda_k (tau_k[i] + Delta[i])>^2`` over the matrix's rows
    i (one an output), by Adam with gradients projected out of the span of the leading left singular vectors that the
    tasks share. Source: arXiv 2501.01230, in the form that its authors contributed to FusionBench.

    One task, or tasks of the same subspaces, leave the choice of the leading shared directions to rounding.

    Args:
      eta, density, subspace, steps, learning_rate, others: see `transforms.projected.project_descent`.
      scale: factor on the result.
    """
    return chain(project_descent(eta, density, subspace, steps, learning_rate, others), scale_by(scale))
