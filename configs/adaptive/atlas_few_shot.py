"""aTLAS, few-shot recognition (Zhang et al., NeurIPS 2024, arXiv 2407.02880): a new task from the others' vectors.

    python -m experiments.benchmark --config=configs/adaptive/atlas_few_shot.py:arch=b32,suite=clip20

Every task in turn is the new one, the task vectors are those of the others. Settings of the released code: 1, 2, 4, 8,
16 training rows per class, AdamW 0.1 falling to 0 along a cosine, weight decay 0.1, normalised gradient, 10 epochs of
at least 10 batches of 128 rows (L/14: 64, and a step of the optimiser after two), crops of half the picture or more and
mirror images, start 0, the best epoch on the validation split, zero-shot being the first. Further rows:

* ``atlas_tip_N_shot``, ``atlas_lpp_N_shot``: Tip-Adapter and LP++ trained on the same rows and aTLAS's features, and
  ``tip_N_shot``, ``lpp_N_shot`` on those of the pretrained model;
* ``atlas_feature_B``, ``atlas_random_B``, ``atlas_gradient_B``, ``atlas_blockwise_B``: a budget of B task vectors,
  whole or, by the gradient, another B for every tensor; 16 rows per class. The budgets are ours;
* ``atlas_x10_P``: K = 10 parts a tensor, P per cent of the training rows at random, at 100 all of them. All tensors
  have parts (``partitioned="matrices"`` is the released code's slip).

No published number was seen. Not reproduced: a pool of 21 vectors (22 tasks of their own checkpoints; take
suite=clip20, 19 vectors); for shares of the rows the released code has epochs by task (4 for SVHN to 76 for DTD), here
10; its features for Tip-Adapter and LP++ are of cropped pictures, here of whole ones. A choice by feature compares
those of the target's cropped pictures with those of the pool's whole ones.
"""

from configs import adaptive, clip

SHOTS = (1, 2, 4, 8, 16)
BUDGETS = (1, 5, 10)
SELECTIONS = {
    "feature": {"select": "feature", "blockwise": False},
    "random": {"select": "random", "blockwise": False},
    "gradient": {"select": "gradient", "blockwise": False},
    "blockwise": {"select": "gradient", "blockwise": True},
}
SHARES = (1, 5, 10, 25, 35, 50, 100)  # per cent


def get_config(arg=None):
    """Arguments: those of `configs/clip.py`; two tasks or more."""
    return adaptive.protocol("atlas_few_shot", arg, rows)


def rows(arg):
    """The rows of this method."""
    at_once, accumulate = (64, 2) if arg.arch == "l14" else (128, 1)
    every = {
        "method": "atlas_few_shot", "mode": "tensor", "partitions": 1, "epochs": 10, "learning_rate": 0.1,
        "weight_decay": 0.1, "gradient_norm": 1.0, "batch_size": at_once, "accumulate": accumulate,
        "least_batches": 10, "keep": "best", "augment": True, "data": "few labelled",
    }  # fmt: skip
    few = {f"atlas_{shots}_shot": {**every, "shots": shots} for shots in SHOTS}
    budgets = [budget for budget in BUDGETS if budget < len(clip.tasks_of(arg))]
    chosen = {
        f"atlas_{name}_{budget}": {**every, "shots": 16, "budget": budget, **how}
        for name, how in SELECTIONS.items()
        for budget in budgets
    }
    parts = {
        f"atlas_x10_{share}": {**every, "partitions": 10, "share": share / 100, "least_batches": 1} for share in SHARES
    }
    return {**few, **chosen, **parts, **heads()}


def heads():
    """Tip-Adapter and LP++, for every number of shots, without aTLAS and after it."""
    tip = {
        "method": "tip_adapter", "beta": 1.0, "alpha": 2.0, "epochs": 10, "learning_rate": 1e-3, "weight_decay": 0.1,
        "batch_size": 128,
    }  # fmt: skip
    lpp = {"method": "lp_plus_plus", "steps": 300, "alpha_every": 10}
    return {
        f"{prefix}{name}_{shots}_shot": {**head, "on": on.format(shots), "shots": shots, "data": "few labelled"}
        for prefix, on in (("", "pretrained"), ("atlas_", "atlas_{}_shot"))
        for name, head in (("tip", tip), ("lpp", lpp))
        for shots in SHOTS
    }
