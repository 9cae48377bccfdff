"""Where a schedule comes from: a learned table, a continuous function, or a classical solver. One protocol."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.bases import BASES
from ..core.continuous import ContinuousTable
from ..core.grid import make_grid
from ..core.layout import Size
from ..core.step import Schedule
from ..core.table import SolverTable, check_convention
from .hosts import Host


@dataclass(frozen=True, eq=False)
class Request:
    """What a pipeline asked for.

    Attributes:
        steps: N.
        host: of the pipeline.
        mu: its resolution-dependent shift.
        custom: the levels of the sigmas or timesteps that it gave, or why they make none.
        guidance_scale: what it guides by; None: what a solver was learned around.
        whole: the run is the end of one of this many steps; None: it is all of it.
        latent_size: height and width of packed tokens, from the first step on; None: a square.
    """

    steps: int
    host: Host
    mu: float | None = None
    custom: Tensor | ValueError | None = None
    guidance_scale: float | None = None
    whole: int | None = None
    latent_size: Size | None = None

    def levels(self, grid: Mapping[str, Any] | None) -> Tensor:
        """The nominal grid: the custom one, ``grid``, or the host's default."""
        if isinstance(self.custom, ValueError):
            raise self.custom
        if self.custom is not None and self.whole is None:
            return self.custom
        steps = self.whole or self.steps
        if grid is None:
            return self.host.grid(steps, mu=self.mu)
        return make_grid(grid, steps, self.host.prediction, self.host.shift(self.mu))


def asked(host: Host, steps: int | None, timesteps: Any, sigmas: Any, mu: float | None) -> Request:
    """What the arguments of ``set_timesteps`` ask for.

    Raises:
        ValueError: no number of steps, several, or times apart from levels.
    """
    if timesteps is not None and sigmas is not None:
        raise ValueError(
            "Times apart from levels (timesteps and sigmas given together, as CogView4 and GLM-Image do) are not "
            "supported: the network's time must follow from its noise level. Give one of them."
        )
    custom, count, values = None, steps, timesteps if sigmas is None else sigmas
    if values is not None:
        try:
            custom = host.grid(None, sigmas, timesteps, mu)
            count = len(custom) - 1
        except ValueError as error:  # which does not matter to a table
            custom, ends = error, sigmas is not None and len(sigmas) > 0 and float(sigmas[-1]) == 0
            count = len(values) - ends
    try:
        count = operator.index(count or 0)
    except TypeError:
        raise ValueError(f"num_inference_steps must be a whole number; got {steps!r}.") from None
    if count < 1:
        raise ValueError(f"num_inference_steps must be at least 1; got {steps}.")
    if steps is not None and count != steps:
        raise ValueError(f"num_inference_steps={steps}, but the custom grid has {count} steps: leave one out.")
    return Request(count, host, mu, custom)


class LateStart(ValueError):
    """A run would begin at a step that its plan was not made for.

    Attributes:
        begin: that step.
    """

    def __init__(self, begin: int) -> None:
        self.begin = begin
        super().__init__(
            f"This run begins at step {begin}, and a continuous solver is written for the levels that are left: bind "
            "the pipeline, pipe = dywspan.bind(pipe). In a loop of your own, call scheduler.begin_at(step) after "
            "set_timesteps, and take scheduler.timesteps from there on. Modular pipelines cannot: use tables there."
        )


class Source(ABC):
    """One way to a schedule.

    Attributes:
        as_diffusers: its runs start and end as diffusers' do, see :func:`dywspan.schedulers.plan.make_plan`.
        builds_up: its rows are others where a run begins later, at the same levels and times.
        written_for: it is another solver where a run begins later, with levels and times of its own.
    """

    as_diffusers = False
    builds_up = False
    written_for = False

    @abstractmethod
    def schedule(self, request: Request, begin: int = 0) -> Schedule:
        """All N steps, for a run that begins at step ``begin``."""

    def detach(self) -> Source:
        """The same numbers, without their graph."""
        return self


@dataclass(frozen=True, eq=False)
class TableSource(Source):
    """A learned table. In a run that begins later, missing history gives its weight to the oldest derivative."""

    table: SolverTable

    def schedule(self, request: Request, begin: int = 0) -> Schedule:
        return self.table.schedule(request.host.prediction, request.host.shift(request.mu))

    def detach(self) -> Source:
        numbers = {name: getattr(self.table, name).detach() for name in ("weights", "time_scale")}
        return TableSource(replace(self.table, **numbers))


@dataclass(frozen=True, eq=False)
class ContinuousSource(Source):
    """A function that writes the table of every number of steps."""

    function: ContinuousTable
    written_for = True

    def schedule(self, request: Request, begin: int = 0) -> Schedule:
        """Of a late start: what it writes for the levels that are left; steps before it take nobody anywhere."""
        if begin == 0:
            return self.table(request).schedule(request.host.prediction)
        levels = self._levels(request)
        rest = self._on(request, levels[begin:], request.whole or request.steps).schedule(request.host.prediction)
        rows, before = rest.increments, levels[:begin]
        none = rows.new_zeros(begin, rows.shape[1])
        return Schedule(
            levels=torch.cat([before, rest.levels]),
            queries=torch.cat([before, rest.queries]),
            increments=torch.cat([none, rows]),
            sizes=torch.cat([none[:, 0], rest.sizes]),
        )

    def detach(self) -> Source:
        return ContinuousSource(replace(self.function, coefficients=self.function.coefficients.detach()))

    def table(self, request: Request) -> SolverTable:
        """What it writes for a whole run."""
        return self._on(request, self._levels(request), request.whole)

    def _levels(self, request: Request) -> Tensor:
        check_convention(self.function.convention, self.function.grid, request.host.prediction, "This solver")
        return request.levels(self.function.grid)[-request.steps - 1 :]

    def _on(self, request: Request, levels: Tensor, whole: int | None) -> SolverTable:
        call: dict[str, Any] = {"guidance_scale": request.guidance_scale, "whole": whole}
        return self.function.table(len(levels) - 1, request.host.prediction, sigmas=levels, **call)


@dataclass(frozen=True, eq=False)
class ClassicalSource(Source):
    """A classical solver. It builds its orders up from where a run begins, as diffusers' do.

    Attributes:
        solver: of ``BASES``.
        order: of a multistep solver.
        lower_order_final: end short runs with lower orders, as diffusers does.
        grid: the nominal grid; None: the host's.
    """

    solver: str
    order: int
    lower_order_final: bool = True
    grid: Mapping[str, Any] | None = None
    as_diffusers = True
    builds_up = True

    def schedule(self, request: Request, begin: int = 0) -> Schedule:
        levels, base = request.levels(self.grid), BASES[self.solver]
        whole = self._on(request, levels)
        if base.evaluations > 1:
            if begin and float(whole.increments[begin, 1]) != 0:
                raise ValueError(
                    f"Evaluation {begin} is in the middle of a step of {self.solver!r}: none begins there."
                )
            return whole
        if begin == 0:
            return whole
        rows = self._on(request, levels[begin:]).increments
        return replace(whole, increments=torch.cat([rows.new_zeros(begin, rows.shape[1]), rows]))

    def _on(self, request: Request, levels: Tensor) -> Schedule:
        base, alphas = BASES[self.solver], request.host.prediction.signal(levels)
        lower = self.lower_order_final and request.steps < base.lowers_below
        try:
            schedule = base.schedule(levels, alphas, self.order, lower)
        except (ZeroDivisionError, torch.linalg.LinAlgError):
            schedule = None
        if schedule is None or not bool(schedule.increments.isfinite().all()):
            raise ValueError(
                f"Solver {self.solver!r} cannot take a step of size 0 on the grid {levels.tolist()}: "
                "pass another one, grid={'name': ..., ...}."
            )
        return schedule
