"""SurgeryV2 (Yang et al. 2024, arXiv 2410.14389): a correction after every block, on four merged models.

    python -m experiments.benchmark --config=configs/adaptive/surgery_v2.py:arch=b32,suite=clip8

Settings of the released code: rank 16 (a comment has 4 for L/14), Adam 1e-3, 500 iterations of two batches of 16 test
rows per task, a step after each: 1000 steps. Merged models as for `configs/adaptive/surgery.py`.

No published number was seen; the abstract says nearly the experts' accuracy. What the experts give after every block is
kept for all test rows, ``L D + d`` numbers each: 40 kB a row for B/32, 101 kB for L/14. Where that is too much, set
``config.suite.test``.
"""

from configs import adaptive
from configs.adaptive.surgery import MERGED


def get_config(arg=None):
    """Arguments: those of `configs/clip.py`."""
    return adaptive.protocol("surgery_v2", arg, rows)


def rows(arg):
    """The rows of this method, and those that it stands on."""
    every = {
        "method": "surgery_v2", "rank": 4 if arg.arch == "l14" else 16, "steps": 1000, "learning_rate": 1e-3,
        "per_task": 16,
    }  # fmt: skip
    test = {**every, "data": "unlabelled test"}
    others = {f"surgery_v2_{on}": {**test, "on": on} for on in ("weight_average", "task_arithmetic", "ties")}
    inductive = {**every, "on": "adamerging_inductive", "data": "unlabelled train"}
    return {**MERGED, **others, "surgery_v2_inductive": inductive, "surgery_v2": {**test, "on": "adamerging"}}
