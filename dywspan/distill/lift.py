"""What SpanLift learns: an operator on a frozen base, and how much of both each step takes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.bases import BASES, multistep
from ..core.continuous import ContinuousLift, guided
from ..core.layout import LAYOUTS
from ..core.operator import Lift
from ..pipelines.networks import place
from ..pipelines.rollout import set_timesteps
from ..schedulers.dyweight import DyWeightScheduler
from ..schedulers.spanlift import SpanLiftScheduler
from .config import LearningConfig
from .student import Made, Student
from .task import Task


class LiftStudent(Student):
    """SpanLift on a frozen base: one operator shared by all ``steps``, alpha and beta of each, or of all.

    Args:
        base: the base solver, tables and time lifts included; learning continues from a SpanLift solver, operators
            included.
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
            none = dict.fromkeys(("lifts", "continuous_lift", "weights_sha256", "time_lifts", "timelift_sha256"))
            scheduler = SpanLiftScheduler.from_config(base.config, layout=layout, operator=size, **none)
            if horizon is not None:
                scheduler.continuous_lift = ContinuousLift.initial(_order(base), horizon=horizon, operator=name)
            for n in steps if horizon is None else ():
                set_timesteps(base, n)
                ones = torch.ones(len(base.timesteps) + (n in base.tables and base.tables[n].afs))
                # beta = 1 and a zero head: the gradient reaches the head at once, and the start is the base.
                scheduler.lifts[n] = Lift(ones, ones, name)
            scheduler.time_lifts = {n: base.time_lifts[n] for n in steps if n in base.time_lifts}
            scheduler.initialize()
        for n, lift in scheduler.lifts.items():
            scheduler.lifts[n] = replace(lift, alpha=_leaf(lift.alpha), beta=_leaf(lift.beta))
        if (function := scheduler.continuous_lift) is not None:
            function = guided(function, guidance_scale)
            scheduler.continuous_lift = replace(function, coefficients=_leaf(function.coefficients))
        self.scheduler = self.lifted = scheduler
        self.networks = [network.requires_grad_(True) for network in scheduler.operators.values()]

    @classmethod
    def start(cls, task: Task) -> LiftStudent:
        """
        Raises:
            ValueError: no base, or variants without ``continuous``.
        """
        if task.base is None:
            raise ValueError("SpanLift is learned on a base: tables, a classical solver or a SpanLift solver.")
        if not task.continuous and any(term.variant is not None for term in task.terms):
            raise ValueError(
                "Lifts of single numbers of steps are for one call: set continuous, or leave out variants."
            )
        torch.manual_seed(task.config.seed)
        size: dict[str, Any] = {"order": task.config.order, "layout": task.layout, "operator": task.operator}
        size |= {"name": task.name, "guidance_scale": task.guidance_scale}
        size |= {"horizon": task.config.horizon if task.continuous else None}
        student = cls(task.base, task.steps, task.middle.held_out.endpoints.shape[1:], **size)
        for network in student.networks:  # before there is an optimiser, whose state follows it
            network.to(place(task.pipe))
        return student

    @classmethod
    def untrained(
        cls, base: DyWeightScheduler, steps: int, config: LearningConfig, grid: Mapping[str, Any] | None
    ) -> DyWeightScheduler:
        return base

    def result(self, made: Made) -> SpanLiftScheduler:
        scheduler = self.lifted
        for network in scheduler.operators.values():
            network.requires_grad_(False)
        for n, lift in scheduler.lifts.items():
            provenance = {**made(str(n)), **({"on_time_lift": True} if n in scheduler.time_lifts else {})}
            scheduler.lifts[n] = replace(lift.detach(), provenance=provenance)
        if (function := scheduler.continuous_lift) is not None:
            coefficients = function.coefficients.detach()
            scheduler.continuous_lift = replace(function, coefficients=coefficients, provenance=made())
        return scheduler

    @staticmethod
    def merge(into: SpanLiftScheduler, result: SpanLiftScheduler) -> SpanLiftScheduler:
        return into.with_lifts(result)

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
        raise ValueError("The SpanLift base has no continuous lift to continue from: leave out continuous.")
    if missing := [] if continuous else sorted(set(steps) - base.lifts.keys()):
        raise ValueError(f"The SpanLift base was learned for {sorted(base.lifts)} steps, not for {missing}.")
    scheduler = copy.deepcopy(base)
    scheduler.lifts = {n: lift for n, lift in scheduler.lifts.items() if n in steps and not continuous}
    scheduler.continuous_lift = scheduler.continuous_lift if continuous else None
    names = {lift.operator for lift in (scheduler.continuous_lift, *scheduler.lifts.values()) if lift is not None}
    scheduler.operators = {name: scheduler.operators[name] for name in sorted(names)}
    scheduler.time_lifts = {n: lift for n, lift in scheduler.time_lifts.items() if n in steps}
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
