"""Seconds and memory beside a peer or a floor: ``python -m benchmarks.merge`` and others."""
