"""What TimeLift learns: offsets of what each layer of a network is told, at each step of a solver that stays or not."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.time_lift import TimeLift
from ..pipelines.conditioning import Found, looking_for_modulation
from ..pipelines.networks import hooks_of, place
from ..pipelines.rollout import Inputs, sample
from ..schedulers.dyweight import DyWeightScheduler
from ..schedulers.time_lifting import find_places
from .config import LearningConfig
from .student import Made, Student, TableStudent
from .task import Task


class TimeStudent(Student):
    """Offsets of a network's modulation at each step of a solver.

    Args:
        base: the solver: a table, SpanLift on one, or a classical one; learning continues from a time lift that it has.
        steps: number of steps to learn for.
        evaluations: of the network, in so many steps.
        found: what the network is modulated by.
        table: learn the base's table as well.
        device: where the network computes.
    """

    lr = 2e-3

    def __init__(
        self,
        base: DyWeightScheduler,
        steps: int,
        evaluations: int,
        found: Found,
        *,
        table: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.scheduler, self.steps = copy.deepcopy(base), steps
        start = self.scheduler.time_lifts.get(steps, TimeLift()).offsets
        self.offsets = {
            name: start.get(name, torch.zeros(evaluations, *shape)).to(device, torch.float32).requires_grad_()
            for name, shape in found.items()
        }
        self.scheduler.time_lifts = {}
        self.table = TableStudent(self.scheduler, base.tables[steps]) if table else None

    @classmethod
    def start(cls, task: Task) -> TimeStudent:
        """
        Raises:
            ValueError: no base, variants, or a network that is told the time nowhere.
        """
        (steps,), base, config = task.steps, task.base, task.config
        if base is None:
            raise ValueError("TimeLift is learned on a base: tables, a classical solver or a SpanLift solver.")
        if any(term.variant is not None for term in task.terms):
            raise ValueError("TimeLift is learned for one call: leave out variants.")
        found, evaluations = modulation(task.pipe, base, steps, task.middle.held_out.inputs[:1], task.middle.call)
        options: dict[str, Any] = {"table": config.learn_base, "device": place(task.pipe)}
        return cls(base, steps, evaluations, found, **options)

    @classmethod
    def untrained(
        cls, base: DyWeightScheduler, steps: int, config: LearningConfig, grid: Mapping[str, Any] | None
    ) -> DyWeightScheduler:
        return base

    def result(self, made: Made) -> DyWeightScheduler:
        scheduler, provenance = self.scheduler, made(str(self.steps))
        if self.table is not None:
            scheduler = scheduler.with_tables([self.table.learned()])
        offsets = {name: offset.detach().cpu().half() for name, offset in self.offsets.items()}
        return scheduler.with_time_lifts({self.steps: TimeLift(offsets, provenance)})

    @staticmethod
    def merge(into: DyWeightScheduler, result: DyWeightScheduler) -> DyWeightScheduler:
        own = [table for n, table in result.tables.items() if n in result.time_lifts]
        return into.with_tables(own).with_time_lifts(result.time_lifts)

    def parameters(self) -> list[Tensor]:
        return [*self.offsets.values(), *([] if self.table is None else self.table.parameters())]

    def numbers(self) -> list[tuple[Tensor, Tensor]]:
        return [(offset, torch.ones_like(offset, dtype=torch.bool)) for offset in self.offsets.values()]

    def apply(self) -> None:
        if self.table is not None:
            self.scheduler.tables |= {self.steps: self.table.table()}
        self.scheduler.time_lifts = {self.steps: TimeLift(self.offsets)}


@torch.no_grad()
def modulation(
    pipe: Any, base: DyWeightScheduler, steps: int, inputs: Inputs, call: Mapping[str, Any]
) -> tuple[Found, int]:
    """What a pipeline's networks are modulated by, and how often they are asked, found by one sample.

    Raises:
        ValueError: nothing that can be learned and changed.
    """
    plain = copy.deepcopy(base)
    plain.time_lifts = {}
    with looking_for_modulation(pipe) as found:
        sample(pipe, plain, steps, inputs, [0], call)
    find_places(pipe, TimeLift({name: torch.zeros(1, *shape) for name, shape in found.items()}))
    for component in {name.partition(".")[0] for name in found}:
        if any(True for _ in hooks_of(*pipe.components[component].modules())):
            raise ValueError(
                f"TimeLift is learned with the network on its device, and the {component} of {type(pipe).__name__} is "
                "offloaded: learn without; the learned solver may be used with enable_model_cpu_offload."
            )
    return found, len(plain.timesteps)
