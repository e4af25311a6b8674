"""WUDI-Merging: the matrix that disturbs no task's outputs, judged by the task vectors alone."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, end_interference, scale as scale_by


@method(
    "wudi",
    Card(
        title="Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors",
        arxiv="2503.08099",
        year=2025,
        summary="minimises the interference of each linear layer, with task vectors in place of inputs",
        released_code="for vision leaves all but the blocks' matrices at their pretrained values "
        "(others='pretrained'); a published version divides by the norm instead of its square (norm_power=1)",
    ),
)
def wudi(
    solver: str = "adam",
    steps: int = 300,
    learning_rate: float = 1e-5,
    scale: float = 1.0,
    norm_power: float = 2.0,
    others: str = "mean",
    cutoff: float = 1e-5,
) -> Chain:
    """``theta_0 + scale * argmin_x sum_t ||(x - tau_t) tau_t^T||_F^2 / ||tau_t||_F^2`` (matrices ``[out, in]``).

    Source: arXiv 2503.08099. Adam's few small steps from the sum of the task vectors stop far from the
    minimum and so regularise; `solver` ``exact`` goes there at the cost of one eigen-decomposition a matrix. Adam's
    step of 1e-5 is in units of weights: it is made for task vectors with entries of some 1e-4.

    Args:
      solver, steps, learning_rate, norm_power, cutoff, others: see `transforms.solve.end_interference`.
      scale: factor on the result; 1, no search.
    """
    return chain(end_interference(solver, steps, learning_rate, norm_power, cutoff, others), scale_by(scale))
