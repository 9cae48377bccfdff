"""One method on one pipeline at one number of evaluations: learned at several rates, and the best of them kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import Bench, numbers
from methods import FREE, Lift, Method, Peer, PeerStudent

from dywspan.artifact import table_to_json, write_atomically
from dywspan.distill.checkpoints import Checkpoints
from dywspan.distill.config import LearningConfig
from dywspan.distill.progress import Progress
from dywspan.distill.student import Student
from dywspan.distill.task import Task
from dywspan.distill.trainer import learn
from dywspan.names import slug
from dywspan.pipelines.hashes import digest
from dywspan.schedulers.apply import load
from dywspan.schedulers.dyweight import DyWeightScheduler

SQUARES = "least squares"  # in place of a rate
STEP = 3.0  # from an outermost rate to the next one
ROUNDS = 2  # of turns, by least squares
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """What every method gets.

    Attributes:
        pairs, held_out: to learn from, and to choose by.
        updates: by gradients, of ``batch_size`` pairs.
        squares_updates: by least squares.
        checks: held-out evaluations on the way.
        most: rates that are tried at most, if the best is an outermost one.
        samples: to measure on.
    """

    pairs: int = 128
    held_out: int = 32
    updates: int = 64
    squares_updates: int = 16
    checks: int = 8
    batch_size: int = 8
    most: int = 5
    samples: int = 128

    def config(self, rate: float | None) -> LearningConfig:
        """Of a run; without a rate, of least squares."""
        updates = self.squares_updates if rate is None else self.updates
        options: dict[str, Any] = {"optimizer": "least_squares"} if rate is None else {"lr": rate}
        options |= {"updates": updates, "evaluate_every": max(1, updates // self.checks)}
        return LearningConfig(batch_size=self.batch_size, recompute=False, learn_base=True, order=2, **options)

    def evaluations(self, method: Method, n: int) -> int:
        """About how many of the network the first tries of a method take: a backward pass counts as one."""
        held_out = (self.checks + 1) * self.held_out * n
        gradients = 2 * self.updates * self.batch_size * n + held_out
        found = numbers(method, n)
        squares = self.squares_updates * self.batch_size * n * (2 + (found or 0) // 2) + held_out
        return len(method.rates) * gradients + method.squares * squares


@dataclass(frozen=True)
class Run:
    """What a try made.

    Attributes:
        facts: held-out error, updates, evaluations and seconds.
        folder: of its artefact.
    """

    facts: Mapping[str, Any]
    folder: Path

    @property
    def error(self) -> float:
        """Held out; infinite where learning failed."""
        return float("inf") if self.facts["held_out"] is None else self.facts["held_out"]

    def solver(self) -> Any:
        """The artefact."""
        return load(str(self.folder))


class Learning:
    """Learns methods on one bench; what is finished is found again.

    Args:
        bench: the pipeline at N evaluations.
        effort: what each method gets.
        folder: a folder for each run.
        tell: gets a line for each run.
    """

    def __init__(self, bench: Bench, effort: Effort, folder: Path, tell: Tell) -> None:
        self.bench, self.effort, self.folder, self.tell = bench, effort, folder, tell

    def best(self, method: Method, base: Run | None = None) -> tuple[Run, list[Run]]:
        """The try of the smallest held-out error, and all of them.

        More rates than the first are tried while the best is the lowest or the highest.

        Args:
            base: what SpanLift and TimeLift are learned on.

        Raises:
            FloatingPointError: no try made a solver.
        """
        tried = {rate: self.run(method, rate, base) for rate in method.rates}
        while len(tried) < self.effort.most:
            best = min(tried, key=lambda rate: tried[rate].error)
            if best not in (min(tried), max(tried)):
                break
            rate = float(f"{best * STEP if best == max(tried) else best / STEP:.2g}")
            tried[rate] = self.run(method, rate, base)
        runs = [*tried.values(), *([self.run(method, None, base)] if method.squares else [])]
        best_run = min(runs, key=lambda run: run.error)
        if best_run.facts["held_out"] is None:
            raise FloatingPointError(f"{method.name} learned nothing at any rate of {[*tried]}: give lower ones.")
        return best_run, runs

    def run(self, method: Method, rate: float | None, base: Run | None) -> Run:
        """One try: learned, gone on with, or found."""
        bench, config, below = self.bench, self.effort.config(rate), None if base is None else base.solver()
        start = bench.start(method, below)
        shared = [bench.opened.model, bench.opened.call, bench.opened.teacher.describe(), bench.n, asdict(config)]
        sizes = [len(bench.train), len(bench.held_out)]
        key = digest([*shared, *sizes, method.name, method.pairs, table_to_json(start)])
        label = SQUARES if rate is None else f"{rate:.3g}"
        folder = self.folder / slug(method.name) / f"{slug(label.replace('.', '_'))}-{key[:8]}"
        file = folder / "run.json"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            facts = {"lr": SQUARES if rate is None else rate, **self._learn(method, config, below, folder)}
            write_atomically(file, (json.dumps(facts, indent=1) + "\n").encode())
        facts = json.loads(file.read_text(encoding="utf-8"))
        self.tell(f"{method.name}, {label}: {said(facts)}")
        return Run(facts, folder)

    def _learn(
        self, method: Method, config: LearningConfig, base: DyWeightScheduler | None, folder: Path
    ) -> dict[str, Any]:
        task = self.bench.task(method, config, base)
        student = self.bench.student(method, task)
        count = parameters(method, student)
        try:
            course = _course(task, student, folder / "state")
        except FloatingPointError as error:  # this rate is too high
            return {"before": None, "held_out": None, "updates": None, "failed": str(error), "parameters": count}
        first, last = course[0], course[-1]
        student.result(last.provenance).save_pretrained(folder)
        (before,), (after,) = first.before.values(), (last.after or {}).values()
        return {
            "before": before,
            "held_out": after,
            "updates": sum(progress.best_update for progress in course),
            "parameters": count,
            "pairs": min(len(self.bench.train), method.pairs or len(self.bench.train)),
            "evaluations": sum(progress.spent() for progress in course) + self.bench.extra_evaluations(method),
            "seconds": round(sum(progress.cost()["seconds"] for progress in course), 1),
        }


def _course(task: Task, student: Student, folder: Path) -> list[Progress]:
    """Learning, from checkpoints where there are some; by least squares numbers that take turns move in runs of their
    own, one after the other.
    """
    config, runs = task.config, list[Progress]()
    turns: Sequence[Sequence[str]] = ()
    if isinstance(student, PeerStudent) and config.optimizer == "least_squares":
        turns = [*student.peer.turns] * ROUNDS
    updates = max(1, config.number("updates") // max(1, len(turns)))
    for k, names in enumerate(turns or [()]):
        if names and isinstance(student, PeerStudent):
            student.moving = names
        own = replace(task, config=replace(config, updates=updates))
        runs.append(learn(own, student, Checkpoints(folder / str(k), every=max(1, updates // 4), keep=1), quiet=True))
    return runs


def said(facts: Mapping[str, Any]) -> str:
    """A try in a line."""
    if facts["held_out"] is None:
        return "failed"
    return (
        f"held-out {facts['before']:.4f} -> {facts['held_out']:.4f} after {facts['updates']} updates, "
        f"{facts['evaluations']:,} evaluations, {facts['seconds']} s"
    )


def parameters(method: Method, student: Student) -> int:
    """Numbers that are learned: of a table those that exist, of the others all of their networks'."""
    if isinstance(method, Lift):
        return sum(p.numel() for p in student.parameters())
    return sum(int(mask.sum()) for _, mask in student.numbers())


def row(method: Method, run: Run, runs: list[Run], base: Run | None, n: int) -> dict[str, Any]:
    """What a method is and cost, SpanLift and TimeLift with the table below them, which TimeLift moves."""
    own = {key: run.facts[key] for key in ("parameters", "pairs", "evaluations", "seconds", "lr", "updates")}
    if base is not None:
        own = {k: v + base.facts[k] if k in ("evaluations", "seconds") else v for k, v in own.items()}
        if method.name == "SpanLift":
            own["parameters"] += base.facts["parameters"]
    tried = [{key: other.facts.get(key) for key in ("lr", "held_out", "updates", "evaluations")} for other in runs]
    sequential = sum(min(s, 2) for s in method.stages(n)) if isinstance(method, Peer) else n
    return {**own, "sequential": sequential, "tried": tried, "below": FREE if base is not None else None}
