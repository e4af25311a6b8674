"""SuperMerge (2024, arXiv 2412.10416): tanh-bounded coefficients from a few labelled rows, at once or in groups.

    python -m experiments.benchmark --config=configs/adaptive/supermerge.py:arch=b32,suite=clip8

Published: T0-3B with IA3 on 11 tasks, 32 labelled rows in all; in groups, peak memory falls from 130.4 to 32.7 GB
[2nd]. Start, optimiser, rate, steps and batch were not seen and are ours. No accuracy was seen.

Our benchmark cannot run T0-3B, which writes its answers. Here: image tasks, 4 rows each (32 in all for 8 tasks). In
groups of at most four, two groups at least, the merged models are merged in turn. Held task vectors are all on the
device in this benchmark: it does not show the memory that groups save.
"""

import numpy as np

from configs import adaptive, clip

ROWS = 4


def get_config(arg=None):
    """Arguments: those of `configs/clip.py`."""
    return adaptive.protocol("supermerge", arg, rows, held_out=ROWS)


def rows(arg):
    """The rows of this method."""
    every = {"mode": "tensor", "init": 0.3, "steps": 500, "learning_rate": 1e-3, "per_task": ROWS}
    every |= {"method": "supermerge", "data": "few labelled"}
    numbers = tuple(range(len(clip.tasks_of(arg))))
    parts = np.array_split(numbers, max(2, -(-len(numbers) // 4)))
    groups = tuple(tuple(part.tolist()) for part in parts)
    return {"supermerge_groups": {**every, "groups": groups}, "supermerge": {**every, "groups": None}}
