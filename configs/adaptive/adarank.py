"""AdaRank (ICLR 2026, arXiv 2503.22178): rank masks and coefficients, on task arithmetic and on CART.

    python -m experiments.benchmark --config=configs/adaptive/adarank.py:arch=b32,suite=clip8

Settings of the released code: Adam 1e-3 for both, 10,000 steps, temperature 10, no clamp, 16 test rows per task (L/14:
4; 20 tasks on L/14: 2 and 100,000 steps). Task arithmetic starts at 0.3 with all ranks; CART's start is in `CART`. Not
seen, and taken from what is nearest: CART's start for B/16 (B/32's) and for 14 tasks on L/14 (8 tasks').

| 8 tasks | protocol | B/32 | L/14 |
| --- | --- | ---: | ---: |
| adarank | A, L/14 other checkpoints [2nd] | 87.9 | 93.0 |
| adarank_cart | A, L/14 other checkpoints [2nd] | 89.2 | 93.5 |

The authors report the best of periodic evaluations on the test rows, here the last step counts; their 14 and 20 tasks
are those of B. Not here: AdaRank on TSV-M (88.9 on B/32 [2nd]) and on Iso-CTS (89.4, to be confirmed).
"""

from configs import adaptive

CART = {  # (architecture, suite) -> start of the coefficients, ranks kept at the start
    ("b32", "clip8"): (2.3, 0.16), ("b32", "clip14"): (2.8, 0.32), ("b32", "clip20"): (2.4, 0.32),
    ("l14", "clip8"): (3.0, 0.16), ("l14", "clip14"): (3.0, 0.16), ("l14", "clip20"): (1.0, 0.16),
}  # fmt: skip


def get_config(arg=None):
    """Arguments: those of `configs/clip.py`."""
    return adaptive.protocol("adarank", arg, rows)


def rows(arg):
    """The rows of this method."""
    large = arg.arch == "l14"
    many = large and arg.suite == "clip20"
    init, kept = CART["l14" if large else "b32", arg.suite]
    every = {
        "method": "adarank", "mode": "tensor", "constraint": "identity", "temperature": 10.0, "learning_rate": 1e-3,
        "steps": 100000 if many else 10000, "per_task": 2 if many else 4 if large else 16,
    }  # fmt: skip
    return {
        **adaptive.transductive_and_not("adarank", **every, base="pretrained", init=0.3, kept=1.0),
        **adaptive.transductive_and_not("adarank_cart", **every, base="average", init=init, kept=kept),
    }
