"""Representation Surgery (Yang et al., ICML 2024, arXiv 2402.02705) on four merged models.

    python -m experiments.benchmark --config=configs/adaptive/surgery.py:arch=b32,suite=clip8

Settings of the released code: rank 16, Adam 1e-3, 500 iterations of two batches of 16 test rows per task, a step after
each: 1000 steps. The paper's form is not centred. Below: task arithmetic and TIES (the sum of what agrees) at 0.3,
layer-wise AdaMerging of 32 rows per task in a step, as the released code's two batches are. ``surgery_online``: the
authors' online variant, every test row once and alone. ``surgery_fusion_bench``: on features of unit norm, with one
batch a task and iteration, 1000 iterations, after FusionBench's AdaMerging; no number of it was seen.
``surgery_inductive`` and the AdaMerging that it stands on see held-out training rows.

| 8 tasks | protocol | B/32 | B/16 | L/14 |
| --- | --- | ---: | ---: | ---: |
| surgery_weight_average | A [log] | 80.0 | 82.7 | 86.0 |
| surgery_task_arithmetic | A [log] | 80.9 | 85.0 | 89.1 |
| surgery_ties | A [log] | 83.2 | 86.1 | 89.3 |
| surgery | A [log] | 86.1 | 88.9 | 92.3 |

Later papers have 87.5 for the last row on B/32, with a larger rank; 14 and 20 tasks: B/32 84.6, 84.5, L/14 90.4, 89.5
(SyMerge's page). The authors' weight average leaves out the eighth task, ours does not.
"""

from configs import adaptive, common

_ADAMERGING = {
    "method": "adamerging", "mode": "tensor", "plus_plus": False, "constraint": "clip", "init": 0.3, "steps": 500,
    "learning_rate": 1e-3, "per_task": 32,
}  # fmt: skip
_FUSION_BENCH = {"constraint": "identity", "steps": 1000, "per_task": 16, "entropy_eps": 1e-8, "order": "epochs"}
MERGED = {
    "task_arithmetic": {"scale": 0.3},
    "ties": {"scale": 0.3, **common.FUSION_BENCH_TIES},
    "adamerging": {**_ADAMERGING, "data": "unlabelled test"},
    "adamerging_inductive": {**_ADAMERGING, "data": "unlabelled train"},
}


def get_config(arg=None):
    """Arguments: those of `configs/clip.py`."""
    return adaptive.protocol("surgery", arg, rows)


def rows(arg):
    """The rows of this method, and those that it stands on."""
    every = {"method": "surgery", "rank": 16, "learning_rate": 1e-3}
    published = {**every, "center": False, "steps": 1000, "per_task": 16, "data": "unlabelled test"}
    others = {f"surgery_{on}": {**published, "on": on} for on in ("weight_average", "task_arithmetic", "ties")}
    ada = {**published, "on": "adamerging"}
    return {
        **MERGED,
        "adamerging_fusion_bench": {**_ADAMERGING, **_FUSION_BENCH, "data": "unlabelled test"},
        **others,
        "surgery_inductive": {**published, "on": "adamerging_inductive", "data": "unlabelled train"},
        "surgery_online": {**every, "on": "adamerging", "once": True, "data": "unlabelled test"},
        "surgery_fusion_bench": {**published, "on": "adamerging_fusion_bench", "normalise": True},
        "surgery": ada,
    }
