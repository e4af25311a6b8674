"""ProDistill (ICML 2025, arXiv 2502.12706): block by block, the merged block imitates every expert's.

    python -m experiments.benchmark --config=configs/adaptive/prodistill.py:arch=b32,suite=clip8

Settings of the released code: a coefficient per entry, start 0.3, 64 unlabelled training rows per task, 100 epochs of
Adam 0.01, 128 rows per step; task arithmetic at 0.3 outside the blocks. One coefficient per tensor or block are its
options.

| 8 tasks | protocol | B/32 | B/16 | L/14 |
| --- | --- | ---: | ---: | ---: |
| prodistill | A [2nd] | 86.0 | 88.9 | 91.9 |

The authors' README warns that in AdaMerging's copy of DTD the validation and test folders have changed names.
"""

from configs import adaptive


def get_config(arg=None):
    """Arguments: those of `configs/clip.py`."""
    return adaptive.protocol("prodistill", arg, rows)


def rows(arg):
    """The rows of this method."""
    every = {
        "method": "prodistill", "init": 0.3, "outside": 0.3, "shots": 64, "epochs": 100, "batch_size": 128,
        "learning_rate": 1e-2, "data": "unlabelled train",
    }  # fmt: skip
    modes = {"prodistill_tensor": "tensor", "prodistill_block": "task", "prodistill": "element"}
    return {label: {**every, "mode": mode} for label, mode in modes.items()}
