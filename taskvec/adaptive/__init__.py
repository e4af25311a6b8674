"""Adaptive merging: a parametrisation, an objective, unlabelled or labelled batches, and one loop (`fit`)."""
