"""Published data-free methods: each a chain of transforms with its published defaults and a card."""

from taskvec.merging.api import merge
from taskvec.merging.arcee_fusion import arcee_fusion
from taskvec.merging.breadcrumbs import breadcrumbs
from taskvec.merging.cabs import cabs
from taskvec.merging.cart import cart
from taskvec.merging.coefficients import coefficients
from taskvec.merging.consensus import consensus_ta, consensus_ties
from taskvec.merging.copa import copa
from taskvec.merging.culturemert import culturemert
from taskvec.merging.dare import dare, dare_ties
from taskvec.merging.della import della
from taskvec.merging.doge import doge
from taskvec.merging.elm import elm
from taskvec.merging.emr import emr
from taskvec.merging.fisher import fisher
from taskvec.merging.graftllm import graft_compress
from taskvec.merging.iso import iso_c, iso_cts
from taskvec.merging.karcher import karcher
from taskvec.merging.knots import knots_dare_ties, knots_ties
from taskvec.merging.layer_swapping import layer_swapping
from taskvec.merging.lines import lines, lines_edit, lines_ties
from taskvec.merging.lt_sft import lt_sft
from taskvec.merging.magmax import magmax
from taskvec.merging.magnitude_pruning import magnitude_pruning
from taskvec.merging.metagpt import metagpt
from taskvec.merging.model_stock import model_stock
from taskvec.merging.nearswap import nearswap
from taskvec.merging.pcb import pcb
from taskvec.merging.ram import ram, ram_plus
from taskvec.merging.registry import Card, Method, method, methods, register
from taskvec.merging.regmean import regmean, regmean_plusplus
from taskvec.merging.results import PerTask
from taskvec.merging.sce import sce
from taskvec.merging.search import pcb_search, soup_search
from taskvec.merging.slerp import multi_slerp, nuslerp, slerp
from taskvec.merging.stream_plan import plan_streamed
from taskvec.merging.streamed import merge_streamed
from taskvec.merging.svc import svc_ta
from taskvec.merging.tall_masks import tall_masks, tall_masks_ties
from taskvec.merging.task_arithmetic import task_analogy, task_arithmetic, task_negation
from taskvec.merging.ties import ties
from taskvec.merging.tsv import tsv_compress, tsv_m
from taskvec.merging.twin import twin_compress
from taskvec.merging.weight_average import checkpoint_average, run_average, weight_average
from taskvec.merging.wudi import wudi

# The one place where the registry is filled.
register(
    weight_average,
    checkpoint_average,
    run_average,
    task_arithmetic,
    task_negation,
    task_analogy,
    coefficients,
    metagpt,
    elm,
    culturemert,
    layer_swapping,
    ties,
    dare,
    dare_ties,
    breadcrumbs,
    lines,
    lines_ties,
    lines_edit,
    consensus_ta,
    consensus_ties,
    tall_masks,
    tall_masks_ties,
    emr,
    tsv_m,
    tsv_compress,
    iso_c,
    iso_cts,
    knots_ties,
    knots_dare_ties,
    cart,
    svc_ta,
    twin_compress,
    graft_compress,
    magnitude_pruning,
    della,
    pcb,
    cabs,
    magmax,
    sce,
    ram,
    ram_plus,
    lt_sft,
    regmean,
    regmean_plusplus,
    fisher,
    wudi,
    doge,
    slerp,
    nuslerp,
    multi_slerp,
    karcher,
    model_stock,
    nearswap,
    arcee_fusion,
    copa,
    soup_search,
    pcb_search,
)

__all__ = ["Card", "Method", "PerTask", "merge", "merge_streamed", "method", "methods", "plan_streamed", "register"]
