"""Weight averaging: the mean of the fine-tuned models."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, mean_tasks


@method(
    "weight_average",
    Card(
        title="Model soups: averaging weights of multiple fine-tuned models",
        arxiv="2203.05482",
        year=2022,
        summary="mean of the fine-tuned models (uniform soup)",
    ),
)
def weight_average() -> Chain:
    """``theta = (1/T) sum_t theta_t``."""
    return chain(mean_tasks())
