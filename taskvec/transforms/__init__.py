"""The transforms that merging methods are composed of, and `chain`; see `base.py` for their contract."""

from taskvec.transforms.base import Chain, Leaf, Measure, ModelInfo, Transform, chain
from taskvec.transforms.blocks import block_prune
from taskvec.transforms.by_name import sum_by_name
from taskvec.transforms.competition import compete
from taskvec.transforms.geometry import mean_on_sphere, model_stock, slerp
from taskvec.transforms.low_rank import keep_by_rules, keep_shared_and_ranks, keep_task_ranks, recentre
from taskvec.transforms.masks import consensus, elect_and_mask, keep_masked
from taskvec.transforms.overlap import largest_change, merge_overlap, weighted_disjoint_mean
from taskvec.transforms.plan import LeafPolicy
from taskvec.transforms.projected import project_descent
from taskvec.transforms.ranked import drop_by_rank
from taskvec.transforms.reduce import disjoint_max, disjoint_mean, keep_tasks, mean_tasks, sum_tasks, weigh
from taskvec.transforms.run import transform_task_vectors
from taskvec.transforms.scaling import restore_norm, scale, scale_by_depth
from taskvec.transforms.sce import select_calculate_erase
from taskvec.transforms.select import clip_entries, each_task, keep_band, keep_important
from taskvec.transforms.shared_basis import in_shared_basis, trim_present
from taskvec.transforms.signs import elect_signs
from taskvec.transforms.solve import end_interference, regress, weigh_by_fisher
from taskvec.transforms.sparsify import crumbs, drop, trim
from taskvec.transforms.spectral import (
    calibrate_spectrum,
    common_and_task_subspaces,
    flatten_spectrum,
    merge_singular_vectors,
)
from taskvec.transforms.views import split_view
from taskvec.transforms.weighting import mean_of, norm_weighting, swap_layers

__all__ = [
    "Chain",
    "Leaf",
    "LeafPolicy",
    "Measure",
    "ModelInfo",
    "Transform",
    "block_prune",
    "calibrate_spectrum",
    "chain",
    "clip_entries",
    "common_and_task_subspaces",
    "compete",
    "consensus",
    "crumbs",
    "disjoint_max",
    "disjoint_mean",
    "drop",
    "drop_by_rank",
    "each_task",
    "elect_and_mask",
    "elect_signs",
    "end_interference",
    "flatten_spectrum",
    "in_shared_basis",
    "keep_band",
    "keep_by_rules",
    "keep_important",
    "keep_masked",
    "keep_shared_and_ranks",
    "keep_task_ranks",
    "keep_tasks",
    "largest_change",
    "mean_of",
    "mean_on_sphere",
    "mean_tasks",
    "merge_overlap",
    "merge_singular_vectors",
    "model_stock",
    "norm_weighting",
    "project_descent",
    "recentre",
    "regress",
    "restore_norm",
    "scale",
    "scale_by_depth",
    "select_calculate_erase",
    "slerp",
    "split_view",
    "sum_by_name",
    "sum_tasks",
    "swap_layers",
    "transform_task_vectors",
    "trim",
    "trim_present",
    "weigh",
    "weigh_by_fisher",
    "weighted_disjoint_mean",
]
