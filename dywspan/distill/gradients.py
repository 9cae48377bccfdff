"""Learn a solver by gradients through the whole sampling, the network frozen.

min over the solver's numbers of E loss(x_N, x*)     (DyWeight eqs. (10)-(11), SpanLift eq. (4))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..pipelines.pairs import Pairs
from ..pipelines.precision import autocast
from ..pipelines.processes import share, total
from ..pipelines.rollout import frozen, sample
from .losses import Loss
from .progress import Method, Progress, where_it_broke
from .student import Student
from .task import Term

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def learning_rate(update: int, updates: int) -> float:
    """Factor of the peak rate: linear from 0.1 over the first 10%, then cosine to 0.01 (DyWeight appendix D.2)."""
    warmup = max(1, round(0.1 * updates))
    if update < warmup:
        return 0.1 + 0.9 * update / warmup
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (update - warmup) / max(1, updates - warmup))) / 2


class Gradients(Method):
    """Each update draws the next term, and the gradient is the mean over a batch of its pairs, in shuffled order.

    However many processes and parts share the batch, the gradient is the same.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, progress: Progress) -> None:
        self.progress, self.task, self.student = progress, progress.task, progress.student
        config = self.task.config
        self.sources = [term.source(config.seed) for term in self.task.terms]
        self.parameters = self.student.parameters()
        kind = OPTIMIZERS[config.optimizer]
        self.optimizer = kind(self.parameters, lr=progress.peak_rate, weight_decay=config.weight_decay)
        self.scale = LossScale(config.mixed_precision == "fp16")

    def around(self) -> AbstractContextManager[Any]:
        config = self.task.config
        return frozen(self.task.pipe, config.recompute, self.student.networks, config.recompute_blocks)

    def begin(self) -> None:
        if self.progress.own:
            self.scale = LossScale(**self.progress.own)

    def step(self, update: int) -> dict[str, float]:
        """
        Raises:
            FloatingPointError: the loss is not finite; says at which update, sampling step and level, and for which
                seeds. Or its gradient is not.
        """
        progress, config = self.progress, self.task.config
        turn, rate = update % len(self.sources), progress.peak_rate * learning_rate(update, config.number("updates"))
        term, source = self.task.terms[turn], self.sources[turn]
        self.student.scheduler.whole = term.whole
        self.student.turn(update)
        self.optimizer.zero_grad()

        def add(positions: Sequence[int]) -> Tensor:
            with progress.meter.counting("fresh"):
                part = source(positions)
            loss = progress.valid(lambda: self._loss(term, part))
            fraction = loss * (len(part) / config.batch_size)
            if not bool(fraction.detach().isfinite()):
                raise FloatingPointError(where_it_broke(progress, term, part, rate))
            # Terms weigh alike, though few steps err more.
            scaled = fraction * self.scale.factor / (progress.start[term.name] or 1.0)
            # All of it, or nothing if memory runs out.
            found = torch.autograd.grad(scaled, self.parameters, allow_unused=True)
            for parameter, gradient in zip(self.parameters, found):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            return fraction.detach().double().cpu()

        before = progress.meter.counts["student"]
        own = share(range(update * config.batch_size, (update + 1) * config.batch_size))
        value = float(total(sum(progress.parts.run(own, add), start=torch.zeros((), dtype=torch.float64))))
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad = total(parameter.grad) / self.scale.factor
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if bool(norm.isfinite()):
            self.optimizer.step()
        elif not self.scale.enabled or self.scale.factor < 1:
            raise FloatingPointError(
                f"The gradient is not finite at update {update} of the {term.name}-step solver, though the loss is "
                f"{value:.4g}. Use a wider mixed_precision than {config.mixed_precision or 'no'!r}, or a "
                "loss that has a slope there."
            )
        self.scale.update(bool(norm.isfinite()))
        progress.own, counts = vars(self.scale).copy(), progress.meter.counts
        if config.recompute and config.recompute_blocks:  # blocks are run again, the network is not asked again
            counts["student"] += counts["student"] - before
        counts["backward"] = counts["student"] // (1 + config.recompute)
        return {f"loss/{term.name}": value, "lr": rate}

    def _loss(self, term: Term, part: Pairs) -> Tensor:
        task = self.task
        # Some dependencies of diffusers switch gradients off globally: ask for them where they are needed.
        with torch.enable_grad(), autocast(task.pipe, task.config.mixed_precision):
            self.student.apply()
            return batch_loss(task.pipe, self.student, term.steps, part, term.call, task.loss)


class LossScale:
    """What an fp16 loss is multiplied by so that its gradients are not lost: a number on the CPU, as a solver's are.

    Args:
        enabled: else it is 1.
        factor: an update whose gradient is not finite is left out and halves it, ``GROWTH`` others double it.
        fine: updates since it changed.
    """

    GROWTH = 2000

    def __init__(self, enabled: bool, factor: float | None = None, fine: int = 0) -> None:
        self.enabled, self.fine = enabled, fine
        self.factor = (65536.0 if enabled else 1.0) if factor is None else factor

    def update(self, is_finite: bool) -> None:
        """After an update whose gradient was finite, or was not."""
        if not self.enabled:
            return
        self.fine = self.fine + 1 if is_finite else 0
        if not is_finite:
            self.factor /= 2
        elif self.fine == self.GROWTH:
            self.factor, self.fine = 2 * self.factor, 0


def batch_loss(pipe: Any, student: Student, n: int, part: Pairs, call: Mapping[str, Any], loss: Loss) -> Tensor:
    """The endpoint's loss, and for a path the squared errors of the states before it (DyWeight eq. (A.15))."""
    states: list[Tensor] = []

    def keep(i: int, prev_sample: Tensor) -> None:
        assert student.scheduler.plan is not None
        states.append(student.scheduler.plan.state_after(i, prev_sample).float())

    watch = keep if part.is_path else None
    endpoint, _ = sample(pipe, student.scheduler, n, part.inputs, part.seeds, call, watch=watch)
    value = loss(pipe, endpoint.float(), part.endpoints.to(endpoint.device))
    if part.is_path:
        assert isinstance(part.targets, Tensor)
        # From the end: with AFS the first state is never seen.
        for x, target in zip(states[-2::-1], part.targets[:, :-1].flip(1).unbind(1)):
            value = value + mse_loss(x, target.to(x.device))
    return value
