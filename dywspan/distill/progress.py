"""What every way of learning shares: held-out errors, the best solver so far, its cost, going on after a stop."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.table import InvalidSolverError
from ..pipelines.memory import Parts, is_sharded
from ..pipelines.pairs import Pairs
from ..pipelines.precision import autocast
from ..pipelines.processes import in_turn, is_main, total
from ..pipelines.replay import Meter
from ..pipelines.rollout import sample
from .checkpoints import Checkpoints
from .losses import Loss, latent_mse
from .provenance import provenance
from .student import Student
from .task import Task, Term

Log = Callable[[Mapping[str, float], int], None]
Show = Callable[[Any, int], None]
# What denoiser evaluations are counted for. With frozen weights a backward pass takes the time of about one (measured:
# 0.96 and 1.03), and counts as one. Teacher pairs made while learning are "fresh".
PURPOSES = ("fresh", "student", "jacobian", "backward", "held_out")
BACK, TRIES = 0.2, 20  # of the way back to the best numbers, and how often, until some are a solver
T = TypeVar("T")


@torch.no_grad()
def endpoint_error(
    pipe: Any,
    scheduler: Any,
    steps: int,
    pairs: Pairs,
    call: Mapping[str, Any],
    batch_size: int = 16,
    loss: Loss = latent_mse,
    parts: Parts | None = None,
) -> float:
    """The loss of a scheduler's endpoints, averaged over ``pairs``, which the processes share.

    Args:
        parts: how many samples are computed at a time, of the ``batch_size`` that a process takes in turn.
    """
    parts = parts or Parts(None, "held-out samples", "batch_size")
    starts = range(0, len(pairs), batch_size)
    error = torch.zeros((), dtype=torch.float64)

    def computed(positions: Sequence[int]) -> Tensor:
        part = pairs.choose(positions)
        endpoint, _ = sample(pipe, scheduler, steps, part.inputs, part.seeds, call)
        return len(part) * loss(pipe, endpoint.float(), part.endpoints.to(endpoint.device)).cpu().double()

    quiet: dict[str, Any] = {"leave": False, "delay": 5, "disable": not is_main()}
    for j, counts in tqdm(in_turn(len(starts)), f"{steps} steps, held out", **quiet):
        own = range(starts[j], min(starts[j] + batch_size, len(pairs)))
        error += counts * sum(parts.run(own, computed))
    return float(total(error)) / len(pairs)


class Progress:
    """The course of one learning run.

    Attributes:
        update: how many updates are done; ``best_update``, how many were when the best solver was found.
        start: held-out loss of the untrained solver by term, in the precision of learning.
        best: the parameters that were best on the held-out pairs, by the geometric mean over terms of the loss relative
            to the start's, ``best_error``, that mean, and ``found``, their losses.
        meter: denoiser evaluations spent.
        curve: held-out losses in the order of ``terms``, at the start and whenever they were the best so far, by what
            was :meth:`spent` until then.
    """

    def __init__(
        self,
        task: Task,
        student: Student,
        checkpoints: Checkpoints | None = None,
        log: Log | None = None,
        show: Show | None = None,
        quiet: bool = False,
    ) -> None:
        self.quiet = quiet or not is_main()
        self.task, self.student, self.checkpoints, self.log, self.show = task, student, checkpoints, log, show
        self.meter, self.started, self.seconds = Meter(task.pipe), time.monotonic(), 0.0
        sharded = is_sharded(task.pipe)
        size = task.config.micro_batch_size
        self.parts = Parts(size, "pairs of an update", "micro_batch_size", sharded=sharded)
        self.held_out_parts = Parts(size, "held-out pairs", "micro_batch_size", sharded=sharded)
        self.update, self.best_update, self.best_error, self.stale, self.checked = 0, 0, 1.0, 0, 0
        self.ended = self.taken_back = False
        self.before: dict[str, float] = {}
        self.start: dict[str, float] = {}
        self.after: dict[str, float] | None = None
        self.last: dict[str, float] = {}
        self.found: dict[str, float] = {}
        self.curve: dict[int, list[float]] = {}
        self.own: dict[str, Any] = {}  # what a way of learning keeps besides
        self.first = self.best = student.snapshot()
        self.tested: dict[str, dict[str, Any]] = {}  # by term: how many pairs, and losses before and after learning

    def begin(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Go on from the latest checkpoint, or measure where learning starts."""
        saved = self.checkpoints.latest() if self.checkpoints else None
        if saved is None:
            self.before = self.errors("no")
            self.start = self.before if self._in_full else self.errors(self.task.config.mixed_precision)
            self.last = self.found = self.start
            self.curve[self.spent()] = [*self.before.values()]
            return
        for name in saved.facts.keys() & _KEPT:
            setattr(self, name, saved.facts[name])
        self.meter.counts.update(saved.facts["counts"])
        self.best = saved.restore(self.student.parameters(), optimizer)

    @property
    def _in_full(self) -> bool:
        """Whether learning's precision is the pipeline's own."""
        return self.task.config.mixed_precision in (None, "no")

    @property
    def peak_rate(self) -> float:
        """Of gradients."""
        return self.task.config.lr or self.student.lr

    @property
    def label(self) -> str:
        """What is learned."""
        part = f" ({self.task.part})" if self.task.part else ""
        return f"{', '.join(term.name for term in self.task.terms)} steps{part}"

    def errors(self, precision: str | None, pairs: str = "held_out") -> dict[str, float]:
        """Loss by term, on pairs of it: "held_out" ones, or those to "test" on, of terms that have some."""
        with torch.no_grad():
            self.student.apply()
        task, scheduler, errors = self.task, self.student.scheduler, {}
        options: dict[str, Any] = {"loss": task.loss, "parts": self.held_out_parts}
        with autocast(task.pipe, precision), self.meter.counting(pairs):
            for t in self.task.terms:
                if (own := getattr(t, pairs)) is not None:
                    scheduler.whole = t.whole
                    errors[t.name] = endpoint_error(task.pipe, scheduler, t.steps, own, t.call, **options)
                    self.checked += len(own) * t.steps if pairs == "held_out" else 0
            return errors

    def valid(self, sampled: Callable[[], T]) -> T:
        """What ``sampled`` returns; parameters that make no solver go back towards the best until they make one.

        It is found out before the network is asked.
        """
        for _ in range(TRIES):
            try:
                return sampled()
            except InvalidSolverError as error:
                if not self.taken_back and is_main():
                    tqdm.write(f"Update {self.update} made no solver and is taken back, as all such. Lower lr? {error}")
                self.taken_back = True
                self.student.approach(self.best, BACK)
        self.student.restore(self.best)
        return sampled()

    def evaluate(self) -> bool:
        """Measure the parameters as they are and keep them if they are the best; whether patience is at its end."""
        self.last = self.valid(lambda: self.errors(self.task.config.mixed_precision))
        ratios = [max(self.last[name] / (start or 1.0), 1e-30) for name, start in self.start.items()]
        mean = math.prod(ratios) ** (1 / len(ratios))
        self.stale += 1
        if mean < self.best_error:
            self.best, self.best_error, self.stale, self.found = self.student.snapshot(), mean, 0, self.last
            self.best_update = self.update
            self.curve[self.spent()] = [*self.last.values()]
            if self.show is not None:
                self.student.scheduler.whole = None
                with self.meter.counting("pictures"):
                    self.show(self.student.scheduler, self.update)
        return bool(self.task.config.patience) and self.stale >= self.task.config.patience

    def save(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Write a checkpoint."""
        if self.checkpoints is not None:
            facts = {name: getattr(self, name) for name in _KEPT} | {"counts": dict(self.meter.counts)}
            facts["seconds"] = self._seconds()
            self.checkpoints.save(self.student.parameters(), self.best, optimizer, facts)

    def updates(self) -> Iterator[int]:
        """The updates that are left, until all are done or patience is at its end."""
        most = self.task.config.number("updates")
        left = range(self.update, 0 if self.ended else most)
        with tqdm(total=most, initial=self.update, desc=self.label, disable=not left or self.quiet) as self.bar:
            for update in left:
                yield update
                if self.ended:
                    return

    def done(self, numbers: Mapping[str, float], optimizer: torch.optim.Optimizer | None = None) -> None:
        """An update is done: measure, show and save, each when it is time.

        Raises:
            FloatingPointError: it could be done, but a held-out loss is not finite where learning started.
        """
        config, checkpoints = self.task.config, self.checkpoints
        for term in self.task.terms:
            if not math.isfinite(self.start[term.name]):
                raise FloatingPointError(f"Held out: {where_it_broke(self, term, term.held_out[:4], self.peak_rate)}")
        self.update += 1
        self.ended = self.update == config.number("updates")
        if self.update % config.number("evaluate_every") == 0 or self.ended:
            self.ended = self.evaluate() or self.ended
        self.report(numbers)
        if self.ended or (checkpoints is not None and self.update % checkpoints.every == 0):
            self.save(optimizer)

    def report(self, numbers: Mapping[str, float]) -> None:
        """Show and log where learning is, after an update."""
        held_out = " ".join(f"{e:.4f}" for e in self.last.values())
        loss = " ".join(f"{v:.4f}" for k, v in numbers.items() if k.startswith("loss"))
        self.bar.update()
        shown = {"loss": loss, "held_out": held_out, "best": f"{self.best_error:.3f} of the start"}
        if self.task.later:
            whole = self._seconds() / self.update * self.task.config.number("updates")
            left = whole * (1 + self.task.later) - self._seconds()
            shown["all"] = f"{tqdm.format_interval(max(left, 0))} left"
        self.bar.set_postfix(shown)
        if self.log is not None:
            self.log({**numbers} | {f"held_out/{name}": e for name, e in self.last.items()}, self.update)

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put the best parameters back, with their losses in full precision, and those on the pairs to test on."""
        known, pairs = (self.after, self.tested), {t.name: len(t.test) for t in self.task.terms if t.test is not None}
        if {name: found["pairs"] for name, found in self.tested.items()} != pairs:
            first, best = self._tested(self.first), self._tested(self.best)
            self.tested = {name: {"pairs": n, "before": first[name], "after": best[name]} for name, n in pairs.items()}
        self.student.restore(self.best)
        if self.after is None:
            self.after = self.found if self._in_full else self.errors("no")
        if known != (self.after, self.tested):
            self.save(optimizer)

    def _tested(self, numbers: Any) -> dict[str, float]:
        self.student.restore(numbers)
        return self.errors("no", "test")

    def provenance(self, name: str | None = None) -> dict[str, Any]:
        """Where what was learned comes from, with the errors of one term, or of all by name."""
        errors = {"held_out_error": self._errors_by_term(), "test_error": self.tested}
        own = {kind: by if name is None else by[name] for kind, by in errors.items() if by}
        return provenance(self.task, self.peak_rate, own, self.cost())

    def _errors_by_term(self) -> dict[str, dict[str, Any]]:
        """Held-out loss before and after learning, in full precision, and :attr:`curve`, in that of learning."""
        assert self.after is not None
        spent, losses = [*self.curve], [*zip(*self.curve.values())] or [()] * len(self.task.terms)
        return {
            name: {"before": before, "after": self.after[name], "curve": [spent, [*values]]}
            for (name, before), values in zip(self.before.items(), losses)
        }

    def cost(self) -> dict[str, int | float]:
        """Denoiser evaluations of all processes by purpose, how many a step of one sample takes, and seconds."""
        counts = self._counts()
        cost: dict[str, int | float] = {name: count for name, count in counts.items() if count}
        cost |= {"per_step": round(counts["held_out"] / self.checked, 2), "seconds": round(self._seconds(), 1)}
        return cost

    def spent(self) -> int:
        """What learning took until now, held-out checks included, as so many denoiser evaluations."""
        return sum(self._counts().values())

    def _counts(self) -> dict[str, int]:
        counts = torch.tensor([self.meter.counts[name] for name in PURPOSES])
        return dict(zip(PURPOSES, total(counts).tolist()))

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self.started


_KEPT = {
    "update",
    "best_update",
    "ended",
    "best_error",
    "stale",
    "checked",
    "before",
    "start",
    "last",
    "found",
    "curve",
    "after",
    "tested",
    "own",
    "seconds",
}


class Method(ABC):
    """One way to move a student towards lower losses: it supplies the step, :func:`.trainer.learn` the loop.

    Attributes:
        optimizer: whose state is saved with the student's.
    """

    optimizer: Any = None

    @abstractmethod
    def __init__(self, progress: Progress) -> None:
        """The student is where its task starts."""

    def around(self) -> AbstractContextManager[Any]:
        """What holds while it learns."""
        return nullcontext()

    @abstractmethod
    def begin(self) -> None:
        """The student, the optimiser and ``progress.own`` are where learning continues."""

    @abstractmethod
    def step(self, update: int) -> Mapping[str, float]:
        """Do one update; says what to show of it."""


@torch.no_grad()
def where_it_broke(progress: Progress, term: Term, part: Pairs, rate: float) -> str:
    """What to say of a loss that is not finite: since which sampling step, and what to change."""
    task, scheduler, broken = progress.task, progress.student.scheduler, list[int]()
    config = task.config
    watch = lambda i, x: None if bool(x.isfinite().all()) else broken.append(i)  # noqa: E731
    with autocast(task.pipe, config.mixed_precision):
        sample(task.pipe, scheduler, term.steps, part.inputs, part.seeds, term.call, watch=watch)
    if broken:
        place = f"from sampling step {broken[0]} (sigma {float(scheduler.sigmas[broken[0]]):.4g}) on"
    else:
        place = "though every sampling step is finite: look at the teacher's endpoints and at the loss"
    return (
        f"The loss is not finite at update {progress.update} of the {term.name}-step solver, {place}; pairs with seeds "
        f"{list(part.seeds)}. Lower lr={rate}, start from another base than init={config.init!r}, or use a wider "
        f"mixed_precision than {config.mixed_precision or 'no'!r}."
    )
