"""Concrete subspace learning (Tang et al. 2023, arXiv 2312.06173): Concrete task arithmetic and Concrete AdaMerging.

    python -m experiments.benchmark --config=configs/adaptive/concrete.py:arch=b32,suite=clip8

Settings of the released code: mask logits from 0, temperature 0.5, Adam 1e-3, 2000 steps, 16 test rows per task; task
arithmetic at 0.3; AdaMerging's inner Adam has rate 1 and coefficients clamped to [0, 1], the second stage 1000 steps of
1e-3. FusionBench: 1000 steps for AdaMerging's masks, no clamp, one draw of the mask for both moves, log(p + 1e-8). One
sampled mask is scored, so that accuracies vary with the seed.

In either code the first inner gradient of a step is that at the model of the step before, where the coefficients are
not reset yet. The rows ``_as_released`` and ``_fusion_bench`` do so too, the others do not. One mask for scoring, the
inner rate of 1 and moments that stay while coefficients start anew are the released code's in all rows: of these the
paper's form was not seen.

| 8 tasks | protocol | B/32 | L/14 |
| --- | --- | ---: | ---: |
| concrete_task_arithmetic | A [log] | 77.3 | 87.4 |
| concrete_adamerging_taskwise_as_released: after the masks, at the end | A [log] | 77.7, 76.2 | |
| concrete_adamerging_as_released: after the masks, at the end | A [log] | 83.4, 84.0 | 91.1 |
| concrete_task_arithmetic_fusion_bench | A' [page] | 77.6 | |
| concrete_adamerging_fusion_bench | A' [page] | 84.4 | |
"""

from configs import adaptive


def get_config(arg=None):
    """Arguments: those of `configs/clip.py`."""
    return adaptive.protocol("concrete", arg, rows)


def rows(arg):
    """The rows of both methods."""
    mask = {"temperature": 0.5, "mask_init": 0.0, "eval_mask": "sample", "learning_rate": 1e-3, "per_task": 16}
    both = {
        **mask, "method": "concrete_adamerging", "init": 0.3, "inner_learning_rate": 1.0, "coefficient_steps": 1000,
        "coefficient_learning_rate": 1e-3,
    }  # fmt: skip
    paper = {**both, "constraint": "clip", "fresh_mask": True, "steps": 2000}
    released = {**paper, "stale_gradient": True}
    fusion_bench = {**both, "constraint": "identity", "fresh_mask": False, "stale_gradient": True, "steps": 1000}
    test, eps = {"data": "unlabelled test"}, {"entropy_eps": 1e-8}
    arithmetic = {**mask, "method": "concrete_task_arithmetic", "scale": 0.3, "steps": 2000}
    return {
        **adaptive.transductive_and_not("concrete_task_arithmetic", **arithmetic),
        "concrete_task_arithmetic_fusion_bench": {**arithmetic, **eps, **test},
        **adaptive.transductive_and_not("concrete_adamerging", **paper, mode="tensor"),
        "concrete_adamerging_taskwise": {**paper, "mode": "task", **test},
        "concrete_adamerging_taskwise_as_released": {**released, "mode": "task", **test},
        "concrete_adamerging_as_released": {**released, "mode": "tensor", **test},
        "concrete_adamerging_fusion_bench": {**fusion_bench, **eps, "mode": "tensor", **test},
    }
