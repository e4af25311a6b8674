"""Task singular vectors: merged after making them orthogonal across tasks, or stored for each task."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, keep_task_ranks, merge_singular_vectors, scale as scale_by

_CARD = {
    "title": "Task Singular Vectors: Reducing Task Interference in Model Merging",
    "arxiv": "2412.00081",
    "year": 2024,
}


@method(
    "tsv_m",
    Card(
        **_CARD,
        summary="sums the leading singular vectors of all tasks after orthogonalising them",
        released_code="averages the matrix named text_projection (matrices='^(?!.*text_projection)'); keeps nothing of "
        "matrices whose smaller side is below the number of tasks, which are averaged here",
    ),
)
def tsv_m(scale: float = 1.0, solver: str = "gram", matrices: str = "") -> Chain:
    """``theta_0 + scale * merge_singular_vectors(tau)``.

    Args:
      scale: alpha; 1 without validation data, otherwise searched in {0.1, ..., 3.0}.
      solver: ``gram`` (eigenvectors of the smaller Gram matrix, fast on CPU) or ``svd``.
      matrices: regular expression of the matrices that are decomposed; the others are averaged.
    """
    return chain(merge_singular_vectors(solver, matrices), scale_by(scale))


@method(
    "tsv_compress",
    Card(
        **_CARD,
        summary="one model per task: its leading singular vectors, 1/T of the rank",
        result="task-conditioned",
        released_code="none known",
    ),
)
def tsv_compress(solver: str = "gram") -> Chain:
    """``theta_0 + U_t S_t V_t`` with ``min(m, n) // T`` triplets a matrix; other tensors are kept whole."""
    return chain(keep_task_ranks(solver))
