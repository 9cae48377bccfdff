"""How a solver is tuned: a cheap teacher, every classical solver, and least squares from the best of them.

1. The teacher, Adams(3M) on the usual grid, samples the first ``PROBE`` at M and at 2M steps: that says its error.
2. The ``COMMON`` classical solvers on all grids are judged on the first of those, the better ones on more: ``ROUNDS``.
3. The teacher samples the others, at the fewest steps that make it ``FINER`` than the best of those solvers, and at
   least ``LONGER`` times theirs. On all of them the best solver is chosen.
4. Learning starts from that solver, by :mod:`dywspan.distill.secant`, and lasts as long as the budget.
5. Both are compared on samples that nothing was learned from, and the better one is kept.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm

from ..core.table import SolverTable
from ..distill.config import LearningConfig
from ..distill.losses import make_loss
from ..distill.student import TableStudent
from ..distill.task import Task, Term
from ..distill.trainer import learn
from ..evaluate.metrics import latent_rmse
from ..evaluate.paired import difference
from ..pipelines.arena import Arena, typical
from ..pipelines.classical import SOLVERS, Classical, asked_for, default_grid, on_all_grids
from ..pipelines.embeddings import remembered_prompts
from ..pipelines.inputs import OWN, check_call, lacks_text, read_inputs
from ..pipelines.networks import denoisers
from ..pipelines.precision import fast_and_safe
from ..pipelines.replay import Memo
from ..pipelines.rollout import Inputs
from ..pipelines.teacher import Teacher, find_teacher
from ..schedulers.calls import core
from ..schedulers.dyweight import DyWeightScheduler
from .config import FEW_STEPS, TuneConfig

SEED = 3 * 10**6  # of the first sample, far from those of learning and measuring
PROBE = 4  # samples of the first rounds
FINER = 4.0  # times smaller than the best classical solver's error, the teacher's must be
LONGER = 4  # times the student's steps, at least: few samples may hide what a teacher lacks
COMMON = {
    name: SOLVERS[name] for name in ("iPNDM(2M)", "iPNDM(3M)", "Adams(2M)", "DEIS(2M)", "DPM-Solver++(2M)", "UniP(2M)")
}
# Samples that solvers are judged on, and how many of them stay; more than a few steps leave out the first.
ROUNDS = ((1, 16), (2, 8), (PROBE, 4))
UPDATES, LEAST, PATIENCE = 3, 4, 3  # at least so many updates, of so many pairs; and so many without a better solver
NEWEST = 2  # derivatives whose weights are learned in every row


@dataclass(frozen=True)
class Outcome:
    """What became of one number of steps.

    Attributes:
        classical: the best classical solver.
        table: what is kept, with its provenance.
        learned: whether that was learned.
        errors: by "classical" and "tuned", (H,) of the held-out samples.
        paired: how the tuned one's differ, see :func:`dywspan.evaluate.paired.difference`.
        evaluations: guided ones by purpose; the teacher's are shared by all numbers of steps.
        seconds: likewise.
    """

    steps: int
    classical: Classical
    table: SolverTable
    learned: bool
    errors: Mapping[str, Tensor]
    paired: Mapping[str, Any]
    evaluations: Mapping[str, int]
    seconds: float


class Newest(TableStudent):
    """A table of which only some weights are moved: those of the newest derivatives, and the last row's, which cost no
    evaluation.
    """

    def numbers(self) -> list[tuple[Tensor, Tensor]]:
        (weights, exist), *scale = super().numbers()
        moved = exist.clone()
        moved[:-1, NEWEST:] = False
        return [(weights, moved), *scale]


class Course:
    """The tuning of one pipeline.

    Attributes:
        arena: its samples; the first ``PROBE`` are judged first, the last ``held_out`` only at the end.
        teacher: what made the targets of most samples.
        spent: guided evaluations of the teacher.
        seconds: by stage.
    """

    def __init__(self, pipe: Any, config: TuneConfig, inputs: Inputs, memo: Memo, bar: Any) -> None:
        self.pipe, self.config, self.memo, self.bar = pipe, config, memo, bar
        seeds = range(SEED + config.seed, SEED + config.seed + len(inputs))
        self.arena = Arena(pipe, inputs, seeds, config.call, memo)
        self.training = range(config.training)
        self.held_out = range(config.training, len(inputs))
        self.own = DyWeightScheduler.from_config(pipe.scheduler)
        self.asked = {n: asked_for(pipe, n, inputs, config.call) for n in config.steps}
        self.per_evaluation, self.spent, self.probed = 1.0, 0, 0.0
        self.stage, self.since, self.seconds = "", time.monotonic(), defaultdict[str, float](float)
        self.teacher = self._teacher(2 * max(config.steps) + 2)

    def run(self) -> list[Outcome]:
        """All numbers of steps."""
        self._probe()
        judged = {n: self._classical(n) for n in self.config.steps}
        self._teach(min(error for _, error, _ in judged.values()))
        return [self._tuned(n, kept, spent) for n, (kept, _, spent) in judged.items()]

    # ------------------------------------------------------------------ the teacher

    def _teacher(self, steps: int) -> Teacher:
        return find_teacher(self.pipe, "adams", steps, 3, default_grid(self.own))

    def _probe(self) -> None:
        """The first samples at M and 2M steps; the latter are the targets."""
        self._stage("teacher")
        probe, fine = range(PROBE), self._teacher(2 * self.teacher.num_inference_steps)
        ends = self.arena.endpoints(self.teacher.scheduler, self.teacher.num_inference_steps, probe)
        self.per_evaluation = self.memo.computed / (PROBE * self.teacher.num_inference_steps)
        self.arena.targets.update(enumerate(self.arena.endpoints(fine.scheduler, fine.num_inference_steps, probe)))
        self.probed = typical(self.arena.errors(self.teacher.scheduler, self.teacher.num_inference_steps, probe))
        if not bool(torch.isfinite(ends).all()) or not math.isfinite(self.probed):
            raise FloatingPointError(
                f"{type(self.pipe).__name__}'s samples are not finite in its precision: use a wider dtype."
            )
        self.spent = self._evaluations()

    def _teach(self, error: float) -> None:
        """The other samples, at as many steps as make the teacher finer than a solver of this error."""
        self._stage("teacher")
        before, first = self._evaluations(), self.teacher.num_inference_steps
        needed = first * math.sqrt(FINER * self.probed / error)  # at least of second order
        least = LONGER * max(self.config.steps)
        self.teacher = self._teacher(max(least, min(2 * first, math.ceil(needed))))
        places = range(PROBE, len(self.arena.inputs))
        ends = self.arena.endpoints(self.teacher.scheduler, self.teacher.num_inference_steps, places)
        self.arena.targets.update(zip(places, ends))
        self.spent += self._evaluations() - before

    # ------------------------------------------------------------------ one number of steps

    def _classical(self, n: int) -> tuple[list[Classical], float, int]:
        """The best ones on the probe, the first one's error there, and what that took."""
        self._stage(f"classical solvers, {n} steps")
        before = self._evaluations()
        kept = on_all_grids(self.pipe, *self.asked[n], COMMON)
        for count, stay in ROUNDS[n > FEW_STEPS :]:
            kept = self._kept(n, kept, range(count), stay)
        return kept, self._judged(n, kept[0], range(PROBE)), self._evaluations() - before

    def _kept(self, n: int, among: Sequence[Classical], places: Sequence[int], count: int) -> list[Classical]:
        return sorted(among, key=lambda own: self._judged(n, own, places))[:count]

    def _judged(self, n: int, classical: Classical, places: Sequence[int]) -> float:
        return typical(self._errors(n, classical.table, places))

    def _errors(self, n: int, table: SolverTable, places: Sequence[int]) -> Tensor:
        return self.arena.errors(self.own.with_tables([table]), n, places)

    def _tuned(self, n: int, kept: Sequence[Classical], judging: int) -> Outcome:
        before, stages = self._evaluations(), ("teacher", f"classical solvers, {n} steps", f"learning, {n} steps")
        self._stage(stages[1])
        best = self._kept(n, self._kept(n, kept, self.training, 2), range(len(self.arena.inputs)), 1)[0]
        classical = self._errors(n, best.table, self.held_out)
        judging += self._evaluations() - before
        self._stage(stages[2])
        left = self.config.budget(n) - self.spent - judging
        before = self._evaluations()
        student = self._student(best.table)
        pairs, updates = self._affordable(n, student, left)
        made = self._learn(n, student, pairs, updates)
        table = student.learned()
        errors = {"classical": classical, "tuned": self._errors(n, table, self.held_out)}
        learning = self._evaluations() - before
        learned = typical(errors["tuned"]) < typical(classical)
        evaluations = {"teacher": self.spent, "classical": judging, "learning": learning}
        means = {name: float(own.mean()) for name, own in errors.items()}
        paired = difference(latent_rmse(), errors["tuned"], classical, means["tuned"] - means["classical"])
        self._stage("")
        seconds = sum(self.seconds[name] for name in stages)
        made |= {"evaluations": {**evaluations, "seconds": round(seconds, 1)}}
        made |= {"start": best.name, "held_out_error": {"before": means["classical"], "after": means["tuned"]}}
        if not learned:
            table, made["held_out_error"] = best.table, dict.fromkeys(("before", "after"), means["classical"])
            made |= {"learning": {}, "solver": best.name}
        return Outcome(n, best, replace(table, provenance=made), learned, errors, paired, evaluations, seconds)

    def _student(self, table: SolverTable) -> Newest:
        missing = max(0, NEWEST - table.weights.shape[1])
        return Newest(self.own, replace(table, weights=pad(table.weights, (0, missing))))

    def _affordable(self, n: int, student: Newest, evaluations: int) -> tuple[int, int]:
        """Pairs to learn from, and updates: a Jacobian of each pair; at the start and in each update a sampling of all.

        A sampling of the start is not remembered: the student's numbers are those of the table but for rounding.
        """
        held_out, columns, samplings = len(self.held_out), student.calls(n), UPDATES + 1
        most = int((evaluations - samplings * n * held_out) / (columns + samplings * n))
        pairs = max(LEAST, min(len(self.training), most))
        return pairs, max(1, int((evaluations - pairs * columns) / (n * (pairs + held_out))) - 1)

    def _learn(self, n: int, student: Newest, pairs: int, updates: int) -> dict[str, Any]:
        """Move the student to the best that it is on the held-out samples; says what its provenance records."""
        config = LearningConfig(
            optimizer="least_squares",
            updates=updates,
            batch_size=pairs,
            evaluate_every=1,
            patience=PATIENCE,
            order=student.weights.shape[1],
            mixed_precision="no",
            seed=self.config.seed,
        )
        train, held_out = (self.arena.pairs(places) for places in (self.training[:pairs], self.held_out))
        term = Term(n, self.config.call, train, held_out)
        task = Task(self.pipe, self.teacher, [term], config, make_loss(self.pipe, "rmse"))
        return learn(task, student, quiet=True).provenance(term.name)

    # ------------------------------------------------------------------ what it takes

    def _evaluations(self) -> int:
        return round(self.memo.computed / self.per_evaluation)

    def _stage(self, name: str) -> None:
        """What is done from now on."""
        now = time.monotonic()
        self.seconds[self.stage] += now - self.since
        self.stage, self.since = name, now
        self.bar.set_description(name)


@contextmanager
def tuning(pipe: Any, config: TuneConfig) -> Iterator[Course]:
    """The course of a pipeline, which within is as a tuning needs it, and afterwards as it was.

    Raises:
        ValueError, OSError: prompts or arguments that cannot be used.
    """
    inputs = _inputs(pipe, config)
    bars = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        with TemporaryDirectory() as folder, fast_and_safe(), _shown(config) as bar, torch.no_grad():
            memo = Memo(pipe)
            # A step cache answers by what it was asked before.
            memo.active = not any(getattr(core(m), "is_cache_enabled", False) for m in denoisers(pipe).values())
            with remembered_prompts(pipe, Path(folder)) as memory, memo.installed():
                if memory is not None:
                    memory.fill(inputs, config.call, PROBE)
                course = Course(pipe, config, inputs, memo, bar)
                memo.tell = lambda samples: bar.update(samples / course.per_evaluation)
                yield course
    finally:
        pipe.set_progress_bar_config(**bars)


def _inputs(pipe: Any, config: TuneConfig) -> Inputs:
    """Each sample's own arguments; prompts are gone through again, with new noise, where there are too few."""
    needed = config.training + config.held_out
    source = OWN if config.prompts is None and lacks_text(pipe, config.call) else config.prompts
    found = read_inputs(source, config.prompt_column, config.prompt_split, needed) or [{}]
    inputs = [found[i % len(found)] for i in range(needed)]
    check_call(pipe, inputs, config.call)
    return inputs


@contextmanager
def _shown(config: TuneConfig) -> Iterator[Any]:
    """One bar for all, of evaluations."""
    total = sum(map(config.budget, config.steps))
    shown = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} evaluations [{elapsed}<{remaining}]"
    with tqdm(total=total, bar_format=shown) as bar:
        yield bar
        bar.set_description("done")
        bar.total = max(bar.n, 1)
        bar.refresh()
