"""Scoring merge results: accuracies, result rows, protocols and standard errors."""
