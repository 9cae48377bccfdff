"""Distillation: learn a solver for a pipeline through the pipeline's own ``__call__``."""
