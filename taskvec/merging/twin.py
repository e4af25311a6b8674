"""Twin-Merging's compression: shared knowledge, and low-rank exclusive knowledge for each task."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, keep_shared_and_ranks


@method(
    "twin_compress",
    Card(
        title="Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging",
        arxiv="2406.15479",
        year=2024,
        summary="one model per task: task arithmetic plus a low-rank part of what the task has besides",
        result="task-conditioned",
        released_code="leaves out parameters named bias or classifier (LeafPolicy(include=...)); a trained router "
        "mixes the tasks' parts for every input, which is not part of this",
    ),
)
def twin_compress(density: float = 0.1, shared_scale: float = 0.29, solver: str = "gram") -> Chain:
    """``theta_t ~ shared + SVD_k(theta_t - shared)`` with ``shared = theta_0 + shared_scale sum_t tau_t``.

    Args:
      density: k as a fraction of min(m, n), at least one triplet. 10 % of the rank of a square matrix are
        20 % of its size.
      shared_scale: of task arithmetic (0.29 for GLUE).
      solver: ``gram`` or ``svd``.
    """
    return chain(keep_shared_and_ranks(density, shared_scale, solver))
