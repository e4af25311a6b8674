"""Experiment configs: Python files with ``get_config(arg)``, chosen by ``--config=configs/FILE.py[:ARGS]``."""
