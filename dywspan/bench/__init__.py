"""Benches: what learning takes, and what a solver adds to a pipeline, in time, memory and evaluations."""
