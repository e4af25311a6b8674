"""Adaptive merging: a parametrisation, an objective, unlabelled or labelled rows, and one loop (`fit`)."""

import taskvec.modular  # noqa: F401  (registers the methods whose results depend on the task)
from taskvec.adaptive import registry
from taskvec.adaptive.adamerging import adamerging
from taskvec.adaptive.adarank import adarank
from taskvec.adaptive.atlas import atlas, atlas_negation
from taskvec.adaptive.atlas_few_shot import atlas_few_shot
from taskvec.adaptive.atlas_ufm import atlas_ufm
from taskvec.adaptive.concrete import concrete_adamerging, concrete_task_arithmetic
from taskvec.adaptive.divmerge import divmerge
from taskvec.adaptive.fw_merging import fw_hard, fw_soft
from taskvec.adaptive.lorahub import lorahub
from taskvec.adaptive.prodistill import prodistill
from taskvec.adaptive.samerging import samerging
from taskvec.adaptive.self_positioning import self_positioning
from taskvec.adaptive.sens_merging import sens_merging
from taskvec.adaptive.supermerge import supermerge
from taskvec.adaptive.symerge import symerge

registry.register(adamerging)
registry.register(
    adarank, concrete_adamerging, concrete_task_arithmetic, divmerge, samerging, symerge, fw_hard, fw_soft, prodistill
)
registry.register(atlas, atlas_negation, atlas_few_shot, atlas_ufm, lorahub)
registry.register(self_positioning, sens_merging, supermerge)
