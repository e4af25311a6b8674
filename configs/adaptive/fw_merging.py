"""FW-Merging (ICCV 2025, arXiv 2503.12649): Frank-Wolfe over a pool of experts, hard and soft.

    python -m experiments.benchmark --config=configs/adaptive/fw_merging.py:arch=b32,suite=clip20

Settings (FusionBench's for ViT, which is where the authors' code is): 10 rounds, 100 labelled training rows per task,
one vertex for the model by the sum of tensors' cosines with the experts' weights. Hard: steps of ``0.3 * 0.1 * 2 /
(i + 2)`` from task arithmetic at 0.3. ``fw_hard_ties``: the authors' for RoBERTa, 10 TIES merges at 0.9 of the largest
30 %, a vertex for every tensor (there a tensor goes towards zeros where no cosine is negative), steps ten times as long
as their configuration has them (in their program the command line's default of 0.1 stands above it);
``fw_hard_dare_ties`` after DARE, which keeps 30 % at random (there steps do not grow shorter). Soft: one expert a
task, then 500 steps of AdaMerging (Adam 1e-3, 16 test rows per task, no clamp, log(p + 1e-8)) from 0.3, in later rounds
from 1e-8.

Published [abstract]: with 20 ViT tasks 8.39 points above AdaMerging (layer-wise AdaMerging on B/32 has 69.6 with 20
tasks, says SyMerge's page) and 32.8 above data-free merging. No table was seen; which architecture is meant, neither.

fw_soft looks at *both* labelled training rows and unlabelled test rows (``adapt``), and is shown as what saw test rows;
fw_soft_inductive looks at training rows alone.
"""

from configs import adaptive


def get_config(arg=None):
    """Arguments: those of `configs/clip.py`."""
    return adaptive.protocol("fw_merging", arg, rows)


def rows(arg):
    """The rows of both methods."""
    oracle = {
        "rounds": 10, "granularity": "model", "point": "weights", "measure": "cosine", "shots": 100, "batch_size": 20,
        "data": "few labelled",
    }  # fmt: skip
    mixed = {
        "objective": "entropy", "steps": 500, "init": 0.3, "later_init": 1e-8, "learning_rate": 1e-3, "per_task": 16,
        "entropy_eps": 1e-8,
    }  # fmt: skip
    soft = {**oracle, **mixed, "method": "fw_soft"}
    ties = {"merge": "ties", "granularity": "tensor", "density": 0.3, "scale": 0.9, "step_size": 1.0, "start": 0.9}
    return {
        "fw_hard": {**oracle, "scale": 0.3, "step_size": 0.1, "start": 0.3},
        "fw_hard_ties": {**oracle, **ties, "method": "fw_hard"},
        "fw_hard_dare_ties": {**oracle, **ties, "method": "fw_hard", "merge": "dare_ties"},
        "fw_soft_inductive": {**soft, "adapt": "unlabelled train"},
        "fw_soft": {**soft, "adapt": "unlabelled test"},
    }
