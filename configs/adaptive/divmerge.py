"""DivMerge (2025, arXiv 2509.02108): Jensen-Shannon divergence from the experts' predictions.

    python -m experiments.benchmark --config=configs/adaptive/divmerge.py:arch=b32,suite=clip8

Published, as far as seen: the divergence, unlabelled training rows, coefficients by task or by layer, KL in comparison.
Start, optimiser, rate, steps and batch are ours, AdaMerging's without its clamp; there is no code to look at.

No published number was seen: nothing here can be compared yet.
"""

from configs import adaptive


def get_config(arg=None):
    """Arguments: those of `configs/clip.py`."""
    return adaptive.protocol("divmerge", arg, rows)


def rows(arg):
    """The rows of this method."""
    ours = {"constraint": "identity", "init": 0.3, "steps": 500, "learning_rate": 1e-3, "per_task": 16}
    every = {"method": "divmerge", **ours, "data": "unlabelled train"}
    return {
        "divmerge_taskwise": {**every, "divergence": "js", "mode": "task"},
        "divmerge_kl": {**every, "divergence": "kl", "mode": "tensor"},
        "divmerge_transductive": {**every, "divergence": "js", "mode": "tensor", "data": "unlabelled test"},
        "divmerge": {**every, "divergence": "js", "mode": "tensor"},
    }
