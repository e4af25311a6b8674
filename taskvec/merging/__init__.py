"""Published data-free methods: each a chain of transforms with its published defaults and a card."""

from taskvec.merging.api import merge, merge_streamed
from taskvec.merging.breadcrumbs import breadcrumbs
from taskvec.merging.consensus import consensus_ta, consensus_ties
from taskvec.merging.dare import dare, dare_ties
from taskvec.merging.lines import lines, lines_ties
from taskvec.merging.registry import Card, Method, method, methods, register
from taskvec.merging.task_arithmetic import task_analogy, task_arithmetic, task_negation
from taskvec.merging.ties import ties
from taskvec.merging.tsv_m import tsv_m
from taskvec.merging.weight_average import weight_average

# The one place where the registry is filled.
register(
    weight_average,
    task_arithmetic,
    task_negation,
    task_analogy,
    ties,
    dare,
    dare_ties,
    breadcrumbs,
    lines,
    lines_ties,
    consensus_ta,
    consensus_ties,
    tsv_m,
)

__all__ = ["Card", "Method", "merge", "merge_streamed", "method", "methods", "register"]
