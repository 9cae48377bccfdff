"""Evaluation: solvers side by side, on the same prompts and noise."""
