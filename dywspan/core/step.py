"""The update every solver here is: a linear combination of past derivatives.

    x_{i+1} = x_i + sum_{j < K} c_ij * d_{i-j},    c_ij = (sigma_{i+1} - sigma~_i) * w_ij

Source: DyWeight eqs. (5) and (9), with the step size multiplied in. State in, state out, differentiable in everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

History = tuple[Tensor, ...]
Term = tuple[Any, Tensor]  # a coefficient, float or 0-dim tensor, and what it multiplies


@dataclass(frozen=True, eq=False)
class Schedule:
    """A solver on a grid: every number its N steps need, known before sampling starts. Float64, CPU.

    Attributes:
        levels: (N+1,) noise level sigma~_i of the state at each step; the last one is the grid's end.
        queries: (N,) level tau_i the network is told.
        increments: (N, K) coefficients c_ij; column j multiplies the j-th newest derivative.
        sizes: (N,) step sizes h_i = sigma_{i+1} - sigma~_i.
        afs: the first step takes d_0 = x_0 / sqrt(1 + sigma_0^2) instead of asking the network.
    """

    levels: Tensor
    queries: Tensor
    increments: Tensor
    sizes: Tensor
    afs: bool = False

    @classmethod
    def from_weights(
        cls,
        sigmas: Tensor,
        weights: Tensor,
        time_scale: Tensor | None = None,
        afs: bool = False,
        time_shifting: bool = True,
    ) -> Schedule:
        """Calibrate a weight table on a nominal grid.

            sigma~_{i+1} = sigma~_i + (sum_j w_ij) * (sigma_{i+1} - sigma~_i),  sigma~_0 = sigma_0  (DyWeight eq. (9))
            tau_i        = s_i * sigma~_i

        Args:
            sigmas: (N+1,) nominal grid.
            weights: (N, K), zero where no derivative exists yet.
            time_scale: (N,) s, ones by default.
            time_shifting: without it sigma~ is the nominal grid, whatever the weights sum to (DyWeight's ablation).
        """
        level, levels, sizes = sigmas[0], [], []
        for i, total in enumerate(weights.sum(1)):
            size = sigmas[i + 1] - level
            levels.append(level)
            sizes.append(size)
            level = level + total * size if time_shifting else sigmas[i + 1]
        state = torch.stack(levels)
        queries = state if time_scale is None else time_scale * state
        h = torch.stack(sizes)
        return cls(torch.cat([state, sigmas[-1:]]), queries, h[:, None] * weights, h, afs)

    def __len__(self) -> int:
        return len(self.queries)


def fold(coefficients: Sequence[Any] | Tensor, available: int) -> list[Any]:
    """Coefficients for ``available`` derivatives: the weight of missing ones goes to the oldest there is.

    A start in mid-table (img2img) so keeps each row's sum, and with it the calibrated levels.
    """
    kept, missing = list(coefficients[:available]), coefficients[available:]
    kept[-1] = kept[-1] + sum(missing)
    return kept


def combine(first: Term, *others: Term) -> Tensor:
    """sum_k c_k v_k, in new memory and one pass over memory a term; terms of weight 0 after the first cost nothing.

    Args:
        first, others: (c_k, v_k); c_k a number, or a differentiable 0-dim tensor on the CPU: nothing waits for v_k's
            device. The v_k have one shape and dtype.
    """
    total = first[0] * first[1]
    for c, v in others:
        if number := c.item() if isinstance(c, Tensor) else c:
            total = total.add_(v, alpha=number)  # a fused multiply-add; autograd keeps nothing of ``total``
        if isinstance(c, Tensor):
            total = total + (c - c.detach()) * v  # adds 0, and the gradient: same bits with a graph and without
    return total


def step(
    coefficients: Sequence[Any] | Tensor,
    x: Tensor,
    derivative: Tensor,
    history: History,
    scale: Any = 1.0,
    next_scale: Any = 1.0,
) -> tuple[Tensor, History]:
    """One update, s' x_{i+1} = (s' / s) (s x_i) + sum_j (s' c_ij) d_{i-j}. Source: DyWeight eq. (5).

    Args:
        coefficients: row i of ``Schedule.increments`` (K floats, or a differentiable 1-D tensor).
        x: the state s x_i, any shape.
        derivative: d_i, same shape.
        history: d_{i-1}, d_{i-2}, ..., newest first.
        scale, next_scale: s and s', the frames of the state given and returned.

    Returns:
        s' x_{i+1} and the history for the next step (at most K derivatives).
    """
    history = (derivative, *history)[: len(coefficients)]
    terms = ((next_scale * c, d) for c, d in zip(fold(coefficients, len(history)), history))
    return combine((next_scale / scale, x), *terms), history


def analytical_derivative(x: Tensor, sigma: Any) -> Tensor:
    """d_0 = x_0 / sqrt(1 + sigma_0^2), the VE derivative of unit-variance data. Source: DyWeight section 4.1 (AFS)."""
    return x / (1 + sigma**2) ** 0.5


def rollout(schedule: Schedule, derivative: Callable[[Tensor, Any, Any], Tensor], x: Tensor) -> Tensor:
    """Integrate from ``x`` at the first level to the last.

    Args:
        derivative: (x, sigma, tau) -> d; see ``Prediction.derivative``.
    """
    history: History = ()
    for i in range(len(schedule)):
        sigma, tau = schedule.levels[i], schedule.queries[i]
        d = analytical_derivative(x, sigma) if schedule.afs and i == 0 else derivative(x, sigma, tau)
        x, history = step(schedule.increments[i], x, d, history)
    return x


def heun(sigmas: Tensor) -> Schedule:
    """Heun's method, two evaluations a step: x^ = x + h d_1, then x' = x^ + h/2 (d_2 - d_1); Euler into sigma = 0.

    Source: EDM algorithm 1.
    """
    levels, rows = [], []
    for sigma, end in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        h = end - sigma
        levels += [sigma, end] if end > 0 else [sigma]
        rows += [[h, 0.0], [h / 2, -h / 2]] if end > 0 else [[h, 0.0]]
    return _two_stage(levels, rows, sigmas)


def dpm2(sigmas: Tensor) -> Schedule:
    """DPM-Solver-2: midpoint in log sigma, u = x + (m - sigma) d_1, x' = x + h d_2; Euler into sigma = 0.

    Source: DPM-Solver (Lu et al. 2022), algorithm 1, in the VE frame.
    """
    levels, rows = [], []
    for sigma, end in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        h, middle = end - sigma, math.sqrt(sigma * end)
        levels += [sigma, middle] if end > 0 else [sigma]
        rows += [[middle - sigma, 0.0], [h, sigma - middle]] if end > 0 else [[h, 0.0]]
    return _two_stage(levels, rows, sigmas)


def _two_stage(levels: list[float], rows: list[list[float]], sigmas: Tensor) -> Schedule:
    queries, increments = torch.tensor(levels, dtype=torch.float64), torch.tensor(rows, dtype=torch.float64)
    # A stage's size is what it moves the state by where the derivative is constant. Heun's second, h/2 (d_2 - d_1),
    # moves it by nothing there: its size is that of its newest derivative's part, h/2.
    sizes = torch.where(increments.sum(1) != 0, increments.sum(1), increments[:, 0])
    return Schedule(torch.cat([queries, sigmas[-1:].double()]), queries, increments, sizes)


TWO_STAGE: dict[str, Callable[[Tensor], Schedule]] = {"heun": heun, "dpm2": dpm2}
