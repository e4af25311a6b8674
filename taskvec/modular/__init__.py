"""Results of merging that are more than one tree of weights: corrections, masks, experts and routers a task or input."""
