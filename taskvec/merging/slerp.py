"""SLERP and its relatives: interpolation along great circles instead of straight lines."""

from collections.abc import Sequence

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, mean_on_sphere, scale as scale_by, slerp as slerp_by
from taskvec.transforms.geometry import NEARLY_ONE

_MERGEKIT = {
    "title": "Arcee's MergeKit: A Toolkit for Merging Large Language Models",
    "arxiv": "2403.13257",
    "year": 2024,
}


@method(
    "slerp",
    Card(
        **_MERGEKIT,
        summary="interpolates two models on a great circle, tensor by tensor",
        released_code="the formula is Shoemake's (SIGGRAPH 1985); MergeKit's models are its base_model and one other",
        base="optional",
        tasks=(2, 2),
        ordered=True,
    ),
)
def slerp(t: float = 0.5, linear_above: float = 0.9995) -> Chain:
    """``(sin((1 - t) w) theta_1 + sin(t w) theta_2) / sin(w)``, w the angle between the weights of a tensor.

    A pretrained model, if there is one, plays no part.

    Args:
      t: 0 gives the first model, 1 the second.
      linear_above: straight interpolation where the magnitude of the cosine is larger.
    """
    return chain(slerp_by(t, "weights", "tensor", linear_above))


@method(
    "nuslerp",
    Card(
        **_MERGEKIT,
        summary="interpolates two task vectors (or two models) on a great circle, by weights",
        released_code="normalises lengths of at least 1e-7; MergeKit's own, there is no paper",
        base="optional",
        tasks=(2, 2),
    ),
)
def nuslerp(weights: Sequence[float] | None = None, axis: str | int = "tensor", scale: float = 1.0) -> Chain:
    """``theta_0 + scale slerp(tau_1, tau_2)`` at ``t = w_2 / (w_1 + w_2)``; of the weights themselves without theta_0.

    Args:
      weights: of the two; equal if not given, or if they add up to 0.
      axis: ``tensor``; -1 interpolates every row, 0 every column (as stored).
      scale: factor of the result.
    """
    first, second = weights or (1.0, 1.0)
    total = first + second
    t = 0.5 if abs(total) < 1e-6 else second / total
    return chain(slerp_by(t, "vectors", axis, NEARLY_ONE), scale_by(scale))


@method(
    "multi_slerp",
    Card(
        **_MERGEKIT,
        summary="weighted mean direction of the task vectors (or models), at their mean length",
        released_code="goes on from the mean direction along the mean of (u - (u m) m), which is zero by construction: "
        "the released result is the normalised weighted mean. iterations=1 takes logarithms instead, one true step",
        base="optional",
    ),
)
def multi_slerp(
    weights: Sequence[float] | None = None, iterations: int = 0, normalize: bool = True, scale: float = 1.0
) -> Chain:
    """``theta_0 + scale r m``: m the weighted mean direction of the tau_t on the sphere, r their weighted mean length.

    Args:
      weights: one per model; equal if not given.
      iterations: see `mean_on_sphere`; 0 as released.
      normalize: whether the weights are made to add up to 1.
      scale: factor of the result.
    """
    chosen = None if weights is None else tuple(weights)
    return chain(mean_on_sphere(chosen, iterations, 0.0, "vectors", normalize), scale_by(scale))
