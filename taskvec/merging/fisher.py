"""Fisher merging: a mean in which every entry counts by how much a task's predictions depend on it."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Transform, weigh_by_fisher


@method(
    "fisher",
    Card(
        title="Merging Models with Fisher-Weighted Averaging",
        arxiv="2111.09832",
        year=2021,
        summary="mean of the models, weighed entry by entry by their Fisher information",
        data="unlabelled train",
        extras=("fisher",),
        collect="collect_fisher",
        base="optional",
        released_code="raises the floor of the first (target) model only (floor_rule='first', the order then matters) "
        "and searches the weights; MergeLM and FusionBench add the floor (floor_rule='add') and estimate the Fisher "
        "information from gradients of whole batches (estimator='batch' of collect_fisher)",
    ),
)
def fisher(
    weights: tuple[float, ...] | None = None,
    normalize: bool = True,
    floor: float = 1e-6,
    floor_rule: str = "all",
) -> Transform:
    """``theta = sum_t c_t F_t theta_t / sum_t c_t F_t``, entry by entry; ``c_t = weights_t / ||F_t||_2``.

    The diagonal Fisher information ``F_t`` comes from `merging.collect.collect_fisher`, as
    ``extras={"fisher": collect.stack_tasks(fishers)}``. Source: arXiv 2111.09832.

    Args:
      weights: one number a task; equal if not given.
      normalize: whether a task's Fisher information is divided by its norm over all tensors.
      floor: least Fisher information, before normalising. Fisher information is in units of 1 / weight^2 and often
        far below 1e-6: entries where all tasks are below it get the mean.
      floor_rule: ``all`` tasks are raised to the floor; ``first``: only the first; ``add``: the floor is added to all.
    """
    return weigh_by_fisher(weights, normalize, floor, floor_rule)
