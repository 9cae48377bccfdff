"""Where each method starts on a pipeline: the best classical solver for it, chosen on pairs to learn from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import HELD_OUT, TRAIN, Opened
from maps import Ground
from methods import METHODS, Lift, Method, Peer, PeerStudent, Table, as_table, plain
from torch import Tensor
from torch.nn.functional import pad

from dywspan.artifact import table_from_json, table_to_json, write_atomically
from dywspan.core.bases import BASES
from dywspan.core.grid import make_grid
from dywspan.core.prediction import Flow, Prediction
from dywspan.core.table import SolverTable
from dywspan.distill.config import LearningConfig
from dywspan.distill.kinds import STUDENTS
from dywspan.distill.regression import regress
from dywspan.distill.student import Student, TableStudent
from dywspan.distill.task import Task, Term
from dywspan.evaluate.rivals import SELECT, best_classical, candidates, judging
from dywspan.pipelines.arena import Arena
from dywspan.pipelines.classical import SOLVERS, Classical, asked_for, grids
from dywspan.pipelines.hashes import digest
from dywspan.pipelines.teacher import Teacher
from dywspan.schedulers.dyweight import DyWeightScheduler

ORDER = 3  # K of weights that are learned, or more where the classical solver has more
PATHS = 32  # pairs that weights on a teacher's path are fitted to
TURNS = 8  # of each group of numbers that alternate


@dataclass(frozen=True)
class Chosen:
    """What was best on pairs to learn from, at N evaluations.

    Attributes:
        rival: of all classical solvers, which learned ones are compared with.
        base: of those that are functions of their levels, which multistep methods start from.
        coarse: by evaluations of a step, the grid that steps of stages start from, and its name.
        evaluations: of the network, that choosing took.
    """

    rival: Classical
    base: Classical
    coarse: Mapping[int, tuple[str, Mapping[str, Any]]]
    evaluations: int


class Bench:
    """One pipeline at N evaluations.

    Args:
        opened: the pipeline.
        n: N.
        pairs, held_out: how many there are to learn from, and to choose by.
        folder: of what was chosen.
    """

    def __init__(self, opened: Opened, n: int, pairs: int, held_out: int, folder: Path) -> None:
        self.opened, self.n, self.folder = opened, n, folder
        self.train, self.held_out = opened.pairs(TRAIN, pairs), opened.pairs(HELD_OUT, held_out)
        self.prediction: Prediction = opened.own.host.prediction
        self.chosen = self._chosen()

    # ------------------------------------------------------------------ choosing

    def _chosen(self) -> Chosen:
        """Found again where it was chosen before."""
        key = digest([self.opened.model, self.opened.call, self.n, SELECT, len(self.train), list(self.train.seeds)])
        file = self.folder / f"chosen-{key}.json"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, (json.dumps(self._choose(), indent=1) + "\n").encode())
        made = json.loads(file.read_text(encoding="utf-8"))
        rival, base = (
            Classical(made[k]["solver"], made[k]["grid"], table_from_json(made[k]["table"])) for k in ("rival", "base")
        )
        coarse = {int(most): (name, grid) for most, (name, grid) in made["coarse"].items()}
        return Chosen(rival, base, coarse, made["evaluations"])

    def _choose(self) -> dict[str, Any]:
        opened, first = self.opened, self.train[: SELECT[1]]
        with judging(opened.pipe, first, opened.call) as arena:
            among = candidates(opened.pipe, arena, self.n)
            best = partial(best_classical, opened.pipe, arena, self.n)
            picked = {"rival": best(among), "base": best([c for c in among if c.solver in SOLVERS])}
            coarse = {most: self._coarse(most, arena, best) for most in _stages_used()}
            evaluations = arena.memo.computed
        shown = {k: {"solver": c.solver, "grid": c.grid, "table": table_to_json(c.table)} for k, c in picked.items()}
        return {**shown, "coarse": coarse, "evaluations": evaluations}

    def _coarse(self, most: int, arena: Arena, best: Callable[..., Classical]) -> tuple[str, Mapping[str, Any]]:
        """The grid on which untrained steps of stages end nearest to the teacher."""
        peer = _stages_used()[most]
        steps = len(peer.stages(self.n))
        scheduler, request = asked_for(self.opened.pipe, steps, arena.inputs, self.opened.call)
        found = grids(self.opened.pipe, scheduler, request)
        tables = {name: self._start(peer, self._stepping(peer, grid)) for name, grid in found.items()}
        name = best([Classical(peer.name, name, table) for name, table in tables.items()]).grid
        return name, found[name]

    def _start(self, peer: Peer, ground: Ground) -> SolverTable:
        """A peer's table before it learns."""
        return plain(as_table(peer.form(peer.start(ground), ground), ground.prediction), {})

    # ------------------------------------------------------------------ grounds

    def _levels(self, grid: Mapping[str, Any], steps: int) -> Tensor:
        _, request = asked_for(self.opened.pipe, steps, self.opened.inputs(TRAIN, 1), self.opened.call)
        return make_grid(grid, steps, self.prediction, request.host.shift(request.mu))

    def _stepping(self, peer: Peer, grid: Mapping[str, Any]) -> Ground:
        stages = peer.stages(self.n)
        levels = self._levels(grid, len(stages))
        return Ground(levels, self.prediction, _none, torch.zeros(0), stages)

    def multistep(self) -> Ground:
        """The best base on its grid."""
        base = self.chosen.base
        name, order, lower = SOLVERS[base.solver]

        def rows(levels: Tensor) -> Tensor:
            return BASES[name](levels, self.prediction.signal(levels), order, lower)

        levels = self._levels(base.table.grid, self.n)
        weights = rows(levels)
        width = max(base.table.weights.shape[1], min(ORDER, self.n))
        weights = pad(weights[:, :width], (0, max(0, width - weights.shape[1])))
        return Ground(levels, self.prediction, rows, weights, (1,) * self.n)

    def ground(self, peer: Peer) -> Ground:
        """Where a peer starts."""
        if peer.most > 1:
            return self._stepping(peer, self.chosen.coarse[peer.most][1])
        ground = self.multistep()
        return replace(ground, weights=self.on_paths(ground)) if peer.on_paths else ground

    def on_paths(self, ground: Ground) -> Tensor:
        """(N, K) weights that fit a teacher's path on these levels, found again where they were fitted before."""
        table = self._table(ground, {"sigmas": ground.levels.tolist()})
        key = [self.opened.model, self.opened.call, table_to_json(table), PATHS, list(self.train.seeds[:1])]
        file = self.folder / f"paths-{digest(key)}.json"
        if not file.exists():
            count = min(PATHS, len(self.train))
            paths = self.opened.pairs(TRAIN, count, self.path_teacher(ground.levels))
            found = regress(self.opened.pipe, table, paths, self.opened.call)
            write_atomically(file, (json.dumps(table_to_json(found), indent=1) + "\n").encode())
        return table_from_json(json.loads(file.read_text(encoding="utf-8"))).weights

    def path_teacher(self, levels: Tensor) -> Teacher:
        """Adams-Bashforth with equal steps between the levels, about as many as the teacher's."""
        substeps = -(-self.opened.teacher.num_inference_steps // self.n)
        part = torch.arange(substeps, dtype=torch.float64) / substeps
        fine = torch.lerp(levels[:-1, None], levels[1:, None], part).flatten()
        grid = {"sigmas": [*fine.tolist(), float(levels[-1])]}
        scheduler = DyWeightScheduler.from_config(self.opened.pipe.scheduler, grid=grid, solver="adams", solver_order=2)
        return Teacher(scheduler, self.n * substeps, substeps)

    def extra_evaluations(self, method: Method) -> int:
        """Of the network, before a method's own learning starts."""
        if not (isinstance(method, Peer) and method.on_paths):
            return 0
        count = min(PATHS, len(self.train))
        substeps = -(-self.opened.teacher.num_inference_steps // self.n)
        return count * (self.n * substeps + self.n * (self.n + 1) // 2)

    # ------------------------------------------------------------------ students

    def _table(self, ground: Ground, grid: Mapping[str, Any], **options: Any) -> SolverTable:
        ones, kind = torch.ones(self.n, dtype=torch.float64), self.prediction.convention
        return SolverTable(ground.weights, ones, dict(grid), convention=kind, **options)

    def start(self, method: Method, base: DyWeightScheduler | None) -> SolverTable:
        """The table that a method starts from; SpanLift's and TimeLift's is the learned one below them."""
        if isinstance(method, Peer):
            return self._start(method, self.ground(method))
        if isinstance(method, Table):
            grid = self.chosen.base.table.grid
            return self._table(self.multistep(), grid, time_shifting=method.time_shifting)
        assert base is not None
        return base.tables[self.n]

    def task(self, method: Method, config: LearningConfig, base: DyWeightScheduler | None) -> Task:
        """What a method is learned from."""
        train = self.train if method.pairs is None else self.train[: method.pairs]
        term = Term(self.n, self.opened.call, train, self.held_out)
        options: dict[str, Any] = {}
        if isinstance(method, Lift):
            case = self.opened.case
            options |= {"solver": method.solver, "base": base, "layout": case.layout, "operator": case.operator}
            options["name"] = str(self.n)
        return Task(self.opened.pipe, self.opened.teacher, [term], config, self.opened.loss, **options)

    def student(self, method: Method, task: Task) -> Student:
        """A method at its start."""
        if isinstance(method, Peer):
            turns = TURNS * max(1, len(method.turns))
            block = max(1, task.config.number("updates") // turns)
            return PeerStudent(self.opened.own, method, self.ground(method), block)
        if isinstance(method, Table):
            return TableStudent(self.opened.own, self.start(method, None), time_scaling=method.time_scaling)
        return STUDENTS[task.solver, False].start(task)


def _stages_used() -> dict[int, Peer]:
    """By evaluations of a step, a peer with such steps."""
    return {m.most: m for m in METHODS.values() if isinstance(m, Peer) and m.most > 1}


def _none(levels: Tensor) -> Tensor:
    raise NotImplementedError("Steps of stages have no weights of past derivatives.")


def numbers(method: Method, n: int, order: int = ORDER) -> int | None:
    """How many a table's method learns at n evaluations, with K = ``order``; None of SpanLift and TimeLift."""
    order = min(order, n)
    entries = sum(min(i + 1, order) for i in range(n))
    if isinstance(method, Table):
        return entries + n * method.time_scaling
    if not isinstance(method, Peer):
        return None
    stages: Sequence[int] = method.stages(n)
    levels = torch.linspace(1, 0, len(stages) + 1, dtype=torch.float64)
    ground = Ground(levels, Flow(), _none, torch.zeros(n, order), stages)
    return sum(len(v) for v in method.start(ground).values())
