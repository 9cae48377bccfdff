"""The slow, accurate solver that students are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from ..core.bases import BASES
from ..schedulers.dyweight import DyWeightScheduler
from .rollout import Inputs, sample, set_timesteps


@dataclass(frozen=True)
class Teacher:
    """A scheduler and its number of steps: what students are compared with.

    Attributes:
        scheduler: any diffusers or dywspan scheduler that integrates the ODE.
        num_inference_steps: M, much more than any student's.
        substeps: also keep the state after every so many steps, for path supervision; 0: the end only.
    """

    scheduler: Any
    num_inference_steps: int
    substeps: int = 0

    def summary(self) -> dict[str, Any]:
        """What a reader wants to know of it."""
        known = {k: self.scheduler.config[k] for k in ("solver", "solver_order", "grid") if k in self.scheduler.config}
        return {"scheduler": type(self.scheduler).__name__, "steps": self.num_inference_steps, **known}

    def describe(self) -> dict[str, Any]:
        """All that determines its endpoints; a setting that is None counts as left out, as older versions have it."""
        own = self.scheduler.config.items()
        config = {k: v for k, v in own if not k.startswith("_") and k != "dywspan_version" and v is not None}
        name, steps = type(self.scheduler).__name__, self.num_inference_steps
        return {"class": name, "steps": steps, "substeps": self.substeps, "config": config}

    @torch.no_grad()
    def endpoints(self, pipe: Any, inputs: Inputs, seeds: Sequence[int], call: Mapping[str, Any]) -> Tensor:
        """(B, ...) float32 on the CPU; with ``substeps`` (B, N, ...), the states of a path in the solver frame."""
        path: list[Tensor] = []

        def watch(i: int, prev_sample: Tensor) -> None:
            if self.substeps and (i + 1) % self.substeps == 0:
                path.append(self.scheduler.plan.state_after(i, prev_sample).float().cpu())

        end, _ = sample(pipe, self.scheduler, self.num_inference_steps, inputs, seeds, call, watch=watch)
        return torch.stack([*path[:-1], end.float().cpu()], 1) if path else end.float().cpu()


def find_teacher(pipe: Any, name: str, steps: int, order: int = 2, grid: Mapping[str, Any] | None = None) -> Teacher:
    """A base solver or any diffusers scheduler; a grid that ends above zero gets a last evaluation that denoises."""
    if name not in BASES:
        kind = getattr(diffusers, name, None)
        if kind is None or not name.endswith("Scheduler"):
            raise ValueError(
                f"Unknown teacher {name!r}: use one of {sorted(BASES)}, or the name of a diffusers scheduler."
            )
        return Teacher(kind.from_config(pipe.scheduler.config), steps)
    solver = {"solver": name, "solver_order": order}
    scheduler = DyWeightScheduler.from_config(pipe.scheduler, grid=grid, **solver)
    set_timesteps(scheduler, steps)
    assert scheduler.plan is not None and scheduler.request is not None
    if float(scheduler.plan.schedule.levels[-1]) == 0:
        return Teacher(scheduler, steps)
    ended = {"sigmas": [*scheduler.request.levels(grid).tolist(), 0.0]}
    return Teacher(DyWeightScheduler.from_config(pipe.scheduler, grid=ended, **solver), steps + 1)
