"""TSV-Merging: task singular vectors, made orthogonal across tasks."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, merge_singular_vectors, scale as scale_by


@method(
    "tsv_m",
    Card(
        title="Task Singular Vectors: Reducing Task Interference in Model Merging",
        arxiv="2412.00081",
        year=2024,
        summary="sums the leading singular vectors of all tasks after orthogonalising them",
        released_code="averages the matrix named text_projection; here it is treated as the other matrices",
    ),
)
def tsv_m(scale: float = 1.0, solver: str = "gram") -> Chain:
    """``theta_0 + scale * merge_singular_vectors(tau)``.

    Args:
      scale: alpha; 1 without validation data.
      solver: ``gram`` (eigenvectors of the smaller Gram matrix, fast on CPU) or ``svd``.
    """
    return chain(merge_singular_vectors(solver), scale_by(scale))
