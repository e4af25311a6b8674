"""DELLA: drop entries at random, small ones more often, then elect signs and fuse."""

from collections.abc import Sequence

from taskvec.merging.registry import Card, method
from taskvec.transforms import (
    Chain,
    chain,
    disjoint_mean,
    drop_by_rank,
    elect_signs,
    mean_tasks,
    scale as scale_by,
    sum_tasks,
    weighted_disjoint_mean,
)
from taskvec.transforms.base import check_choice
from taskvec.transforms.reduce import weigh


@method(
    "della",
    Card(
        title="DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
        arxiv="2406.11617",
        year=2024,
        summary="drops entries at random by the rank of their magnitude, rescales, then TIES' election and mean",
        released_code="ranks along axis 1 of matrices as torch stores them, [out, in] (axis=-2 here where they are "
        "[in, out]); MergeKit restores the L1 norm instead of dividing by the probabilities (rescale='l1') and elects "
        "+ where signs cancel (zero='positive')",
        ordered=True,
    ),
)
def della(
    density: float = 0.7,
    window: float = 0.14,
    scale: float = 1.1,
    election: str = "sum",
    aggregate: str = "mean",
    zero: str = "zero",
    rescale: str = "inverse_probability",
    axis: int | str = -1,
    seed: int = 0,
    weights: Sequence[float] | None = None,
) -> Chain:
    """``theta_0 + scale fuse(elect(w_t drop(tau_t)))``.

    Args:
      density: mean fraction kept; the paper's drop rate is p = 1 - density.
      window: difference between the highest and the lowest keep probability of a row (twice epsilon).
      scale: lambda.
      election: ``sum`` keeps the entries that agree with the sign of the sum; ``none`` is the linear form.
      aggregate: ``mean`` divides by the weights of the tasks that are left at the entry (by all weights in the linear
        form), ``sum`` does not divide.
      zero: see `elect_signs`.
      rescale, axis, seed: see `drop_by_rank`.
      weights: one per task; 1 if not given.
    """
    check_choice("election", election, ("sum", "none"))
    check_choice("aggregate", aggregate, ("mean", "sum"))
    stages = [drop_by_rank(density, window, rescale, axis, seed)]
    if weights is not None:
        stages.append(weigh(tuple(weights)))
    if election == "sum":
        stages.append(elect_signs(zero))
    if aggregate == "sum":
        stages.append(sum_tasks())
    elif election == "sum":
        stages.append(disjoint_mean() if weights is None else weighted_disjoint_mean(tuple(weights)))
    elif weights is None:
        stages.append(mean_tasks())
    else:
        stages += [sum_tasks(), scale_by(1 / sum(weights))]
    return chain(*stages, scale_by(scale))
