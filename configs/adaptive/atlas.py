"""aTLAS, task addition (Zhang et al., NeurIPS 2024, arXiv 2407.02880): free coefficients from labelled rows.

    python -m experiments.benchmark --config=configs/adaptive/atlas.py:arch=b32,suite=clip8

Settings of the released code: start 0, no clamp, AdamW 1e-3 with weight decay 0.1 along the normalised gradient, 20
epochs over the validation splits, as long as the smallest, 128 rows per step over all tasks (L/14: 64, and a step of
the optimiser after two), open_clip's crops, the epoch of the best mean normalised accuracy on the same rows, zero-shot
being the first. ``atlas_isotropic`` has one coefficient per task.

| 8 tasks | protocol | B/32 | B/16 | L/14 |
| --- | --- | ---: | ---: | ---: |
| atlas | own checkpoints [mem] | 85.0 | 86.1 | 91.4 |
| atlas, divided by the experts' | own checkpoints [mem] | 93.8 | 93.4 | 97.1 |

Not reproduced: the authors' checkpoints; FusionBench's validation splits have no limit of 5000 rows.
"""

from configs import adaptive, clip


def get_config(arg=None):
    """Arguments: those of `configs/clip.py`."""
    return adaptive.protocol("atlas", arg, rows)


def rows(arg):
    """The rows of this method."""
    at_once, accumulate = (64, 2) if arg.arch == "l14" else (128, 1)
    every = {
        "method": "atlas", "partitions": 1, "epochs": 20, "learning_rate": 1e-3, "weight_decay": 0.1,
        "gradient_norm": 1.0, "per_task": at_once // len(clip.tasks_of(arg)), "accumulate": accumulate, "keep": "best",
        "augment": True, "data": "few labelled",
    }  # fmt: skip
    return {"atlas": {**every, "mode": "tensor"}, "atlas_isotropic": {**every, "mode": "task"}}
