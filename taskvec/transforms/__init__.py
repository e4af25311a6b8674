"""The transforms that merging methods are composed of, and `chain`; see `base.py` for their contract."""

from taskvec.transforms.base import Chain, Leaf, Measure, ModelInfo, Transform, chain
from taskvec.transforms.masks import consensus
from taskvec.transforms.reduce import disjoint_max, disjoint_mean, mean_tasks, sum_tasks
from taskvec.transforms.run import LeafPolicy, transform_task_vectors
from taskvec.transforms.scaling import scale, scale_by_depth
from taskvec.transforms.signs import elect_signs
from taskvec.transforms.sparsify import crumbs, drop, trim
from taskvec.transforms.spectral import merge_singular_vectors

__all__ = [
    "Chain",
    "Leaf",
    "LeafPolicy",
    "Measure",
    "ModelInfo",
    "Transform",
    "chain",
    "consensus",
    "crumbs",
    "disjoint_max",
    "disjoint_mean",
    "drop",
    "elect_signs",
    "mean_tasks",
    "merge_singular_vectors",
    "scale",
    "scale_by_depth",
    "sum_tasks",
    "transform_task_vectors",
    "trim",
]
