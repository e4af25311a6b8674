"""Mains: ``python -m experiments.NAME --config=configs/FILE.py[:ARGS] --workdir=DIR``."""
