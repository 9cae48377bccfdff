"""Learn a solver without gradients: its loss is a sum of squares of few numbers' effects.

    minimise  F(p) = mean over terms of log F_n(p) + ridge |p - p_0|^2,    a term for each number of steps, and call
              F_n  = mean over pairs of |r_n(p)|^2,                   r the residuals whose squares are the loss
    (A + ridge + damping diag(A)) step = -(g + ridge (p - p_0)),      Levenberg-Marquardt, where over terms
    A = mean of J'J / F_n,  g = mean of J'r / F_n:                    the logarithm lets few and many steps weigh alike

J comes from differences, column by column, of whole samplings through the pipeline's own call: any pipeline that can
sample can be learned from, quantised, compiled or offloaded, in the memory that sampling needs. A number at step k
changes nothing before it, so earlier denoiser outputs are replayed; the last row of weights costs no evaluation at all.
As long as steps gain, J is not computed anew but corrected by what the last one did, which its trial has already shown:

    J := J + (r(p + step) - r(p) - J step) step' / |step|^2                                                    Broyden
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .config import ITERATIONS, LearningConfig
from .losses import Loss, residuals_of
from .pairs import Pairs
from .processes import in_turn, is_main, total, world_size
from .progress import PRECISIONS, Progress, Term, autocast
from .replay import Replay
from .rollout import denoisers, sample
from .student import Student

# Step of the differences: wide enough to stand out of the rounding of the network's outputs, and to average over the
# fast oscillations of time embeddings.
DIFFERENCE = {torch.float64: 1e-4, torch.float32: 1e-2, torch.bfloat16: 3e-2, torch.float16: 3e-2}
ATTEMPTS = 5
LEAST_GAIN = 1e-4  # of the loss, relative: below it the fit has converged
FIRST_PAIRS, GROWTH, GROWTH_GAIN = 8, 4, 0.05  # pairs it begins with, four times as many where it gains less
SECANT_GAIN = 0.02  # below it the Jacobian is computed anew


@dataclass(frozen=True)
class Trial:
    """Where the student was tried.

    Attributes:
        at: (P,) its numbers.
        value: F; infinite if they are no solver.
        losses: F_n of each term.
        residuals: (B * R,) of this process's every batch, on the CPU.
    """

    at: Tensor
    value: float
    losses: Sequence[float] = ()
    residuals: Sequence[Tensor] = ()


class Problem:
    """F, its gradient and curvature at a point, summed over terms, pairs and processes.

    Attributes:
        jacobian: (1 + P, B * R) of every batch of every term, on the CPU: residuals, and how each number changes them.
        at: (P,) where it was computed, or corrected for.
    """

    def __init__(
        self,
        pipe: Any,
        student: Student,
        terms: Sequence[Term],
        *,
        config: LearningConfig,
        loss: Loss,
    ) -> None:
        self.pipe, self.student, self.terms = pipe, student, list(terms)
        self.config, self.residuals = config, residuals_of(loss)
        self.replay, self.replays = Replay(pipe), True
        self.origin = self.at = student.vector()
        self.difference = config.difference or DIFFERENCE[self._precision()]

    def move(self, vector: Tensor) -> Trial:
        """Sample with these numbers, or those nearest to them that the student may have."""
        self.student.move(vector)
        at = self.student.vector()
        try:
            with self.replay.installed():
                batches = self._batches()
                residuals = [self._run(self.student, term, term.pairs[part]).cpu() for _, term, part, _ in batches]
        except ValueError:  # numbers that are no solver: levels below zero
            return Trial(at, math.inf)
        losses = self._means([values.square().sum() for values in residuals]).tolist()
        return Trial(at, self._objective(losses), losses, residuals)

    def normal_equations(self, moved: Trial | None = None) -> tuple[Trial, Tensor, Tensor]:
        """F, (P,) half its gradient and (P, P) its curvature.

        Args:
            moved: a trial since the last ones, to correct their Jacobian by; None: a new one, where the student is.
        """
        if moved is None:
            self.jacobian = []  # freed before the new one is made
            with self.replay.installed():
                self.jacobian = [self.columns(term, term.pairs[part]).cpu() for _, term, part, _ in self._batches()]
            self.at = self.student.vector()
        else:
            step, self.at = moved.at - self.at, moved.at
            for columns, residuals in zip(self.jacobian, moved.residuals):
                direction = step.to(columns) / step.square().sum()
                missed = residuals - columns[0] - step.to(columns) @ columns[1:]
                columns[1:].addr_(direction, missed)
                columns[0] = residuals
        products = self._means([columns @ columns.T for columns in self.jacobian])  # [r, J]'[r, J]
        losses = products[:, 0, 0].tolist()
        mean = (products / products[:, :1, :1].clamp(min=1e-30)).mean(0)
        pull, eye = self.config.ridge, torch.eye(len(self.at), dtype=torch.float64)
        now = Trial(self.at, self._objective(losses), losses)
        return now, mean[0, 1:] + pull * (self.at - self.origin), mean[1:, 1:] + pull * eye

    def columns(self, term: Term, part: Pairs) -> Tensor:
        """(1 + P, B * R): the residuals of some pairs, and how each number changes them."""
        with self.replay.recording():
            base = self._run(self.student, term, part)
        student, chain = self.student.local(term.steps)  # afterwards: the call may have chosen the grid
        at = student.vector()
        columns = base.new_empty(1 + len(at), len(base))
        columns[0] = base
        for c in range(len(at)):
            columns[1 + c] = self._column(student, term, part, base, at, c)
        student.move(at)
        self.replay.tape = []
        return columns if chain is None else torch.cat([base[None], chain.T.to(base) @ columns[1:]])

    def check_replay(self) -> None:
        """Compute one batch again: a network that answers otherwise than before cannot be replayed."""
        first = self.student, *self._least()
        with self.replay.installed():
            with self.replay.recording():
                base = self._run(*first)
            with self.replay.playing():
                replayed = self._run(*first)
            again = self._run(*first)
        self.replays = torch.equal(base, replayed) and torch.equal(base, again)
        self.replay.tape = []
        if not self.replays and is_main():
            print(f"{type(self.pipe).__name__}'s network does not answer the same question the same way: no replay.")

    def _objective(self, losses: Sequence[float]) -> float:
        mean = sum(math.log(max(value, 1e-30)) for value in losses) / len(losses)
        return mean + self.config.ridge * float((self.student.vector() - self.origin).square().sum())

    def _precision(self) -> torch.dtype:
        """The coarsest that a sampling passes through."""
        endpoint, _ = self._endpoint(self.student, *self._least())
        networks = [getattr(m, "dtype", torch.bfloat16) for m in denoisers(self.pipe).values()]
        mixed = PRECISIONS[self.config.mixed_precision or "no"]
        passed = [d for d in (endpoint.dtype, mixed, *networks) if d is not None]
        # Quantised networks round as coarsely as bfloat16.
        return max((d if d in DIFFERENCE else torch.bfloat16 for d in passed), key=lambda d: DIFFERENCE[d])

    def _least(self) -> tuple[Term, Pairs]:
        """What takes the fewest steps, and a batch of it."""
        term = min(self.terms, key=lambda term: term.steps)
        return term, next(term.pairs[part] for _, own, part, _ in self._batches() if own is term)

    def _means(self, sums: Sequence[Tensor]) -> Tensor:
        """(terms, ...) float64: what this process's batches sum to, over all processes, by the pair."""
        means = torch.zeros(len(self.terms), *sums[0].shape, dtype=torch.float64)
        for (k, *_, counts), value in zip(self._batches(), sums):
            means[k] += counts * value.double()
        counts = torch.tensor([len(term.pairs) for term in self.terms])
        return total(means.to(self.pipe.device)).cpu() / counts.view(-1, *[1] * sums[0].ndim)

    def _endpoint(self, student: Student, term: Term, part: Pairs) -> tuple[Tensor, Any]:
        with torch.no_grad(), autocast(self.pipe, self.config.mixed_precision):
            student.apply()
            student.scheduler.whole = term.whole
            return sample(self.pipe, student.scheduler, term.steps, part.inputs, part.seeds, term.call)

    def _batches(self) -> list[tuple[int, Term, slice, int]]:
        """This process's: the term's place, the term, which of its pairs, and what they count."""
        most, found = self.config.micro_batch_size or self.config.batch_size, []
        for k, term in enumerate(self.terms):
            size = min(most, -(-len(term.pairs) // world_size()))  # a part for each
            turns = in_turn(-(-len(term.pairs) // size))
            found += [(k, term, slice(j * size, (j + 1) * size), counts) for j, counts in turns]
        return found

    def _run(self, student: Student, term: Term, part: Pairs) -> Tensor:
        """(B * R,) residuals where a student is."""
        endpoint, _ = self._endpoint(student, term, part)
        wide = endpoint if endpoint.dtype == torch.float64 else endpoint.float()
        with torch.no_grad():
            return self.residuals(self.pipe, wide, part.endpoints.to(wide)).flatten()

    def _column(
        self, student: Student, term: Term, part: Pairs, base: Tensor, at: Tensor, c: int, side: int = 1
    ) -> Tensor:
        """How number c changes the residuals; seen from its other side at a bound, and at the edge of what samples."""
        size = side * self.difference * max(1.0, abs(float(at[c])))
        student.move(at + size * torch.eye(len(at), dtype=at.dtype)[c])
        moved = float(student.vector()[c] - at[c])
        try:
            if abs(moved) < abs(size) / 2:
                raise ValueError(f"The bounds are narrower than differences of {abs(size):g}: widen bounded.")
            with self.replay.playing() if self.replays else nullcontext():
                return (self._run(student, term, part) - base) / moved
        except ValueError:
            if side < 0:
                raise
        return self._column(student, term, part, base, at, c, -1)


def fit_least_squares(progress: Progress) -> None:
    """Learn by Levenberg-Marquardt: few iterations, forward passes only.

    Far from the optimum a few pairs show the way: it begins with 8, and takes four times as many whenever an iteration
    gains less than 5 %. A step that does not lower the loss on the pairs is tried again, shorter; one that does is
    doubled as long as that helps. The Jacobian is computed anew where a corrected one gains less than 2 %. Ends when a
    new one on all pairs gains less than 1e-4.

    Raises:
        ValueError: the pairs are made anew each time, or the loss is no sum of squares.
        FloatingPointError: the loss is not finite where learning starts.
    """
    pipe, student, config = progress.pipe, progress.student, progress.config
    every = max(len(term.pairs) for term in progress.terms)

    def first(count: int) -> list[Term]:
        return [replace(term, train=term.pairs[:count]) for term in progress.terms]

    iterations, origin = config.updates or ITERATIONS, student.snapshot()
    with progress.meter.running():
        progress.begin()
        at = student.snapshot()
        student.restore(origin)
        count = min(progress.own.get("pairs", FIRST_PAIRS), every)
        left = range(progress.update, 0 if progress.ended else iterations)
        # What a run that was stopped repeats is no part of what learning costs.
        with progress.meter.counting("again" if progress.update else "jacobian"):
            problem = Problem(pipe, student, first(count), config=config, loss=progress.loss)
            student.restore(at)
            if left:
                problem.check_replay()
        label = f"{progress.label}, least squares"
        bar = tqdm(left, label, initial=progress.update, total=iterations, disable=not left or not is_main())
        damping, moved = progress.own.get("damping", 1.0), None
        for iteration in bar:
            is_new = moved is None
            with progress.meter.counting("jacobian"):
                start, gradient, matrix = problem.normal_equations(moved)
            if not math.isfinite(start.value):
                raise FloatingPointError(f"The loss is {start.losses} at iteration {iteration}: use another init.")
            diagonal = matrix.diagonal().clamp(min=1e-9 * float(matrix.diagonal().max()))
            best = start
            for _ in range(ATTEMPTS if is_new else 1):
                trial = problem.move(_target(student, start.at, matrix + damping * diagonal.diag(), gradient))
                if trial.value < best.value:
                    best, damping = trial, damping / 4
                    break
                damping *= 10
            # Curvature is overestimated where residuals stay large, and another sampling is cheap beside a Jacobian.
            while best is not start:
                trial = problem.move(start.at + 2 * (best.at - start.at))
                if trial.value >= best.value:
                    break
                best = trial
            student.move(best.at)
            gain = start.value - best.value
            moved = best if gain > SECANT_GAIN else None
            all_pairs, last = count == every, iteration + 1 == iterations
            if is_new and gain < GROWTH_GAIN and not all_pairs:
                count, moved = min(GROWTH * count, every), None
                problem.terms = first(count)
            progress.update, progress.own = iteration + 1, {"damping": damping, "pairs": count}
            # What few pairs say is not worth the evaluations of choosing, nor is what goes on at once.
            bored = (last or (all_pairs and moved is None)) and progress.evaluate()
            progress.ended = bored or last or (is_new and all_pairs and gain < LEAST_GAIN)
            by_name = {f"loss/{term.name}": value for term, value in zip(progress.terms, best.losses)}
            progress.report(bar, **by_name, damping=damping)
            if moved is None or progress.ended:  # a run that goes on from here computes its Jacobian anew
                progress.save()
            if progress.ended:
                break
        bar.close()
        progress.finish()


def _target(student: Student, at: Tensor, matrix: Tensor, gradient: Tensor) -> Tensor:
    """at + step, matrix step = -gradient, where numbers that would pass their bounds stay there."""
    free, step = torch.ones(len(at), dtype=torch.bool), torch.zeros_like(at)
    while free.any():
        fixed = matrix[:, ~free] @ step[~free]
        step[free] = torch.linalg.solve(matrix[free][:, free], -(gradient + fixed)[free])
        student.move(at + step)
        moved = student.vector() - at
        stopped = free & ((moved - step).abs() > 1e-9)
        step[stopped], free = moved[stopped], free & ~stopped
        if not stopped.any():
            break
    return at + step
