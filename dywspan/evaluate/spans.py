"""The steps of a solver in a pipeline, and where the exact solution goes from each of their states."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.bases import BASES, from_data_prediction
from ..core.operator import Lift
from ..core.step import Schedule
from ..core.time_lift import TimeLift
from ..pipelines.rollout import Inputs, sample
from ..schedulers.plan import correction, without_variance
from ..schedulers.sources import Request, Source

SPACING = 3.0  # equal steps in sigma^(1/3): between uniform, as flow has it, and EDM's 7


@dataclass(frozen=True)
class Step:
    """One step in the solver's frame, (B, ...) float64 on the CPU.

    Attributes:
        state: x_i.
        derivatives: d_i, d_{i-1}, ..., all there are.
        base: what the scalar weights move the state by.
        alpha: what SpanLift multiplies that by.
        lifted: h_i beta_i R_phi, what SpanLift adds; None without a lift.
    """

    state: Tensor
    derivatives: Sequence[Tensor]
    base: Tensor
    alpha: float = 1.0
    lifted: Tensor | None = None

    @property
    def move(self) -> Tensor:
        """x_{i+1} - x_i. Source: SpanLift eq. (15)."""
        return self.alpha * self.base + (0 if self.lifted is None else self.lifted)


@contextmanager
def recorded(scheduler: Any, count: int) -> Iterator[list[Step]]:
    """The steps that a solver of this package takes within, of the first ``count`` samples of a batch."""
    steps: list[Step] = []
    derivatives: list[Tensor] = []
    data: list[Tensor] = []
    own = scheduler.step

    def kept(x: Tensor) -> Tensor:
        return x[:count].double().cpu()

    @functools.wraps(own)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        scaled, i = scheduler.state.scaled, scheduler.index_for_timestep(timestep)
        result = own(model_output, timestep, sample, *args, **kwargs)
        plan, row = scheduler.plan.detach(), i + scheduler.plan.skipped
        x = sample.float() * (plan.start if i == 0 and not scaled else 1.0)
        (p, q), scale, level = plan.estimates[row], plan.scales[row], float(plan.schedule.levels[row])
        x0 = p * x + q * without_variance(model_output, sample).float()
        x0 = x0 if plan.clip is None else plan.clip(x0)
        if plan.analytic is not None and i == 0:
            derivatives.append(plan.analytic * x)
        derivatives.append((x / scale - x0) / level)
        data.append(x0)
        values = data if plan.remembers_data else derivatives
        base = (plan.carries[row] - 1) * x / scale + sum(c * v for c, v in zip(plan.rows[row], reversed(values)))
        found = Step(kept(x / scale), [kept(d) for d in reversed(derivatives)], kept(base))
        if (lift := plan.lift) is not None:
            image = correction(lift, row, x, tuple(reversed(derivatives)), scheduler.request.latent_size)
            found = replace(found, alpha=lift.alpha[row], lifted=kept(lift.beta[row] * lift.sizes[row] * image))
        steps.append(found)
        return result

    scheduler.step = step
    try:
        yield steps
    finally:
        vars(scheduler).pop("step", None)


@dataclass(frozen=True, eq=False)
class Fixed(Source):
    """A schedule that is there already."""

    made: Schedule
    as_diffusers: bool = False

    def schedule(self, request: Request, begin: int = 0) -> Schedule:
        return self.made


def exact(levels: Sequence[float], substeps: int) -> Schedule:
    """Heun's method, ``substeps`` steps between each two levels."""
    parts = torch.linspace(0, 1, substeps + 1, dtype=torch.float64)
    roots = torch.tensor(levels, dtype=torch.float64).clamp(min=0) ** (1 / SPACING)
    inner = [((1 - parts) * a + parts * b)[:-1] for a, b in pairwise(roots)]
    return BASES["heun"].schedule(torch.cat([*inner, roots[-1:]]) ** SPACING, torch.ones(0), 1, False)


def going_on(schedule: Schedule, row: int, substeps: int) -> Schedule:
    """The solver up to a row, and the exact solution from there to the level where its step ends."""
    rest = exact(schedule.levels[row : row + 2].tolist(), substeps)
    rows = schedule.increments
    if schedule.carries is not None:  # of data predictions: the same steps as weights of derivatives
        weights = from_data_prediction(schedule.levels, rows / (1 - schedule.carries)[:, None])
        rows = schedule.sizes[:, None] * weights
    width = max(rows.shape[1], rest.increments.shape[1])
    increments = [pad(part, (0, width - part.shape[1])) for part in (rows[:row], rest.increments)]
    return Schedule(
        levels=torch.cat([schedule.levels[:row], rest.levels]),
        queries=torch.cat([schedule.queries[:row], rest.queries]),
        increments=torch.cat(increments),
        sizes=torch.cat([schedule.sizes[:row], rest.sizes]),
        afs=schedule.afs and row > 0,
    )


def with_schedule(scheduler: Any, schedule: Schedule, row: int) -> tuple[Any, int]:
    """A solver that takes this schedule, whose first ``row`` rows are its own, and the number of its evaluations."""
    other, count, steps = copy.copy(scheduler), len(schedule) - schedule.afs, scheduler.num_inference_steps
    source = Fixed(schedule, scheduler.source.as_diffusers)
    other._sources = lambda _: [source]
    own = lambda v, rest: torch.cat([v[:row], torch.full((len(schedule) - row,), rest, dtype=v.dtype)])  # noqa: E731
    if (plan := scheduler.plan).lift is not None:
        lift = plan.lift.lift
        other.lifts = {count: Lift(own(lift.alpha, 1.0), own(lift.beta, 0.0), lift.operator)}
    if steps in scheduler.time_lifts:
        told = row - plan.skipped if row else 0
        offsets: Mapping[str, Tensor] = scheduler.time_lifts[steps].offsets
        none = lambda v: v.new_zeros(count - told, *v.shape[1:])  # noqa: E731
        other.time_lifts = {count: TimeLift({k: torch.cat([v[:told], none(v)]) for k, v in offsets.items()})}
    return other, count


@torch.no_grad()
def run_of(
    pipe: Any, scheduler: Any, steps: int, inputs: Inputs, seeds: Sequence[int], call: Mapping[str, Any]
) -> tuple[list[Step], Tensor]:
    """The steps of a run, and its last state in the solver's frame."""
    with recorded(scheduler, len(inputs)) as found:
        end, _ = sample(pipe, scheduler, steps, inputs, seeds, call)
    return found, scheduler.plan.state_after(len(found) - 1, end).double().cpu()
