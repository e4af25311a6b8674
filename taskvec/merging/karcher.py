"""The Karcher mean: the centre of several models on the sphere."""

from collections.abc import Sequence

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, mean_on_sphere


@method(
    "karcher",
    Card(
        title="Functionality-Oriented LLM Merging on the Fisher-Rao Manifold",
        arxiv="2603.04972",
        year=2026,
        summary="Riemannian mean of the models' directions, tensor by tensor, at their mean length",
        released_code="MergeKit's karcher: equal weights, ended at steps of 1e-5, in the dtype of the files",
        base="optional",
    ),
)
def karcher(weights: Sequence[float] | None = None, iterations: int = 10, tolerance: float = 0.0) -> Chain:
    """``r m``: m minimises the squared angles to the models' weights, r is the mean of their lengths.

    A pretrained model, if there is one, plays no part. The paper's metric is Fisher's; this is its spherical proxy.

    Args:
      weights: one per model; equal if not given.
      iterations: at most.
      tolerance: ends the iteration when the step, an angle, is shorter.
    """
    return chain(mean_on_sphere(None if weights is None else tuple(weights), iterations, tolerance, "weights"))
