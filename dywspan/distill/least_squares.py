"""Learn a solver without gradients: its loss is a sum of squares of few numbers' effects.

    minimise  F(p) = mean over terms of log F_n(p) + ridge |p - p_0|^2,    a term for each number of steps, and call
              F_n  = mean over pairs of |r_n(p)|^2,                   r the residuals whose squares are the loss

An update sees a batch of pairs where the numbers are p_b, and keeps what it shows, J = dr/dp, as a quadratic of p in
which those of the batches before fade away; it goes to the least of that:

    M <- (1 - a) M + a mean over terms of [r - J p_b, J]'[r - J p_b, J] / F_n,          a = (1 - m) / (1 - m^b)
    p <- p + argmin over step of [1, p + step]' M [1, p + step] + ridge |p + step - p_0|^2 + damping |step|_D^2

with m = ``MEMORY`` and D = diag(M). So every J is of pairs that have not been seen at p_b, and none is computed twice.
A step that raises F on the next batch by over ``TOLERANCE`` is tried again, shorter. Where every batch is all pairs,
:mod:`.secant` takes over.

J comes from differences, column by column, of whole samplings through the pipeline's own call: any pipeline that can
sample can be learned from, quantised, compiled or offloaded, in the memory that sampling needs. A number at step k
changes nothing before it, so earlier denoiser outputs are replayed; the last row of weights costs no evaluation at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.table import InvalidSolverError
from ..pipelines.memory import Parts
from ..pipelines.pairs import Pairs
from ..pipelines.precision import PRECISIONS, autocast
from ..pipelines.processes import is_main, share, total
from ..pipelines.replay import Replay, Tape
from ..pipelines.rollout import denoisers, sample
from .config import LearningConfig
from .losses import Loss, residuals_of
from .progress import Method, Progress
from .student import Student
from .task import Term

# Step of the differences: wide enough to stand out of the rounding of the network's outputs, and to average over the
# fast oscillations of time embeddings.
DIFFERENCE = {torch.float64: 1e-4, torch.float32: 1e-2, torch.bfloat16: 3e-2, torch.float16: 3e-2}
MEMORY = 0.6  # what a batch counts for after each further one; less where there are few, so that none counts twice
TOLERANCE = 0.05  # of F, of the next batch: few pairs vary by more
ATTEMPTS = 5


@dataclass(frozen=True)
class Sampled:
    """Some pairs of a batch, sampled.

    Attributes:
        term: its place.
        endpoint: where they ended.
        tape: the denoiser's calls, see :class:`Replay`.
        student, chain: what is moved number by number to see how the endpoint changes, see :meth:`Student.local`.
    """

    term: int
    pairs: Pairs
    endpoint: Tensor
    tape: Tape
    student: Student
    chain: Tensor | None


class Problem:
    """F and its quadratic model, over terms and processes.

    Attributes:
        memory: m.
        model: (1 + P, 1 + P) M.
        weight: what the batches in it count for, 1 + m + m^2 + ...
    """

    def __init__(
        self,
        pipe: Any,
        student: Student,
        terms: Sequence[Term],
        *,
        config: LearningConfig,
        loss: Loss,
        parts: Parts | None = None,
    ) -> None:
        self.pipe, self.student, self.terms = pipe, student, list(terms)
        self.parts = parts or Parts(config.micro_batch_size, "pairs of an update", "micro_batch_size")
        self.config, self.residuals = config, residuals_of(loss)
        self.sources = [term.source(config.seed) for term in terms]
        self.memory = min(MEMORY, max(0.0, 1 - config.batch_size / most_pairs(terms)))
        self.replay, self.replays = Replay(pipe), True
        self.origin = student.vector()
        self.difference = config.difference or DIFFERENCE[self._precision()]
        size = 1 + len(self.origin)
        self.model, self.weight = torch.zeros(size, size, dtype=torch.float64), 0.0

    def batch(self, update: int) -> list[Pairs]:
        """This process's part of an update's pairs, of each term."""
        size = self.config.batch_size
        positions = share(range(update * size, (update + 1) * size))
        return [source(positions) for source in self.sources]

    def sample(self, batch: Sequence[Pairs]) -> list[Sampled]:
        """What a batch is sampled to where the student is; nothing if its numbers are no solver."""
        try:
            with self.replay.installed():
                return [own for k, pairs in enumerate(batch) for own in self._sampled(k, pairs)]
        except InvalidSolverError:  # whatever the pairs, so on every process
            return []

    def _sampled(self, k: int, pairs: Pairs) -> list[Sampled]:
        """Of one term, in parts that fit into memory."""

        def sampled(positions: Sequence[int]) -> Sampled:
            part = pairs.choose(positions)
            with self.replay.recording() as tape:
                endpoint = self._endpoint(self.student, self.terms[k], part)
            # Now: it depends on the grid and the guidance scale, which the pipeline's call may choose.
            return Sampled(k, part, endpoint, tape, *self.student.local(self.terms[k].steps))

        return self.parts.run(len(pairs), sampled)

    def losses(self, sampled: Sequence[Sampled]) -> Tensor:
        """(terms,) F_n."""
        sums = torch.zeros(len(self.terms), dtype=torch.float64)
        for own in sampled:
            sums[own.term] += self._residuals(own.endpoint, own.pairs).double().square().sum().cpu()
        return self.mean(sums)

    def value(self, sampled: Sequence[Sampled]) -> float:
        """F where the student is and these were sampled; infinite of nothing."""
        pull = float((self.student.vector() - self.origin).square().sum())
        logs = self.losses(sampled).clamp(min=1e-30).log()
        return float(logs.mean()) + self.config.ridge * pull if sampled else math.inf

    def see(self, sampled: Sequence[Sampled]) -> None:
        """Take what these pairs show into the model; the student is where they were sampled."""
        size = len(self.model)
        products = torch.zeros(len(self.terms), size, size, dtype=torch.float64)
        for k, columns in self._seen(sampled):
            products[k] += columns.double() @ columns.double().T
        self.model = self.memory * self.model + self.model_of(products)
        self.weight = self.memory * self.weight + 1

    def model_of(self, products: Tensor) -> Tensor:
        """(1 + P, 1 + P) F as a quadratic of the numbers, of (terms, ...) [r, J]'[r, J] where the student is."""
        means = self.mean(products)
        return _shifted((means / means[:, :1, :1].clamp(min=1e-30)).mean(0), -self.student.vector())

    def jacobian(self, sampled: Sequence[Sampled]) -> list[Tensor]:
        """By term, (1 + P, B * R) [r, J]' of all its pairs in their order, on the CPU."""
        found: list[list[Tensor]] = [[] for _ in self.terms]
        for k, columns in self._seen(sampled):
            found[k].append(columns)
        return [torch.cat(own, dim=1) for own in found]

    def residuals_there(self, sampled: Sequence[Sampled]) -> list[Tensor]:
        """By term, (B * R,) r of all its pairs in their order, on the CPU."""
        found: list[list[Tensor]] = [[] for _ in self.terms]
        for own in sampled:
            found[own.term].append(self._residuals(own.endpoint, own.pairs).cpu())
        return [torch.cat(own) for own in found]

    def _seen(self, sampled: Sequence[Sampled]) -> Iterator[tuple[int, Tensor]]:
        """The term and the columns of all these pairs, part by part."""
        with self.replay.installed():
            for own in sampled:
                for found in self.parts.run(len(own.pairs), partial(self._columns_of, own)):
                    yield from ((own.term, columns) for columns in found)

    def _columns_of(self, sampled: Sampled, positions: Sequence[int]) -> list[Tensor]:
        """Of some of these pairs; sampled anew if all were too many for the memory."""
        whole = len(positions) == len(sampled.pairs)
        again = [sampled] if whole else self._sampled(sampled.term, sampled.pairs.choose(positions))
        return [self.columns(own).cpu() for own in again]

    def target(self, damping: float) -> Tensor:
        """(P,) the least of the model, damped, within the student's bounds."""
        at, ridge = self.student.vector(), self.config.ridge
        near = _shifted(self.model / self.weight, at)
        gradient, matrix = near[0, 1:] + ridge * (at - self.origin), near[1:, 1:]
        diagonal = matrix.diagonal().clamp(min=1e-9 * float(matrix.diagonal().max()))
        matrix = matrix + torch.diag(damping * diagonal + ridge)
        return _solution(self.student, at, matrix, gradient)

    def columns(self, sampled: Sampled) -> Tensor:
        """(1 + P, B * R): the residuals of some pairs, and how each number changes them."""
        student, at = sampled.student, sampled.student.vector()
        residuals = self._residuals(sampled.endpoint, sampled.pairs)
        columns = residuals.new_empty(1 + len(at), len(residuals))
        columns[0] = residuals
        for c in range(len(at)):
            columns[1 + c] = self._column(sampled, residuals, at, c)
        student.move(at)
        chain = sampled.chain
        return columns if chain is None else torch.cat([columns[:1], chain.T.to(columns) @ columns[1:]])

    def check_replay(self) -> None:
        """Compute one batch again: a network that answers otherwise than before cannot be replayed."""
        term, pairs = self._least()

        def repeats(positions: Sequence[int]) -> bool:
            first = self.student, term, pairs.choose(positions)
            with self.replay.recording() as tape:
                base = self._endpoint(*first)
            with self.replay.playing(tape):
                replayed = self._endpoint(*first)
            return torch.equal(base, replayed) and torch.equal(base, self._endpoint(*first))

        with self.replay.installed():
            self.replays = all(self.parts.run(len(pairs), repeats))
        if not self.replays and is_main():
            print(f"{type(self.pipe).__name__}'s network does not answer the same question the same way: no replay.")

    def _precision(self) -> torch.dtype:
        """The coarsest that a sampling passes through."""
        term, pairs = self._least()
        sampled = lambda positions: self._endpoint(self.student, term, pairs.choose(positions))  # noqa: E731
        endpoint, *_ = self.parts.run(len(pairs), sampled)
        networks = [getattr(m, "dtype", torch.bfloat16) for m in denoisers(self.pipe).values()]
        mixed = PRECISIONS[self.config.mixed_precision or "no"]
        passed = [d for d in (endpoint.dtype, mixed, *networks) if d is not None]
        # Quantised networks round as coarsely as bfloat16.
        return max((d if d in DIFFERENCE else torch.bfloat16 for d in passed), key=lambda d: DIFFERENCE[d])

    def _least(self) -> tuple[Term, Pairs]:
        """What takes the fewest steps, and some of its held-out pairs."""
        term = min(self.terms, key=lambda term: term.steps)
        return term, term.held_out[: self.parts.size or self.config.batch_size]

    def mean(self, sums: Tensor) -> Tensor:
        """Over an update's pairs, those of all processes."""
        return total(sums) / self.config.batch_size

    def _endpoint(self, student: Student, term: Term, part: Pairs) -> Tensor:
        with torch.no_grad(), autocast(self.pipe, self.config.mixed_precision):
            student.apply()
            student.scheduler.whole = term.whole
            return sample(self.pipe, student.scheduler, term.steps, part.inputs, part.seeds, term.call)[0]

    def _residuals(self, endpoint: Tensor, part: Pairs, near: Tensor | None = None) -> Tensor:
        """(B * R,), weighed as they are where the endpoint is ``near``."""
        wide = torch.float64 if endpoint.dtype == torch.float64 else torch.float32
        with torch.no_grad():
            ends = (endpoint, part.endpoints.to(endpoint.device), endpoint if near is None else near)
            return self.residuals(self.pipe, *(z.to(wide) for z in ends)).flatten()

    def _column(self, sampled: Sampled, residuals: Tensor, at: Tensor, c: int, side: int = 1) -> Tensor:
        """How number c changes the residuals; seen from its other side at a bound, and at the edge of what samples."""
        student, size = sampled.student, side * self.difference * max(1.0, abs(float(at[c])))
        student.move(at + size * torch.eye(len(at), dtype=at.dtype)[c])
        moved = float(student.vector()[c] - at[c])
        try:
            if abs(moved) < abs(size) / 2:
                raise InvalidSolverError(f"The bounds are narrower than differences of {abs(size):g}: widen bounded.")
            with self.replay.playing(sampled.tape) if self.replays else nullcontext():
                endpoint = self._endpoint(student, self.terms[sampled.term], sampled.pairs)
            return (self._residuals(endpoint, sampled.pairs, sampled.endpoint) - residuals) / moved
        except InvalidSolverError:
            if side < 0:
                raise
        return self._column(sampled, residuals, at, c, -1)


def most_pairs(terms: Sequence[Term]) -> float:
    """Pairs that there are to learn from, of the term that has most; infinite where they are drawn anew."""
    return max(len(term.train) if isinstance(term.train, Pairs) else math.inf for term in terms)


def prepared(progress: Progress, origin: Any) -> Problem:
    """What a run solves; the student is left where it was.

    Args:
        origin: numbers that the ridge pulls to.
    """
    task, student = progress.task, progress.student
    now = student.snapshot()
    student.restore(origin)
    # What a run that was stopped repeats is no part of what learning costs.
    with progress.meter.counting("again" if progress.update else "jacobian"):
        problem = Problem(task.pipe, student, task.terms, config=task.config, loss=task.loss, parts=progress.parts)
        student.restore(now)
        if not progress.ended:
            problem.check_replay()
    return problem


class LeastSquares(Method):
    """Few updates, of forward passes only, see the module's docstring.

    Raises:
        ValueError: the pairs are paths, or the loss is no sum of squares.
        FloatingPointError: the loss is not finite where an update starts.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress, self.student = progress, progress.student
        self.origin = self.student.snapshot()
        self.sampled: list[Sampled] = []
        self.damping = 1.0

    def begin(self) -> None:
        progress = self.progress
        self.problem = prepared(progress, self.origin)
        self.damping, *state = progress.own.get("model", [1.0])
        if state:
            self.problem.weight, self.problem.model = state[0], torch.tensor(state[1], dtype=torch.float64)
        if progress.ended:
            return
        with progress.meter.counting("again" if progress.update else "fresh"):
            batch = self.problem.batch(progress.update)
        with progress.meter.counting("again" if progress.update else "jacobian"):
            self.sampled = self.problem.sample(batch)

    def step(self, update: int) -> dict[str, float]:
        progress, problem, student = self.progress, self.problem, self.student
        losses = problem.losses(self.sampled)
        if not self.sampled or not bool(losses.isfinite().all()):
            raise FloatingPointError(f"The loss is {losses.tolist()} at update {update}: use another init.")
        with progress.meter.counting("fresh"):
            batch = problem.batch(update + 1)
        with progress.meter.counting("jacobian"):
            problem.see(self.sampled)
            here, self.sampled = student.snapshot(), problem.sample(batch)
            most = problem.value(self.sampled) + math.log1p(TOLERANCE)
            for _ in range(ATTEMPTS):
                student.move(problem.target(self.damping))
                there = problem.sample(batch)
                if problem.value(there) < most:
                    self.sampled, self.damping = there, self.damping / 4
                    break
                student.restore(here)
                self.damping *= 10
        progress.own = {"model": [self.damping, problem.weight, problem.model.tolist()]}
        shown = {f"loss/{term.name}": float(loss) for term, loss in zip(problem.terms, losses)}
        return shown | {"damping": self.damping}


def _shifted(model: Tensor, by: Tensor) -> Tensor:
    """(1 + P, 1 + P): [r, J]'[r, J] as a quadratic of p becomes one of p - by."""
    shift = torch.eye(len(model), dtype=model.dtype)
    shift[1:, 0] = by
    return shift.T @ model @ shift


def _solution(student: Student, at: Tensor, matrix: Tensor, gradient: Tensor) -> Tensor:
    """at + step, matrix step = -gradient, where numbers that would pass their bounds stay there."""
    free, step, here = torch.ones(len(at), dtype=torch.bool), torch.zeros_like(at), student.snapshot()
    while free.any():
        fixed = matrix[:, ~free] @ step[~free]
        step[free] = torch.linalg.solve(matrix[free][:, free], -(gradient + fixed)[free])
        student.move(at + step)
        moved = student.vector() - at
        stopped = free & ((moved - step).abs() > 1e-9)
        step[stopped], free = moved[stopped], free & ~stopped
        if not stopped.any():
            break
    student.restore(here)
    return at + step
