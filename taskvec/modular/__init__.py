"""Results of merging that depend on the task or the input: corrections of features, masks, experts, routers."""
