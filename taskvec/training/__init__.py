"""Producing task vectors: frozen heads, recipes, what is trained (all, some, low-rank, sparse), fine-tuning."""
