"""Least squares where every update sees all pairs, as few as they are: one Jacobian, which secants keep true.

    p, q: numbers before and after a step;  r: residuals, whose squares are the loss;  J = dr/dp

    J <- J + (r(q) - r(p) - J (q - p)) (q - p)' / |q - p|^2,          q = the damped least of the model of r and J at p

A Jacobian takes about half as many samplings of each pair as there are numbers, a step one. A step that does not lower
F is taken back and the next is shorter; what it showed stays in J. After ``RENEWED`` such steps J is computed anew.

Source: Broyden 1965; F and its damped model are those of :mod:`.least_squares`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .least_squares import LeastSquares, Sampled, most_pairs, prepared
from .progress import Method, Progress

FIRST, LESS, MORE = 0.1, 3.0, 6.0  # damping, and by what it changes with success and failure
RENEWED = 3


def least_squares(progress: Progress) -> Method:
    """The way that suits the number of pairs."""
    every = progress.task.config.batch_size >= most_pairs(progress.task.terms)
    return Secant(progress) if every else LeastSquares(progress)


class Secant(Method):
    """Few updates, of forward passes only, on all pairs.

    Raises:
        ValueError: the pairs are paths, or the loss is no sum of squares.
        FloatingPointError: the loss is not finite where learning starts.

    Attributes:
        columns: by term, (1 + P, B * R) residuals where the student is, and how each number changes them.
        path: where J was computed, and the numbers that were tried since.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress, self.student = progress, progress.student
        self.origin = self.student.snapshot()
        self.damping, self.failed, self.value = FIRST, 0, math.inf
        self.columns: list[Tensor] = []
        self.path: list[list[float]] = []

    def begin(self) -> None:
        progress = self.progress
        self.problem, now = prepared(progress, self.origin), self.student.snapshot()
        if progress.ended:
            return
        with progress.meter.counting("again" if progress.update else "fresh"):
            self.batch = self.problem.batch(0)
        if not progress.own:
            return
        start, *tried = progress.own["path"]
        with progress.meter.counting("again"):  # a run that was stopped repeats what made J
            self.student.move(torch.tensor(start, dtype=torch.float64))
            self._renew()
            for numbers in tried:
                self._tried(torch.tensor(numbers, dtype=torch.float64))
        self.damping, self.failed = progress.own["damping"], progress.own["failed"]
        self.student.restore(now)

    def step(self, update: int) -> dict[str, float]:
        problem = self.problem
        with self.progress.meter.counting("jacobian"):
            if not self.columns or self.failed == RENEWED:
                self._renew()
            if not math.isfinite(self.value):
                raise FloatingPointError(f"The loss is {self.value} at update {update}: use another init.")
            products = torch.stack([own.double() @ own.double().T for own in self.columns])
            problem.model, problem.weight = problem.model_of(products), 1.0
            lower = self._tried(problem.target(self.damping))
        self.damping *= 1 / LESS if lower else MORE
        self.failed = 0 if lower else self.failed + 1
        self.progress.own = {"path": self.path, "damping": self.damping, "failed": self.failed}
        losses = problem.mean(products[:, 0, 0]).tolist()
        return {f"loss/{term.name}": loss for term, loss in zip(problem.terms, losses)} | {"damping": self.damping}

    def _renew(self) -> None:
        """J where the student is."""
        sampled = self.problem.sample(self.batch)
        self.value, self.failed, self.path = self.problem.value(sampled), 0, [self.student.vector().tolist()]
        if math.isfinite(self.value):
            self.columns = self.problem.jacobian(sampled)

    def _tried(self, numbers: Tensor) -> bool:
        """Move the student there, and learn how J was wrong; whether F is lower, else the student is moved back."""
        student, here = self.student, self.student.vector()
        student.move(numbers)
        self.path.append(student.vector().tolist())
        sampled = self.problem.sample(self.batch)
        value, step = self.problem.value(sampled), student.vector() - here
        lower = value < self.value
        if math.isfinite(value) and bool(step.any()):
            self._secants(sampled, step, lower)
        if lower:
            self.value = value
        else:
            student.move(here)
        return lower

    def _secants(self, sampled: Sequence[Sampled], step: Tensor, moved: bool) -> None:
        for columns, there in zip(self.columns, self.problem.residuals_there(sampled)):
            wrong = there - columns[0] - step.to(columns) @ columns[1:]
            columns[1:] += (step / step.square().sum()).to(columns)[:, None] * wrong
            if moved:
                columns[0] = there
