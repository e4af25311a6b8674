"""SyMerge (ICML 2026, arXiv 2412.19098), and Model Tinting, its first version: coefficients and heads together.

    python -m experiments.benchmark --config=configs/adaptive/symerge.py:arch=b32,suite=clip8

Settings of the released code: start 0.3, clamped to [0, 1], Adam 0.01 for coefficients and heads (with a bias), 500
rounds of a step for every task in random order, 32 test rows per step. Model Tinting keeps all rows; SyMerge leaves out
those on which the merged model is surer than the expert that it contradicts. ``model_tinting_grouped`` has the rate of
1e-3 for coefficients that stands in Tinting's code, commented out.

| symerge | protocol | B/32 | L/14 |
| --- | --- | ---: | ---: |
| 8 tasks | A [page] | 90.1 (0.1) | 94.1 |
| 14 tasks | [page] | 88.7 | 92.8 |
| 20 tasks | [page] | 88.6 | 93.2 |

The protocol of 14 and 20 tasks was not seen, nor a number of Model Tinting. The authors train in half precision.
"""

from configs import adaptive


def get_config(arg=None):
    """Arguments: those of `configs/clip.py`."""
    return adaptive.protocol("symerge", arg, rows)


def rows(arg):
    """The rows of this method."""
    every = {
        "method": "symerge", "schedule": "in_turn", "mode": "tensor", "constraint": "clip", "init": 0.3, "rounds": 500,
        "learning_rate": 1e-2, "head_learning_rate": 1e-2, "bias": True, "per_task": 32,
    }  # fmt: skip
    tinting = {**every, "objective": "labels"}
    return {
        "model_tinting": {**tinting, "data": "unlabelled test"},
        "model_tinting_grouped": {**tinting, "learning_rate": 1e-3, "data": "unlabelled test"},
        **adaptive.transductive_and_not("symerge", **every, objective="confident"),
    }
