"""LoraHub (2023, arXiv 2307.13269): one weight per module for a new task, by an evolution strategy.

    python -m experiments.benchmark --config=configs/adaptive/lorahub.py:arch=b32,suite=clip20

Published: Flan-T5-large, 20 LoRA modules of rank 16 drawn from some 200, the tasks of BIG-Bench Hard, 5 labelled rows,
40 evaluations, weights in [-1.5, 1.5], penalty 0.05 times their mean size. Sigma is ours.

Our benchmark cannot run that: BBH is no suite of ours, and Flan-T5 writes its answers, while an adaptive method here
needs fixed heads. What is nearest and runs: image tasks, each the new one in turn, the others' whole task vectors for
modules (suite=clip20: 19), with all settings as published. There are no LoRA factors, hence ``factors`` has no effect.

Published numbers are of BBH alone and none is repeated here, as none could be compared.
"""

from configs import adaptive

ROWS = 5


def get_config(arg=None):
    """Arguments: those of `configs/clip.py`; two tasks or more."""
    return adaptive.protocol("lorahub", arg, rows, held_out=ROWS)


def rows(arg):
    """The rows of this method."""
    return {
        "lorahub": {
            "budget": 40, "bound": 1.5, "regularise": 0.05, "factors": True, "sigma": 0.25, "data": "few labelled",
        }
    }  # fmt: skip
