"""Self Positioning (2024, arXiv 2410.15035): weights of text embedding models from pairs of texts.

    python -m experiments.benchmark --config=configs/adaptive/self_positioning.py:source=DATA

Published, as far as seen: one weight per task and stochastic gradient descent on a contrastive loss over a small
balanced set of pairs; MTEB 0.7 above joint training [abstract]. That weights lie on the simplex (softmax), the factor
of their sum, temperature, rate, steps and batch are ours.

Our benchmark cannot run that: it has neither the paper's embedding models (retrieval, similarity, ...) nor MTEB. What
is nearest and runs: the eight text tasks on MiniLM-L6 of `configs/text8.py`, a pair being two texts of one class, which
takes labels. All other texts of a batch are negatives, those of the same class among them, half of them where there are
two classes. There is no number to compare.
"""

from configs import adaptive, common, text8


def get_config(arg=None):
    """Arguments: those of `configs/text8.py`: ``source`` (the folder), ``runlocal``, ``seeds`` (how many)."""
    arg = common.parse_arg(arg, source="data", runlocal=False, seeds=3)
    every = {
        "method": "self_positioning", "scale": 1.0, "temperature": 0.05, "steps": 200, "learning_rate": 0.1,
        "per_set": 32, "data": "few labelled",
    }  # fmt: skip
    rows = {
        "self_positioning_simplex": {**every, "constraint": "simplex", "train_scale": False},
        "self_positioning": {**every, "constraint": "softmax", "train_scale": True},
    }
    config = adaptive.table(text8.get_config(f"source={arg.source},seeds={arg.seeds}"), "self_positioning_text8", rows)
    return common.shrink(config) if arg.runlocal else config
