"""MagMax: the largest change of every weight."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, largest_change, scale as scale_by


@method(
    "magmax",
    Card(
        title="MagMax: Leveraging Model Merging for Seamless Continual Learning",
        arxiv="2407.06322",
        year=2024,
        summary="takes each entry from the task that changed it most",
        ordered=True,
    ),
)
def magmax(scale: float = 0.5) -> Chain:
    """``theta_0 + scale tau_s``, entry by entry with s = argmax_t |tau_t|; of equal magnitudes the latest task's.

    Args:
      scale: lambda; the paper fine-tunes each task from the one before, and searches it in steps of 0.05.
    """
    return chain(largest_change(), scale_by(scale))
