"""SAMerging (2025, arXiv 2512.21288): distillation from all experts with sharpness-aware steps.

    python -m experiments.benchmark --config=configs/adaptive/samerging.py:arch=b32,suite=clip8

Settings of the released configuration: KL at temperature 2, rho 0.07, weight decay 5e-4, start 0, no clamp, Adam 1e-3,
10 epochs of 100 steps, 16 rows per task. ``samerging_as_released``: that code's SAM has no effect, which is rho = 0;
its other losses are ``objective`` (jsd, cross_entropy, entropy). Not reproduced: it makes 100 batches, 1600 rows per
task, and goes through them ten times; here all rows are taken in epochs. Its other configuration, of Adam without
decay, starts at 0.3 and takes 2500 steps.

No published number was seen.
"""

from configs import adaptive


def get_config(arg=None):
    """Arguments: those of `configs/clip.py`."""
    return adaptive.protocol("samerging", arg, rows)


def rows(arg):
    """The rows of this method."""
    every = {
        "method": "samerging", "temperature": 2.0, "adaptive": False, "mode": "tensor", "constraint": "identity",
        "init": 0.0, "steps": 1000, "learning_rate": 1e-3, "weight_decay": 5e-4, "per_task": 16,
    }  # fmt: skip
    return {
        "samerging_as_released": {**every, "rho": 0.0, "data": "unlabelled test"},
        **adaptive.transductive_and_not("samerging", **every, rho=0.07),
    }
