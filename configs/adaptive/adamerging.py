"""AdaMerging (Yang et al., ICLR 2024, arXiv 2310.02575): task-wise, layer-wise, both ++.

    python -m experiments.benchmark --config=configs/adaptive/adamerging.py:arch=b32,suite=clip8

Settings of the paper: start 0.3, clamped to [0, 1], Adam 1e-3, 500 steps, 16 test rows per task. The released code sums
two such batches in a step, which but for Adam's epsilon is 32 rows, and has rules of its own for ++: the rows
``_as_released``, of which the authors' numbers are. FusionBench: 1000 steps, one batch, rows in epochs, no clamp, log(p
+ 1e-8): the last row, which is the one to compare, as the checkpoints are its own.

| 8 tasks | protocol | B/32 | B/16 | L/14 |
| --- | --- | ---: | ---: | ---: |
| adamerging_taskwise_as_released | A [log] | 71.1 | | |
| adamerging_taskwise_pp_as_released | A [log] | 73.8 | | |
| adamerging_as_released | A [log]; L/14 [2nd] | 80.2 | | 90.8 |
| adamerging_pp_as_released | A [log]; L/14 [2nd] | 81.2 | | 91.0 |
| adamerging_taskwise_fusion_bench | A' [page] | 68.7 | | 80.1 |
| adamerging_fusion_bench | A' [page] | 82.6 | 85.0 | 91.0 |

14 and 20 tasks, layer-wise, as SyMerge's page has them: B/32 76.7, 69.6, L/14 85.2, 82.1. No number of an inductive run
was seen. In the authors' copy of DTD the validation and test folders have changed names, says ProDistill's README.
"""

from configs import adaptive


def get_config(arg=None):
    """Arguments: those of `configs/clip.py`."""
    return adaptive.protocol("adamerging", arg, rows)


def rows(arg):
    """The rows of this method."""
    common = {"method": "adamerging", "init": 0.3, "learning_rate": 1e-3, "per_task": 16}
    paper = {**common, "constraint": "clip", "steps": 500}
    test = {"data": "unlabelled test"}
    released = {**paper, "per_task": 32, **test}
    fusion_bench = {**common, "constraint": "identity", "steps": 1000, "entropy_eps": 1e-8, "order": "epochs", **test}
    return {
        **adaptive.transductive_and_not("adamerging", **paper, mode="tensor", plus_plus=False),
        "adamerging_taskwise": {**paper, "mode": "task", "plus_plus": False, **test},
        "adamerging_taskwise_pp": {**paper, "mode": "task", "plus_plus": True, **test},
        "adamerging_pp": {**paper, "mode": "tensor", "plus_plus": True, **test},
        "adamerging_taskwise_as_released": {**released, "mode": "task", "plus_plus": False},
        "adamerging_taskwise_pp_as_released": {**released, "mode": "task", "plus_plus": "released"},
        "adamerging_as_released": {**released, "mode": "tensor", "plus_plus": False},
        "adamerging_pp_as_released": {**released, "mode": "tensor", "plus_plus": "released"},
        "adamerging_taskwise_fusion_bench": {**fusion_bench, "mode": "task", "plus_plus": False},
        "adamerging_fusion_bench": {**fusion_bench, "mode": "tensor", "plus_plus": False},
    }
