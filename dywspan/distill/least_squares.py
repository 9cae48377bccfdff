"""Learn a solver without gradients: its loss is a sum of squares of few numbers' effects.

    minimise  F(p) = mean over pairs of |r(p)|^2 + ridge |p - p_0|^2,      r the residuals whose squares are the loss
    (J'J + ridge + damping diag(J'J)) step = -(J'r + ridge (p - p_0)),     Levenberg-Marquardt

J comes from differences, column by column, of whole samplings through the pipeline's own call: any pipeline that can
sample can be learned from, quantised, compiled or offloaded, in the memory that sampling needs. A number at step k
changes nothing before it, so earlier denoiser outputs are replayed; the last row of weights costs no evaluation at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .checkpoints import Checkpoints
from .config import LearningConfig
from .losses import Loss, latent_mse, residuals_of
from .pairs import Pairs, Source
from .processes import in_turn, is_main, total
from .progress import PRECISIONS, Log, Progress, autocast
from .replay import Replay
from .rollout import denoisers, sample
from .student import Student

# Step of the differences: wide enough to stand out of the rounding of the network's outputs, and to average over the
# fast oscillations of time embeddings.
DIFFERENCE = {torch.float64: 1e-4, torch.float32: 1e-2, torch.bfloat16: 3e-2, torch.float16: 3e-2}
ITERATIONS, ATTEMPTS = 12, 6
LEAST_GAIN = 1e-4  # of the loss, relative: below it the fit has converged


class Problem:
    """F, its gradient and J'J at a point, summed over step counts, pairs and processes.

    Args:
        start: loss by number of steps that each is measured in, so that they weigh alike.
    """

    def __init__(
        self,
        pipe: Any,
        student: Student,
        pairs: Pairs,
        start: Mapping[int, float],
        *,
        call: Mapping[str, Any],
        config: LearningConfig,
        loss: Loss,
    ) -> None:
        self.pipe, self.student, self.pairs, self.start = pipe, student, pairs, start
        self.call, self.config, self.residuals = call, config, residuals_of(loss)
        self.replay, self.replays = Replay(pipe), True
        self.origin = self.numbers()
        self.difference = config.difference or DIFFERENCE[self._precision()]

    def numbers(self) -> Tensor:
        """(P,) float64: the free numbers of the student."""
        return torch.cat([p.detach()[mask].double().cpu() for p, mask in self.student.numbers()])

    @torch.no_grad()
    def move(self, numbers: Tensor) -> None:
        """Put the student there."""
        parts = numbers.split([int(mask.sum()) for _, mask in self.student.numbers()])
        for (parameter, mask), values in zip(self.student.numbers(), parts):
            parameter[mask] = values.to(parameter)

    def loss(self) -> float:
        """F where the student is; infinite where it is no solver."""
        with self.replay.installed():
            value = sum((self._run(n, part).square().sum() * weight for n, part, weight in self._batches()), _zero())
        return float(total(value)) + self._prior(self.numbers())

    def normal_equations(self) -> tuple[float, Tensor, Tensor]:
        """F, (P,) half its gradient, and (P, P) J'J, with the prior's parts."""
        at = self.numbers()
        sums = torch.zeros(len(at) + 1, len(at) + 1, dtype=torch.float64)  # of [r, J]'[r, J]
        with self.replay.installed():
            for n, part, weight in self._batches():
                columns = self.columns(n, part)
                sums += weight * (columns @ columns.T).double().cpu()
        sums = total(sums.to(self.pipe.device)).cpu()
        gradient = sums[0, 1:] + self.config.ridge * (at - self.origin)
        return float(sums[0, 0]) + self._prior(at), gradient, sums[1:, 1:] + self.config.ridge * torch.eye(len(at))

    def columns(self, n: int, part: Pairs) -> Tensor:
        """(1 + P, B * R): the residuals of some pairs, and how each free number changes them."""
        at = self.numbers()
        with self.replay.recording():
            base = self._run(n, part)
        changes = [(self._moved(n, part, at, c) - base) / self._step(at, c) for c in range(len(at))]
        self.move(at)
        self.replay.tape = []
        return torch.stack([base, *changes])

    def check_replay(self) -> None:
        """Compute one batch again: a network that answers otherwise than before cannot be replayed."""
        n, part, _ = self._batches()[0]
        with self.replay.installed():
            with self.replay.recording():
                base = self._run(n, part)
            with self.replay.playing():
                replayed = self._run(n, part)
            again = self._run(n, part)
        self.replays = torch.equal(base, replayed) and torch.equal(base, again)
        self.replay.tape = []
        if not self.replays and is_main():
            print(f"{type(self.pipe).__name__}'s network does not answer the same question the same way: no replay.")

    def _precision(self) -> torch.dtype:
        """The coarsest that a sampling passes through."""
        n, part, _ = self._batches()[0]
        endpoint, _ = self._endpoint(n, part)
        networks = [getattr(m, "dtype", torch.bfloat16) for m in denoisers(self.pipe).values()]
        mixed = PRECISIONS[self.config.mixed_precision or "no"]
        passed = [d for d in (endpoint.dtype, mixed, *networks) if d is not None]
        # Quantised networks round as coarsely as bfloat16.
        return max((d if d in DIFFERENCE else torch.bfloat16 for d in passed), key=lambda d: DIFFERENCE[d])

    def _endpoint(self, n: int, part: Pairs) -> tuple[Tensor, Any]:
        with torch.no_grad(), autocast(self.pipe, self.config.mixed_precision):
            self.student.apply()
            return sample(self.pipe, self.student.scheduler, n, part.inputs, part.seeds, self.call)

    def _batches(self) -> list[tuple[int, Pairs, float]]:
        """This process's share: number of steps, pairs, and what their sum of squares is multiplied by."""
        size = self.config.micro_batch_size or self.config.batch_size
        starts = range(0, len(self.pairs), size)
        share = [(self.pairs[starts[j] : starts[j] + size], counts) for j, counts in in_turn(len(starts))]
        return [
            (n, part, counts / (len(self.pairs) * scale * len(self.start)))
            for n, scale in self.start.items()
            for part, counts in share
        ]

    def _run(self, n: int, part: Pairs) -> Tensor:
        """(B * R,) residuals where the student is."""
        endpoint, _ = self._endpoint(n, part)
        wide = endpoint if endpoint.dtype == torch.float64 else endpoint.float()
        with torch.no_grad():
            return self.residuals(self.pipe, wide, part.endpoints.to(wide)).flatten()

    def _moved(self, n: int, part: Pairs, at: Tensor, column: int) -> Tensor:
        self.move(at + self._step(at, column) * torch.eye(len(at), dtype=at.dtype)[column])
        if not self.replays:
            return self._run(n, part)
        with self.replay.playing():
            return self._run(n, part)

    def _step(self, at: Tensor, column: int) -> float:
        return self.difference * max(1.0, abs(float(at[column])))

    def _prior(self, numbers: Tensor) -> float:
        return self.config.ridge * float((numbers - self.origin).square().sum())


def fit_least_squares(
    pipe: Any,
    student: Student,
    steps: Sequence[int],
    train: Pairs | Source,
    held_out: Pairs,
    *,
    call: Mapping[str, Any],
    config: LearningConfig,
    loss: Loss = latent_mse,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
) -> tuple[dict[int, dict[str, float]], dict[str, int | float]]:
    """:func:`dywspan.distill.train.fit` by Levenberg-Marquardt: few iterations over all pairs, forward passes only.

    A step that does not lower the loss on the training pairs is tried again, shorter. Ends when none does, or when they
    gain less than 1e-4.

    Raises:
        ValueError: the pairs are made anew each time, or the loss is no sum of squares.
    """
    if not isinstance(train, Pairs) or train.is_path:
        raise ValueError(
            "least_squares needs the same endpoints each time: set on_the_fly to false, path_substeps to 0."
        )
    settings: dict[str, Any] = {"call": call, "config": config, "loss": loss}
    iterations = config.updates or ITERATIONS
    progress = Progress(pipe, student, steps, held_out, checkpoints=checkpoints, log=log, **settings)
    origin = student.snapshot()
    with progress.meter.running():
        progress.begin()
        at = student.snapshot()
        student.restore(origin)
        problem = Problem(pipe, student, train, {n: progress.start[n] or 1.0 for n in steps}, **settings)
        student.restore(at)
        left = range(progress.update, 0 if progress.ended else iterations)
        if left:
            with progress.meter.counting("jacobian"):
                problem.check_replay()
        label = f"{', '.join(map(str, steps))} steps, least squares"
        bar = tqdm(left, label, initial=progress.update, total=iterations, disable=not left or not is_main())
        damping = progress.own.get("damping", 1.0)
        for iteration in bar:
            with progress.meter.counting("jacobian"):
                value, gradient, matrix = problem.normal_equations()
            if not math.isfinite(value):
                raise FloatingPointError(f"The loss is {value} at iteration {iteration}: start from another init.")
            point, diagonal = problem.numbers(), matrix.diagonal()
            diagonal = diagonal.clamp(min=1e-9 * float(diagonal.max()))
            trial = math.inf
            for _ in range(ATTEMPTS):
                problem.move(point + torch.linalg.solve(matrix + damping * diagonal.diag(), -gradient))
                try:
                    trial = problem.loss()
                except ValueError:  # numbers that are no solver: levels below zero
                    trial = math.inf
                if trial < value:
                    damping /= 4
                    break
                damping *= 4
            else:
                problem.move(point)
            gain = (value - trial) / value if trial < value else 0.0
            progress.update, progress.own = iteration + 1, {"damping": damping}
            progress.ended = progress.evaluate() or gain < LEAST_GAIN or progress.update == iterations
            progress.report(bar, loss=min(trial, value), damping=damping)
            progress.save()
            if progress.ended:
                break
        bar.close()
        return progress.finish(), progress.cost()


def _zero() -> Tensor:
    return torch.zeros(())
