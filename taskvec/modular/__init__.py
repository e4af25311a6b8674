"""Results of merging that depend on the task or the input: corrections of features, masks, experts, routers."""

from taskvec.adaptive import registry
from taskvec.modular import surgery, surgery_v2

# The names of the package stay those of the modules.
registry.register(surgery.surgery, surgery_v2.surgery_v2)
