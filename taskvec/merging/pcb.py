"""PCB-Merging: parameters of different tasks compete for every weight."""

from collections.abc import Sequence

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, compete, scale as scale_by, sum_tasks


@method(
    "pcb",
    Card(
        title="Parameter Competition Balancing for Model Merging",
        arxiv="2410.02396",
        year=2024,
        summary="weighs every entry by its rank within its task and its agreement with the other tasks",
        released_code="three programs with tanh and exp instead of softmax, and clipped vectors: variant='released' "
        "(pcb-merging.py), 'released_vision' (pcb.py, density=0.05), 'released_search' (pcb_ES.py, density=0.05), "
        "which also searches one weight a task in [0.8, 1.3] with 100 evaluations",
    ),
)
def pcb(
    density: float = 0.1, scale: float = 1.2, variant: str = "paper", weights: Sequence[float] | None = None
) -> Chain:
    """``theta_0 + scale sum_t w_t s_t tau_t / sum_t s_t``, with the shares s_t of `compete`.

    Four rounds of measuring, all over the whole model. The result is a mean: it is as long as one task vector, hence a
    scale above 1.

    Args:
      density: fraction of a task's entries that compete; the masking ratio r.
      scale: lambda.
      variant: ``paper``, or one of the released programs; see `compete`.
      weights: lambda_t, which the paper searches by an evolution strategy; 1 if not given.
    """
    return chain(compete(density, variant), sum_tasks(weights), scale_by(scale))
