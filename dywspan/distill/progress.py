"""What every way of learning shares: held-out errors, the best solver so far, its cost, going on after a stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from ..core.table import InvalidSolverError
from ..pipelines.pairs import Pairs, Source, shuffled
from ..pipelines.precision import autocast
from ..pipelines.processes import in_turn, is_main, total
from ..pipelines.replay import Meter
from ..pipelines.rollout import sample
from .checkpoints import Checkpoints
from .config import LearningConfig
from .losses import Loss, latent_mse
from .student import Student

Log = Callable[[Mapping[str, float], int], None]
# What is counted, in denoiser evaluations: a backward pass takes two. Teacher pairs made while learning are "fresh".
WORTH = {"fresh": 1, "student": 1, "jacobian": 1, "backward": 2, "held_out": 1}
BACK, TRIES = 0.2, 20  # of the way back to the best numbers, and how often, until some are a solver
T = TypeVar("T")


@dataclass(frozen=True)
class Term:
    """One of the samplings that a solver is learned for, all of which weigh alike.

    Attributes:
        steps: number of steps.
        call: arguments of the pipeline's call.
        train, held_out: teacher pairs made with this call; of several terms as many.
        variant: its name, where calls differ.
        guidance_scale: of the call, where terms differ in it.
        whole: steps of the whole way, where these are the end of it only, as in img2img; the pairs start there.
    """

    steps: int
    call: Mapping[str, Any]
    train: Pairs | Source
    held_out: Pairs
    variant: str | None = None
    guidance_scale: float | None = None
    whole: int | None = None

    @property
    def name(self) -> str:
        """ "5", "5 @ large" for a variant, or "3/5" for the last three of five steps."""
        name = f"{self.steps}" if self.whole is None else f"{self.steps}/{self.whole}"
        return name if self.variant is None else f"{name} @ {self.variant}"

    def source(self, seed: int) -> Source:
        """Its pairs without end: shuffled anew each time through, or made when they are asked for."""
        return shuffled(self.train, seed) if isinstance(self.train, Pairs) else self.train


@torch.no_grad()
def endpoint_error(
    pipe: Any,
    scheduler: Any,
    steps: int,
    pairs: Pairs,
    call: Mapping[str, Any],
    batch_size: int = 16,
    loss: Loss = latent_mse,
) -> float:
    """The loss of a scheduler's endpoints, averaged over ``pairs``, which the processes share."""
    starts = range(0, len(pairs), batch_size)
    error = torch.zeros((), dtype=torch.float64, device=pipe.device)
    for j, counts in in_turn(len(starts)):
        part = pairs[starts[j] : starts[j] + batch_size]
        endpoint, _ = sample(pipe, scheduler, steps, part.inputs, part.seeds, call)
        value = loss(pipe, endpoint.float(), part.endpoints.to(endpoint.device))
        error += counts * len(part) * value.to(error)
    return float(total(error)) / len(pairs)


class Progress:
    """The course of one learning run.

    Attributes:
        update: how many updates are done.
        start: held-out loss of the untrained solver by term, in the precision of learning.
        best: the parameters that were best on the held-out pairs, by the geometric mean over terms of the loss relative
            to the start's, ``best_error``, that mean, and ``found``, their losses.
        meter: denoiser evaluations spent.
        curve: held-out losses in the order of ``terms``, at the start and whenever they were the best so far, by what
            was :meth:`spent` until then.
    """

    def __init__(
        self,
        pipe: Any,
        student: Student,
        terms: Sequence[Term],
        *,
        config: LearningConfig,
        loss: Loss,
        checkpoints: Checkpoints | None = None,
        log: Log | None = None,
    ) -> None:
        self.pipe, self.student, self.terms, self.config, self.loss = pipe, student, list(terms), config, loss
        self.checkpoints, self.log = checkpoints, log
        self.meter, self.started, self.seconds = Meter(pipe), time.monotonic(), 0.0
        self.update, self.best_error, self.stale, self.checked = 0, 1.0, 0, 0
        self.ended = self.taken_back = False
        self.before: dict[str, float] = {}
        self.start: dict[str, float] = {}
        self.after: dict[str, float] | None = None
        self.last: dict[str, float] = {}
        self.found: dict[str, float] = {}
        self.curve: dict[int, list[float]] = {}
        self.own: dict[str, Any] = {}  # what a way of learning keeps besides
        self.best = student.snapshot()

    def begin(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Go on from the latest checkpoint, or measure where learning starts."""
        saved = self.checkpoints.latest() if self.checkpoints else None
        if saved is None:
            self.before = self.errors("no")
            self.start = self.before if self._in_full else self.errors(self.config.mixed_precision)
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
        return self.config.mixed_precision in (None, "no")

    @property
    def label(self) -> str:
        """What is learned."""
        return f"{', '.join(term.name for term in self.terms)} steps"

    def errors(self, precision: str | None) -> dict[str, float]:
        """Held-out loss by term."""
        with torch.no_grad():
            self.student.apply()
        with autocast(self.pipe, precision), self.meter.counting("held_out"):
            pipe, scheduler, errors = self.pipe, self.student.scheduler, {}
            for t in self.terms:
                scheduler.whole = t.whole
                errors[t.name] = endpoint_error(pipe, scheduler, t.steps, t.held_out, t.call, loss=self.loss)
                self.checked += len(t.held_out) * t.steps
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
        self.last = self.valid(lambda: self.errors(self.config.mixed_precision))
        ratios = [max(self.last[name] / (start or 1.0), 1e-30) for name, start in self.start.items()]
        mean = math.prod(ratios) ** (1 / len(ratios))
        self.stale += 1
        if mean < self.best_error:
            self.best, self.best_error, self.stale, self.found = self.student.snapshot(), mean, 0, self.last
            self.curve[self.spent()] = [*self.last.values()]
        return bool(self.config.patience) and self.stale >= self.config.patience

    def save(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Write a checkpoint."""
        if self.checkpoints is not None:
            facts = {name: getattr(self, name) for name in _KEPT} | {"counts": dict(self.meter.counts)}
            facts["seconds"] = self._seconds()
            self.checkpoints.save(self.student.parameters(), self.best, optimizer, facts)

    def run(self, step: Callable[[int], Mapping[str, float]], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Do the updates that are left: ``step(update)``, which says what to show of it; then measure, and save.

        Ends with the best parameters, when all are done or patience is at its end.
        """
        config, checkpoints = self.config, self.checkpoints
        updates = config.number("updates")
        left = range(self.update, 0 if self.ended else updates)
        bar = tqdm(left, self.label, initial=self.update, total=updates, disable=not left or not is_main())
        for update in bar:
            numbers = step(update)
            self.update, self.ended = update + 1, update + 1 == updates
            if self.update % config.number("evaluate_every") == 0 or self.ended:
                self.ended = self.evaluate() or self.ended
            self.report(bar, **numbers)
            if self.ended or (checkpoints is not None and self.update % checkpoints.every == 0):
                self.save(optimizer)
            if self.ended:
                break
        bar.close()
        self.finish(optimizer)

    def report(self, bar: Any, **numbers: float) -> None:
        """Show and log where learning is, after an update."""
        held_out = " ".join(f"{e:.4f}" for e in self.last.values())
        loss = " ".join(f"{v:.4f}" for k, v in numbers.items() if k.startswith("loss"))
        bar.set_postfix(loss=loss, held_out=held_out, best=f"{self.best_error:.3f} of the start")
        if self.log is not None:
            self.log(numbers | {f"held_out/{name}": e for name, e in self.last.items()}, self.update)

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put the best parameters back, with their losses in full precision."""
        self.student.restore(self.best)
        if self.after is None:
            self.after = self.found if self._in_full else self.errors("no")
            self.save(optimizer)

    def errors_by_term(self) -> dict[str, dict[str, Any]]:
        """Held-out loss before and after learning, in full precision, and :attr:`curve`, in that of learning."""
        assert self.after is not None
        spent, losses = [*self.curve], [*zip(*self.curve.values())] or [()] * len(self.terms)
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
        return sum(WORTH[name] * count for name, count in self._counts().items())

    def _counts(self) -> dict[str, int]:
        counts = torch.tensor([self.meter.counts[name] for name in WORTH], device=self.pipe.device)
        return dict(zip(WORTH, total(counts).tolist()))

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self.started


_KEPT = {
    "update",
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
    "own",
    "seconds",
}
