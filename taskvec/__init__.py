"""taskvec: task vectors and adaptive model merging in JAX.

One pretrained model and several fine-tuned copies of it give task vectors (fine-tuned minus pretrained); chains of
small pure transforms turn them into one model that does all the tasks.
"""

from taskvec._version import __version__ as __version__
from taskvec.merging import merge, methods
from taskvec.transforms import (
    LeafPolicy,
    chain,
    consensus,
    crumbs,
    disjoint_max,
    disjoint_mean,
    drop,
    elect_signs,
    mean_tasks,
    merge_singular_vectors,
    scale,
    scale_by_depth,
    sum_tasks,
    transform_task_vectors,
    trim,
)
from taskvec.vectors import task_vectors

__all__ = [
    "LeafPolicy",
    "chain",
    "consensus",
    "crumbs",
    "disjoint_max",
    "disjoint_mean",
    "drop",
    "elect_signs",
    "mean_tasks",
    "merge",
    "merge_singular_vectors",
    "methods",
    "scale",
    "scale_by_depth",
    "sum_tasks",
    "task_vectors",
    "transform_task_vectors",
    "trim",
]
