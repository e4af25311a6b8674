"""Averages of weights: of models of several tasks, of checkpoints of a run, of runs."""

from taskvec.merging.registry import Card, method
from taskvec.transforms import Chain, chain, mean_tasks

_FREE_LUNCH = {
    "title": "Free Lunch: Robust Cross-Lingual Transfer via Model Checkpoint Averaging",
    "arxiv": "2305.16834",
    "year": 2023,
    "base": "optional",
}


@method(
    "weight_average",
    Card(
        title="Model soups: averaging weights of multiple fine-tuned models",
        arxiv="2203.05482",
        year=2022,
        summary="mean of the fine-tuned models (uniform soup)",
        base="optional",
    ),
)
def weight_average() -> Chain:
    """``theta = (1/T) sum_t theta_t``.

    The greedy soup of the same paper needs held-out data: `taskvec.merging.search.greedy_soup`.
    """
    return chain(mean_tasks())


@method(
    "checkpoint_average",
    Card(**_FREE_LUNCH, summary="mean of the checkpoints of one run, such as one per epoch"),
)
def checkpoint_average() -> Chain:
    """``theta = (1/N) sum_n theta_n`` over the checkpoints of one run; integers come from the first.

    No pretrained model is needed. Averaging the averages of several runs is `run_average`.
    """
    return chain(mean_tasks())


@method(
    "run_average",
    Card(**_FREE_LUNCH, summary="mean of the models of several runs that share one frozen task head"),
)
def run_average() -> Chain:
    """``theta = (1/N) sum_n theta_n`` over runs with different seeds; integers come from the first.

    The runs must have started from the same task head and kept it frozen: heads of different runs do not average (in
    the paper the head comes from one more run, and the data order is the same in all).
    """
    return chain(mean_tasks())
