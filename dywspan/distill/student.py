"""What is learned: the numbers of a solver, inside a scheduler that samples with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.continuous import ContinuousTable, guided
from ..core.table import SolverTable
from ..pipelines.classical import default_grid
from ..schedulers.dyweight import DyWeightScheduler
from ..schedulers.sources import ContinuousSource, Request
from .config import LearningConfig
from .regression import regress, regress_continuous
from .task import Task

Made = Callable[..., Mapping[str, Any]]  # the provenance of all terms, or of the one that is named


class Student(ABC):
    """A scheduler with parameters, of one kind: how learning starts, what it moves, and what an artefact is given.

    Attributes:
        scheduler: samples with what :meth:`apply` put in last.
        lr: the peak learning rate that suits it.
        networks: of its own, whose activations may be recomputed.
    """

    scheduler: DyWeightScheduler
    lr: float
    networks: Sequence[nn.Module] = ()

    @classmethod
    @abstractmethod
    def start(cls, task: Task) -> Student:
        """Where the learning of a task starts."""

    @classmethod
    @abstractmethod
    def untrained(
        cls, base: DyWeightScheduler, steps: int, config: LearningConfig, grid: Mapping[str, Any] | None
    ) -> DyWeightScheduler:
        """A scheduler that samples as learning starts, without paths: what the learned one is compared with.

        Args:
            base: the pipeline's own, or SpanLift's base.
        """

    @abstractmethod
    def result(self, made: Made) -> Any:
        """A scheduler with what was learned and where it comes from, and with nothing else."""

    @staticmethod
    @abstractmethod
    def merge(into: Any, result: Any) -> Any:
        """A copy of an artefact with a result besides its own."""

    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """What the optimiser moves."""

    @abstractmethod
    def numbers(self) -> list[tuple[Tensor, Tensor]]:
        """The few that least squares moves: parameters, and masks of the entries that have an effect."""

    @abstractmethod
    def apply(self) -> None:
        """Put the parameters, with their graph, into the scheduler."""

    def turn(self, update: int) -> None:  # noqa: B027 (most kinds move all at once)
        """An update by gradients begins: parameters that are not to move in it are applied without their graph."""

    def vector(self) -> Tensor:
        """(P,) float64: the values of :meth:`numbers`."""
        return torch.cat([p.detach()[mask].double().cpu() for p, mask in self.numbers()])

    @torch.no_grad()
    def move(self, vector: Tensor) -> None:
        """Give :meth:`numbers` these values."""
        parts = vector.split([int(mask.sum()) for _, mask in self.numbers()])
        for (parameter, mask), values in zip(self.numbers(), parts):
            parameter[mask] = values.to(parameter)

    def calls(self, steps: int) -> int:
        """Denoiser calls that moving each of :meth:`numbers` once takes, those replayed not counted."""
        return len(self.vector()) * steps

    def local(self, steps: int) -> tuple[Student, Tensor | None]:
        """A student whose Q numbers at this number of steps are cheaper to move one by one, and dQ/dP, (Q, P)."""
        return self, None

    def snapshot(self) -> list[Tensor]:
        """A copy of the parameters' values."""
        return [p.detach().clone() for p in self.parameters()]

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor]) -> None:
        """Go back to a snapshot."""
        for parameter, value in zip(self.parameters(), state):
            parameter.copy_(value)

    @torch.no_grad()
    def approach(self, state: Sequence[Tensor], fraction: float) -> None:
        """Go this fraction of the way to a snapshot."""
        for parameter, value in zip(self.parameters(), state):
            parameter.lerp_(value.to(parameter), fraction)


def _tail_calls(steps: int, order: int) -> int:
    """A weight of step i changes the calls after it; its time scale its own call too."""
    return sum(min(i + 1, order) * (steps - 1 - i) + steps - i for i in range(steps))


class TableStudent(Student):
    """A DyWeight table: the weights that exist, and the time scale.

    Args:
        scheduler: of the pipeline.
        initial: where to start.
        bounded: the largest |s - 1|, s = 1 + bounded (2 sigmoid(phi) - 1); 0: s is free.
        time_scaling: learn s; else it stays what it is in ``initial``.
    """

    lr = 1e-2

    def __init__(
        self, scheduler: DyWeightScheduler, initial: SolverTable, bounded: float = 0.0, time_scaling: bool = True
    ) -> None:
        self.scheduler, self.initial, self.bounded, self.time_scaling = scheduler, initial, bounded, time_scaling
        self.weights = initial.weights.double().clone().requires_grad_()
        self.phi = self._phi(initial.time_scale.double()).requires_grad_(time_scaling)

    @classmethod
    def start(cls, task: Task) -> TableStudent:
        (steps,), config, scheduler = task.steps, task.config, task.own_scheduler
        table = initial_table(scheduler, steps, config, task.grid)
        if steps in task.paths:
            table = regress(task.pipe, table, task.paths[steps], task.middle.call, **_computing(config))
        return cls(scheduler, table, config.bounded, config.time_scaling)

    @classmethod
    def untrained(
        cls, base: DyWeightScheduler, steps: int, config: LearningConfig, grid: Mapping[str, Any] | None
    ) -> DyWeightScheduler:
        return base.with_tables([initial_table(base, steps, config, grid)])

    def result(self, made: Made) -> DyWeightScheduler:
        table = self.learned()
        provenance = made(str(table.num_inference_steps))
        return self.scheduler.with_tables([replace(table, provenance=provenance)])

    @torch.no_grad()
    def learned(self) -> SolverTable:
        """The table these numbers make now, for good."""
        table = self.table()
        return replace(table, weights=table.weights.detach(), time_scale=table.time_scale.detach().clone())

    @staticmethod
    def merge(into: DyWeightScheduler, result: DyWeightScheduler) -> DyWeightScheduler:
        return into.with_tables([*result.tables.values()])

    def _scale(self) -> Tensor:
        return 1 + self.bounded * (2 * torch.sigmoid(self.phi) - 1) if self.bounded else self.phi

    def _phi(self, scale: Tensor) -> Tensor:
        if not self.bounded:
            return scale.clone()
        near = 1 - 1e-3  # at the bound itself phi would be infinite
        return torch.logit((((scale - 1) / self.bounded).clamp(-near, near) + 1) / 2)

    def table(self) -> SolverTable:
        """The table these numbers make now, with gradients."""
        return replace(self.initial, weights=self.weights.tril(), time_scale=self._scale())

    def parameters(self) -> list[Tensor]:
        return [self.weights, self.phi] if self.time_scaling else [self.weights]

    def numbers(self) -> list[tuple[Tensor, Tensor]]:
        exist = torch.ones_like(self.weights, dtype=torch.bool).tril()
        asked = torch.arange(len(self.phi)) >= self.initial.afs
        return [(self.weights, exist), (self.phi, asked)] if self.time_scaling else [(self.weights, exist)]

    def vector(self) -> Tensor:
        """(P,) float64: weights, and s itself rather than phi, so that differences are the same with bounds."""
        (_, exist), *scaled = self.numbers()
        return torch.cat([self.weights.detach()[exist], *(self._scale().detach()[asked] for _, asked in scaled)])

    @torch.no_grad()
    def move(self, vector: Tensor) -> None:
        """Give them these values; s stops at its bounds."""
        super().move(vector)
        for _, asked in self.numbers()[1:]:
            self.phi[asked] = self._phi(self.phi[asked])

    def calls(self, steps: int) -> int:
        return _tail_calls(steps, self.weights.shape[1])

    def apply(self) -> None:
        self.scheduler.tables = {self.initial.num_inference_steps: self.table()}


class ContinuousStudent(Student):
    """The function that writes the tables of every number of steps.

    Args:
        scheduler: of the pipeline.
        initial: where to start.
    """

    lr = 1e-2

    def __init__(self, scheduler: DyWeightScheduler, initial: ContinuousTable) -> None:
        self.scheduler, self.initial = scheduler, initial
        self.coefficients = initial.coefficients.double().clone().requires_grad_()

    @classmethod
    def start(cls, task: Task) -> ContinuousStudent:
        function = initial_continuous(scheduler := task.own_scheduler, task.config, task.grid)
        if task.paths:
            paths, call = task.paths, task.middle.call
            function = regress_continuous(task.pipe, function, paths, call, **_computing(task.config))
        return cls(scheduler, guided(function, task.guidance_scale))

    @classmethod
    def untrained(
        cls, base: DyWeightScheduler, steps: int, config: LearningConfig, grid: Mapping[str, Any] | None
    ) -> DyWeightScheduler:
        return base.with_continuous(initial_continuous(base, config, grid))

    def result(self, made: Made) -> DyWeightScheduler:
        coefficients = self.coefficients.detach().clone()
        return self.scheduler.with_continuous(replace(self.initial, coefficients=coefficients, provenance=made()))

    @staticmethod
    def merge(into: DyWeightScheduler, result: DyWeightScheduler) -> DyWeightScheduler:
        assert result.continuous is not None
        return into.with_continuous(result.continuous)

    def parameters(self) -> list[Tensor]:
        return [self.coefficients]

    def numbers(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.coefficients, torch.ones_like(self.coefficients, dtype=torch.bool))]

    def table(self) -> ContinuousTable:
        """The function these coefficients make now, with gradients."""
        return replace(self.initial, coefficients=self.coefficients)

    def apply(self) -> None:
        self.scheduler.tables, self.scheduler.continuous = {}, self.table()

    def calls(self, steps: int) -> int:
        return _tail_calls(steps, self.initial.order)

    def local(self, steps: int) -> tuple[Student, Tensor | None]:
        """The table's own numbers: most change only the end of a sampling, and each moves it more than a coefficient's
        many small changes, so that differences stand out of the network's rounding.
        """
        asked, guidance, whole = self.scheduler.request, self.scheduler.guidance_scale, self.scheduler.whole
        # Many pipelines choose the grid in their call: it is known once they have sampled, as the guidance scale is.
        if asked is not None and (asked.steps, asked.whole) == (steps, whole):
            request = asked
        else:
            request = Request(steps, self.scheduler.host, guidance_scale=guidance, whole=whole)

        def numbers(coefficients: Tensor) -> Tensor:
            table = ContinuousSource(replace(self.initial, coefficients=coefficients)).table(request)
            return torch.cat([table.weights[table.weights.new_ones(table.weights.shape).tril() > 0], table.time_scale])

        with torch.enable_grad():
            chain = torch.autograd.functional.jacobian(numbers, self.coefficients.detach()).flatten(1)
        with torch.no_grad():
            return TableStudent(self.scheduler, ContinuousSource(self.table()).table(request)), chain


def initial_table(
    scheduler: DyWeightScheduler, steps: int, config: LearningConfig, grid: Mapping[str, Any] | None
) -> SolverTable:
    """Where a table's learning starts."""
    return SolverTable.initial(
        steps,
        config.order,
        dict(grid) if grid is not None else default_grid(scheduler),
        scheduler.host.prediction,
        base=config.init,
        afs=config.afs,
        time_shifting=config.time_shifting,
    )


def initial_continuous(
    scheduler: DyWeightScheduler, config: LearningConfig, grid: Mapping[str, Any] | None
) -> ContinuousTable:
    """Where the learning of a function that writes tables starts."""
    grid = dict(grid) if grid is not None else default_grid(scheduler)
    function = ContinuousTable.initial(config.order, grid, base=config.init, horizon=config.horizon)
    return replace(function, convention=scheduler.host.prediction.convention)


def _computing(config: LearningConfig) -> dict[str, Any]:
    return {"batch_size": config.batch_size, "mixed_precision": config.mixed_precision}
