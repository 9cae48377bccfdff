"""Learn a solver for a pipeline: ``SolverTrainer(pipe, DistillConfig(...)).train()``."""

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .config import DistillConfig
    from .trainer import SolverTrainer

__all__ = ["DistillConfig", "SolverTrainer"]

__getattr__, __dir__ = attach(
    __name__, {"DistillConfig": "dywspan.distill.config", "SolverTrainer": "dywspan.distill.trainer"}
)
