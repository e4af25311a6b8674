"""aTLAS at test time (Zhang et al., NeurIPS 2024, arXiv 2407.02880): a new task without labels, by UFM.

    python -m experiments.benchmark --config=configs/adaptive/atlas_ufm.py:arch=b32,suite=clip20

Every task in turn is the new one, the task vectors are those of the others. Settings of the released code: AdamW 1e-3
falling to 0 along a cosine, weight decay 0.1, normalised gradient, 10 epochs, 128 rows per step (L/14: 64, and a step
of the optimiser after two), a quarter of them trusted, threshold 0.99, start 0; the weak view is the picture, the
strong one a crop of half of it or more, mirrored or not.

No published number was seen. Not reproduced: the authors' 22 tasks and checkpoints (take suite=clip20); the released
code keeps the best epoch on validation labels, here the last. It also trusts every row, a slip: that is
``atlas_ufm_as_released``.
"""

from configs import adaptive


def get_config(arg=None):
    """Arguments: those of `configs/clip.py`; two tasks or more."""
    return adaptive.protocol("atlas_ufm", arg, rows)


def rows(arg):
    """The rows of this method."""
    at_once, accumulate = (64, 2) if arg.arch == "l14" else (128, 1)
    every = {
        "method": "atlas_ufm",
        "per_class": None,  # a tenth of the rows of a class, at most 100
        "threshold": 0.99, "mode": "tensor", "partitions": 1, "epochs": 10, "learning_rate": 1e-3, "weight_decay": 0.1,
        "gradient_norm": 1.0, "batch_size": at_once, "accumulate": accumulate, "augment": True,
    }  # fmt: skip
    return {
        "atlas_ufm_as_released": {**every, "all_trusted": True, "data": "unlabelled test"},
        **adaptive.transductive_and_not("atlas_ufm", **every),
    }
