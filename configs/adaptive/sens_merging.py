"""Sens-Merging (ACL 2025, arXiv 2502.12420): coefficients by task and layer from sensitivities.

    python -m experiments.benchmark --config=configs/adaptive/sens_merging.py:arch=b32,suite=clip8

Settings of a third party's program, as the authors released none: up to 100 labelled rows per task, temperature 1,
norms as in `taskvec.adaptive.sens_merging`. The paper merges language models (instruction, mathematics, code); neither
its equations nor a number of it was seen, and our benchmark scores no such models with adaptive methods. Do not quote
these rows as the paper's.
"""

from configs import adaptive

ROWS = 100


def get_config(arg=None):
    """Arguments: those of `configs/clip.py`."""
    return adaptive.protocol("sens_merging", arg, rows, held_out=ROWS)


def rows(arg):
    """The rows of this method."""
    every = {"method": "sens_merging", "mode": "block", "temperature": 1.0, "data": "few labelled"}
    return {
        "sens_merging_within": {**every, "cross_task": None},
        "sens_merging": {**every, "cross_task": "distance"},
    }
