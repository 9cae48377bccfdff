"""Learned few-step solvers for diffusion and flow models: drop-in schedulers for Hugging Face diffusers."""

from typing import TYPE_CHECKING

from .lazy import attach
from .version import __version__

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from .core.table import SolverTable
    from .schedulers.apply import apply, load
    from .schedulers.bind import bind
    from .schedulers.dyweight import DyWeightScheduler
    from .schedulers.spanlift import SpanLiftScheduler
    from .tuning import tune

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

# torch and diffusers take seconds to import, which `dywspan --help` does not wait for.
__getattr__, __dir__ = attach(
    __name__,
    {
        "DyWeightScheduler": "dywspan.schedulers.dyweight",
        # diffusers looks for SchedulerMixin in the package a saved pipeline names; without it a reload fails.
        "SchedulerMixin": "diffusers.schedulers.scheduling_utils",
        "SolverTable": "dywspan.core.table",
        "SpanLiftScheduler": "dywspan.schedulers.spanlift",
        "apply": "dywspan.schedulers.apply",
        "bind": "dywspan.schedulers.bind",
        "load": "dywspan.schedulers.apply",
        "tune": "dywspan.tuning",
    },
)
