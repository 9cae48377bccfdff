"""Every learned solver that is compared, as one record; and the student that learns those of :mod:`maps`.

A peer is named "-like": it has the idea of its paper, and the trainer, loss, teacher and pairs of all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from maps import (
    Form,
    Ground,
    Theta,
    bezier,
    compensated,
    falling,
    normalised,
    on_levels,
    split,
    staged,
    start_bezier,
    start_levels,
    start_stages,
    start_weights,
)
from torch import Tensor

from dywspan.core.prediction import Prediction
from dywspan.core.table import SolverTable
from dywspan.distill.config import LearningConfig
from dywspan.distill.student import Made, Student, TableStudent
from dywspan.distill.task import Task
from dywspan.schedulers.dyweight import DyWeightScheduler

RATES = (0.003, 0.01, 0.03)  # of tables
Start = Callable[[Ground], dict[str, Tensor]]


@dataclass(frozen=True)
class Method:
    """A learned solver.

    Attributes:
        name: as the tables show it.
        paper: arXiv id, or where it appeared.
        rates: learning rates to try first, rising.
        squares: also try least squares, which has no learning rate.
        pairs: to learn from; None: as many as all.
    """

    name: str
    paper: str
    rates: Sequence[float] = RATES
    squares: bool = True
    pairs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Peer(Method):
    """One of :mod:`maps`.

    Attributes:
        start: the numbers at the start, by name.
        form: what they make.
        most: evaluations of a step; 1: a multistep solver.
        turns: names of the numbers that move together, one group after the other; none: all move at once.
        on_paths: its weights start where they fit a teacher's path, see :mod:`dywspan.distill.regression`.
    """

    start: Start
    form: Callable[[Theta, Ground], Form]
    most: int = 1
    turns: Sequence[Sequence[str]] = ()
    on_paths: bool = False

    def stages(self, evaluations: int) -> tuple[int, ...]:
        """Evaluations of each step."""
        return split(evaluations, self.most)


@dataclass(frozen=True)
class Table(Method):
    """DyWeight, with all of it or without some.

    Attributes:
        time_shifting, time_scaling: see :class:`LearningConfig`.
    """

    time_shifting: bool = True
    time_scaling: bool = True


@dataclass(frozen=True)
class Lift(Method):
    """What is learned on DyWeight's table.

    Attributes:
        solver: "spanlift" or "timelift".
    """

    solver: str = "spanlift"


# ------------------------------------------------------------------------------------------------- the maps as peers


def _ones(ground: Ground) -> Tensor:
    return torch.ones(ground.evaluations, dtype=torch.float64)


def _levels(theta: Theta, ground: Ground) -> Form:
    """The base on learned levels, and the times that the network is told there."""
    levels = falling(theta["levels"], ground.levels)
    return Form(levels, on_levels(ground.base, levels), theta["times"])


def _weights(theta: Theta, ground: Ground) -> Form:
    """Rows that sum to 1, on learned levels and times where there are some."""
    levels = falling(theta["levels"], ground.levels) if "levels" in theta else ground.levels
    return Form(levels, normalised(theta["weights"], *ground.weights.shape), theta.get("times", _ones(ground)))


def _bezier(theta: Theta, ground: Ground) -> Form:
    levels = bezier(theta["controls"], ground.levels)
    return Form(levels, on_levels(ground.base, levels), _ones(ground))


def _compensated(theta: Theta, ground: Ground) -> Form:
    times = ground.prediction.timestep(ground.levels[:-1])
    return Form(ground.levels, compensated(theta["ratios"], ground.base(ground.levels), times), _ones(ground))


STARTS: dict[str, Callable[[Ground], Tensor]] = {
    "levels": lambda ground: start_levels(ground.levels),
    "times": _ones,
    "weights": lambda ground: start_weights(ground.weights),
    "controls": lambda ground: start_bezier(),
    "ratios": lambda ground: torch.zeros(ground.evaluations - 1, dtype=torch.float64),
}


def _start(*names: str) -> Start:
    return lambda ground: {name: STARTS[name](ground) for name in names}


def _staged(*names: str) -> Start:
    return lambda ground: {name: v for name, v in start_stages(ground).items() if name in names and len(v)}


ALTERNATING = (("weights",), ("levels", "times"))
FREE = "DyWeight"  # what all are compared with
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Table(FREE, "2603.11607"),
        Table("DyWeight without shifting", "2603.11607", time_shifting=False),
        Table("DyWeight without scaling", "2603.11607", time_scaling=False),
        Table("DyWeight without both", "2603.11607", time_shifting=False, time_scaling=False),
        Peer("LD3-like", "2405.15506", start=_start("levels", "times"), form=_levels),
        Peer("S4S-like", "2502.17423", start=_start("weights"), form=_weights),
        Peer(
            "S4S-Alt-like",
            "2502.17423",
            start=_start("weights", "levels", "times"),
            form=_weights,
            turns=ALTERNATING,
        ),
        Peer("DLMS-like", "ICLR 2025", start=_start("weights", "levels"), form=_weights, on_paths=True),
        Peer("AMED-like", "2312.00094", start=_staged("points", "scales"), form=staged, most=2),
        Peer(
            "EPD-like",
            "2507.14797",
            start=_staged("points", "scales", "mixes", "times"),
            form=staged,
            most=3,
        ),
        Peer("DC-Solver-like", "2409.03755", pairs=10, start=_start("ratios"), form=_compensated),
        Peer("BezierFlow-like", "2512.13255", start=_start("controls"), form=_bezier),
        Lift("SpanLift", "2606.08672", (3e-4, 1e-3, 3e-3), squares=False),
        Lift("TimeLift", "2603.22375", (1e-3, 3e-3, 1e-2), squares=False, solver="timelift"),
    )
}


# ------------------------------------------------------------------------------------------------- learning them


@dataclass(frozen=True, eq=False)
class LiveTable(SolverTable):
    """A table whose levels are being learned.

    Attributes:
        live: (N+1,) those of its grid, with their graph.
    """

    live: Tensor | None = None

    def nominal(self, prediction: Prediction, mu: float | None = None) -> Tensor:
        return super().nominal(prediction, mu) if self.live is None else self.live


def as_table(form: Form, prediction: Prediction) -> LiveTable:
    """The table of a form: its levels are its grid, whatever the rows sum to."""
    levels, weights, times = form
    grid = {"sigmas": levels.tolist()}
    kind = prediction.convention
    return LiveTable(weights, times, grid, time_shifting=False, convention=kind, live=levels)


class PeerStudent(Student):
    """The numbers of a peer.

    Args:
        scheduler: of the pipeline.
        peer: which one.
        ground: where it starts.
        block: updates of a turn, where it takes turns.
    """

    lr = 1e-2

    def __init__(self, scheduler: DyWeightScheduler, peer: Peer, ground: Ground, block: int = 1) -> None:
        self.scheduler, self.peer, self.ground, self.block = scheduler, peer, ground, block
        self.theta = {name: v.detach().clone().requires_grad_() for name, v in peer.start(ground).items()}
        self.moving: Sequence[str] = [*self.theta]

    @classmethod
    def start(cls, task: Task) -> PeerStudent:
        raise NotImplementedError("A peer starts from a classical solver: PeerStudent(scheduler, peer, ground).")

    @classmethod
    def untrained(
        cls, base: DyWeightScheduler, steps: int, config: LearningConfig, grid: Mapping[str, Any] | None
    ) -> DyWeightScheduler:
        raise NotImplementedError("A peer starts from a classical solver: PeerStudent(scheduler, peer, ground).")

    def result(self, made: Made) -> DyWeightScheduler:
        """A plain table: its levels are written down, and nothing of the peer but its name and numbers is left."""
        provenance = made(str(self.ground.evaluations))
        theta = {name: value.tolist() for name, value in self.theta.items()}
        return self.scheduler.with_tables([plain(self.table(), {**provenance, "peer": self.peer.name, "theta": theta})])

    @staticmethod
    def merge(into: DyWeightScheduler, result: DyWeightScheduler) -> DyWeightScheduler:
        return TableStudent.merge(into, result)

    def table(self) -> LiveTable:
        """The table these numbers make now, with gradients of those that move."""
        theta = {name: v if name in self.moving else v.detach() for name, v in self.theta.items()}
        return as_table(self.peer.form(theta, self.ground), self.ground.prediction)

    def turn(self, update: int) -> None:
        turns = self.peer.turns or [[*self.theta]]
        self.moving = turns[update // self.block % len(turns)]

    def parameters(self) -> list[Tensor]:
        return [*self.theta.values()]

    def numbers(self) -> list[tuple[Tensor, Tensor]]:
        return [(v, torch.ones_like(v, dtype=torch.bool)) for name, v in self.theta.items() if name in self.moving]

    def apply(self) -> None:
        self.scheduler.tables = {self.ground.evaluations: self.table()}


def plain(table: LiveTable, provenance: Mapping[str, Any]) -> SolverTable:
    """The same numbers, without their graph."""
    weights, times = table.weights.detach(), table.time_scale.detach().clone()
    kept: dict[str, Any] = {"provenance": provenance, "convention": table.convention}
    return SolverTable(weights, times, table.grid, time_shifting=False, **kept)
