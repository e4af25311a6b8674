"""RegMean and RegMean++: merge linear layers by regression on their inputs."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Transform, regress


@method(
    "regmean",
    Card(
        title="Dataless Knowledge Fusion by Merging Weights of Language Models",
        arxiv="2212.09849",
        year=2022,
        summary="least squares on every linear layer's inputs; means elsewhere",
        data="unlabelled train",
        extras=("gram",),
        collect="collect_gram",
        base="optional",
        released_code="ships 0.1 for reduce_nondiagonal in nearly all its configurations (0.9 in one) and off as the "
        "default (1.0); inverts without a ridge",
    ),
)
def regmean(reduce_nondiagonal: float = 0.9, ridge: float = 1e-6) -> Transform:
    """``W = (sum_t G_t)^-1 sum_t G_t W_t`` for ``y = x W``, ``G_t`` the Gram matrix of task t's inputs to the layer.

    The Gram matrices come from `merging.collect.collect_gram`, one run of each fine-tuned model over some of its own
    unlabelled inputs (1000 batches in the released code, 256 images in common vision comparisons), as
    ``extras={"gram": collect.stack_tasks(grams)}``. Leaves without one get the mean of the tasks. Source: arXiv
    2212.09849.

    Args:
      reduce_nondiagonal: factor on the entries of G_t off the diagonal, in [0, 1]. 0.9 is taken for the paper's general
        choice, 0.1 its choice for T5; search both. 1 switches it off.
      ridge: added to the diagonal of the scaled sum, see `transforms.solve.regress`.
    """
    return regress(reduce_nondiagonal, ridge)


@method(
    "regmean_plusplus",
    Card(
        title="RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging",
        arxiv="2508.03121",
        year=2025,
        summary="RegMean on the inputs that the merged model's earlier blocks give",
        data="unlabelled train",
        extras=("gram",),
        collect="collect_gram_plusplus",
        base="optional",
        released_code="its vision configurations take 0.95 for reduce_nondiagonal",
    ),
)
def regmean_plusplus(reduce_nondiagonal: float = 0.95, ridge: float = 1e-6) -> Transform:
    """The equation of `regmean`; what differs is where the Gram matrices come from.

    A block's inputs are those that the already merged earlier blocks give, ``X_t^(l) = f_M^(l-1)(X_t^(l-1))``, instead
    of those in the fine-tuned model: `merging.collect.collect_gram_plusplus`, with the same settings as here.
    """
    return regress(reduce_nondiagonal, ridge)
