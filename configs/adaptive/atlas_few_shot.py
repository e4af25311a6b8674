"""aTLAS, few-shot recognition (Zhang et al., NeurIPS 2024, arXiv 2407.02880): a new task from the others' vectors.

    python -m experiments.benchmark --config=configs/adaptive/atlas_few_shot.py:arch=b32,suite=clip20

Every task in turn is the new one, the task vectors are those of the others. Settings of the released code: 1, 2, 4, 8,
16 rows a class, AdamW 0.1 falling to 0 along a cosine, weight decay 0.1, normalised gradient, 10 epochs of at least 10
batches of 128 rows, start 0.

No published number was seen. Not reproduced: a pool of 21 vectors (22 tasks of their own checkpoints; take
suite=clip20, 19 vectors); random crops and flips; the best epoch on a validation split (here the last, as the
benchmark gives the method one set of labelled rows); Tip-Adapter and LP++ afterwards, which are
`taskvec.adaptive.atlas_heads`.
"""

from configs import adaptive

SHOTS = (1, 2, 4, 8, 16)


def get_config(arg=None):
    """Arguments: those of `configs/clip.py`; two tasks or more."""
    return adaptive.protocol("atlas_few_shot", arg, rows)


def rows(arg):
    """The rows of this method."""
    every = {
        "method": "atlas_few_shot", "mode": "tensor", "partitions": 1, "epochs": 10, "learning_rate": 0.1,
        "weight_decay": 0.1, "gradient_norm": 1.0, "batch_size": 128, "least_batches": 10, "keep": "last",
        "data": "few labelled",
    }  # fmt: skip
    return {f"atlas_{shots}_shot": {**every, "shots": shots} for shots in SHOTS}
