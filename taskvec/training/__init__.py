"""Producing task vectors: frozen classification heads and fine-tuning."""
