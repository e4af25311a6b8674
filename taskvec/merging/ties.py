"""TIES-Merging: trim, elect signs, merge what agrees."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import (
    Chain,
    Transform,
    chain,
    disjoint_max,
    disjoint_mean,
    elect_signs,
    scale as scale_by,
    sum_tasks,
    trim,
)
from taskvec.transforms.base import check_choice

AGGREGATES = {"mean": disjoint_mean, "sum": sum_tasks, "max": disjoint_max}


def aggregate_by(name: str) -> Transform:
    """The reduction named `name`; the allowed names are those of `AGGREGATES`."""
    return AGGREGATES[check_choice("aggregate", name, AGGREGATES)]()


@method(
    "ties",
    Card(
        title="TIES-Merging: Resolving Interference When Merging Models",
        arxiv="2306.01708",
        year=2023,
        summary="keeps the largest entries, elects a sign for each, merges those that agree",
        released_code="keeps one entry more (rule='released'); where signs cancel exactly the majority sign of the "
        "model is elected (zero='majority')",
    ),
)
def ties(
    density: float = 0.2,
    scale: float = 1.0,
    aggregate: str = "mean",
    scope: str = "model",
    rule: str = "paper",
    zero: str = "zero",
) -> Chain:
    """``theta_0 + scale * disjoint_mean(elect_signs(trim(tau)))`` with one global threshold per task.

    Args:
      density: fraction kept of every task vector.
      scale: lambda; 1 without validation data.
      aggregate: ``mean`` (the paper), ``sum`` (with scale 0.3 the baseline of the AdaMerging line), ``max``.
      scope: ``model``, or ``tensor`` as MergeKit trims.
      rule, zero: see `trim` and `elect_signs`.
    """
    return chain(trim(density, scope, rule), elect_signs(zero), aggregate_by(aggregate), scale_by(scale))
