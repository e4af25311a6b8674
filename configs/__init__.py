"""Experiment configs: Python files with ``get_config(arg)``, run by ``python -m experiments.NAME --config=FILE[:ARGS]``."""
