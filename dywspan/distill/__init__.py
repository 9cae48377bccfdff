"""Learn a solver for a pipeline: ``SolverTrainer(pipe, DistillConfig(...)).train()``."""

from .config import DistillConfig
from .trainer import SolverTrainer

__all__ = ["DistillConfig", "SolverTrainer"]
