"""Learned few-step solvers for diffusion and flow models: drop-in schedulers for Hugging Face diffusers."""

# diffusers looks for SchedulerMixin in the package a saved pipeline names; without it a reload fails.
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .core.table import SolverTable
from .schedulers.apply import apply, load
from .schedulers.bind import bind
from .schedulers.dyweight import DyWeightScheduler
from .schedulers.spanlift import SpanLiftScheduler
from .tuning import tune
from .version import __version__

__all__ = [
    "DyWeightScheduler",
    "SchedulerMixin",
    "SolverTable",
    "SpanLiftScheduler",
    "__version__",
    "apply",
    "bind",
    "load",
    "tune",
]
