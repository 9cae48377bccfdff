"""What is learned: the numbers of a solver, inside a scheduler that samples with them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.bases import BASES, multistep
from ..core.continuous import ContinuousLift, ContinuousTable, guided
from ..core.layout import LAYOUTS
from ..core.operator import Lift
from ..core.table import SolverTable
from ..pipelines.rollout import set_timesteps
from ..schedulers.dyweight import DyWeightScheduler
from ..schedulers.sources import ContinuousSource, Request
from ..schedulers.spanlift import SpanLiftScheduler


class Student(ABC):
    """A scheduler with parameters.

    Attributes:
        scheduler: samples with what :meth:`apply` put in last.
        lr: the peak learning rate that suits it.
        networks: of its own, whose activations may be recomputed.
    """

    scheduler: DyWeightScheduler
    lr: float
    networks: Sequence[nn.Module] = ()

    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """What the optimiser moves."""

    @abstractmethod
    def numbers(self) -> list[tuple[Tensor, Tensor]]:
        """The few that least squares moves: parameters, and masks of the entries that have an effect."""

    @abstractmethod
    def apply(self) -> None:
        """Put the parameters, with their graph, into the scheduler."""

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


class LiftStudent(Student):
    """SpanLift on a frozen base: one operator shared by all ``steps``, alpha and beta of each, or of all.

    Args:
        base: the base solver, tables included; a SpanLift solver is gone on with, operators and all.
        steps: numbers of steps to learn for.
        sample_shape: of a latent, without the batch.
        order: K, derivatives the operator reads.
        layout: see ``LAYOUTS``.
        operator: further arguments of :class:`ResidualOperator` (width, blocks, kernel, ...).
        name: of the operator in the artefact.
        horizon: of a function that gives alpha and beta for every number of steps, see :class:`ContinuousLift`; None:
            those of each of ``steps``.
        guidance_scale: g0, to make that function depend on the guidance scale.
    """

    lr = 1e-3

    def __init__(
        self,
        base: DyWeightScheduler,
        steps: Sequence[int],
        sample_shape: Sequence[int],
        *,
        order: int = 2,
        layout: str = "image",
        operator: Mapping[str, Any] | None = None,
        name: str = "shared",
        horizon: float | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        if isinstance(base, SpanLiftScheduler):
            scheduler = gone_on_with(base, steps, horizon is not None)
        else:
            channels = LAYOUTS[layout].channels((1, *sample_shape))
            size = {"channels": channels, "order": order, **(operator or {})}
            # A base that was part of a SpanLift solver may still name its lifts.
            none = dict.fromkeys(("lifts", "continuous_lift", "weights_sha256"))
            scheduler = SpanLiftScheduler.from_config(base.config, layout=layout, operator=size, **none)
            if horizon is not None:
                scheduler.continuous_lift = ContinuousLift.initial(_order(base), horizon=horizon, operator=name)
            for n in steps if horizon is None else ():
                set_timesteps(base, n)
                ones = torch.ones(len(base.timesteps) + (n in base.tables and base.tables[n].afs))
                # beta = 1 and a zero head: the gradient reaches the head at once, and the start is the base.
                scheduler.lifts[n] = Lift(ones, ones, name)
            scheduler.initialize()
        for n, lift in scheduler.lifts.items():
            scheduler.lifts[n] = replace(lift, alpha=_leaf(lift.alpha), beta=_leaf(lift.beta))
        if (function := scheduler.continuous_lift) is not None:
            function = guided(function, guidance_scale)
            scheduler.continuous_lift = replace(function, coefficients=_leaf(function.coefficients))
        self.scheduler = self.lifted = scheduler
        self.networks = [network.requires_grad_(True) for network in scheduler.operators.values()]

    def parameters(self) -> list[Tensor]:
        return self._scalars() + [p for network in self.networks for p in network.parameters()]

    def numbers(self) -> list[tuple[Tensor, Tensor]]:
        """alpha and beta of each step, or what they are a function of; the operator stays."""
        return [(v, torch.ones_like(v, dtype=torch.bool)) for v in self._scalars()]

    def _scalars(self) -> list[Tensor]:
        if (function := self.lifted.continuous_lift) is not None:
            return [function.coefficients]
        return [v for lift in self.lifted.lifts.values() for v in (lift.alpha, lift.beta)]

    def apply(self) -> None:
        """Nothing to do: the scheduler computes with the parameters themselves."""


def gone_on_with(base: SpanLiftScheduler, steps: Sequence[int], continuous: bool) -> SpanLiftScheduler:
    """A copy that holds no more than is learned on: the lifts of these numbers of steps, or the continuous one.

    Raises:
        ValueError: it has none.
    """
    if continuous and base.continuous_lift is None:
        raise ValueError("The SpanLift base has no continuous lift to go on with: leave out continuous.")
    if missing := [] if continuous else sorted(set(steps) - base.lifts.keys()):
        raise ValueError(f"The SpanLift base was learned for {sorted(base.lifts)} steps, not for {missing}.")
    scheduler = copy.deepcopy(base)
    scheduler.lifts = {n: lift for n, lift in scheduler.lifts.items() if n in steps and not continuous}
    scheduler.continuous_lift = scheduler.continuous_lift if continuous else None
    names = {lift.operator for lift in (scheduler.continuous_lift, *scheduler.lifts.values()) if lift is not None}
    scheduler.operators = {name: scheduler.operators[name] for name in sorted(names)}
    return scheduler


def _leaf(values: Tensor) -> Tensor:
    """To be learned, in the precision that the numbers have when the artefact is used."""
    return values.detach().double().clone().requires_grad_()


def _order(base: DyWeightScheduler) -> int:
    """K, of the base's convergence: what a continuous lift keeps."""
    if base.continuous is not None:
        return base.continuous.order
    solver = base._solver
    return min(base.config["solver_order"], BASES[solver].highest if solver in multistep() else 2)
