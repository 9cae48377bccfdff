"""The update every solver here is: a linear combination of past derivatives, or of past data predictions.

    x_{i+1} = x_i + sum_{j < K} c_ij * d_{i-j},              c_ij = (sigma_{i+1} - sigma~_i) * w_ij
    x_{i+1} = r_i x_i + (1 - r_i) sum_{j < K} w_ij D_{i-j},   r_i = sigma_{i+1} / sigma_i

Source: DyWeight eqs. (5) and (9), with the step size multiplied in; DPM-Solver++ (Lu et al. 2022b) eq. (9). State in,
state out, differentiable in everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
        increments: (N, K) coefficients; column j multiplies the j-th newest derivative, or data prediction.
        sizes: (N,) step sizes h_i = sigma_{i+1} - sigma~_i.
        afs: the first step takes d_0 = x_0 / sqrt(1 + sigma_0^2) instead of asking the network.
        carries: (N,) r_i, what is left of x_i in a solver that remembers data predictions; None: it remembers
            derivatives, and x_i stays whole.
    """

    levels: Tensor
    queries: Tensor
    increments: Tensor
    sizes: Tensor
    afs: bool = False
    carries: Tensor | None = None

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

    def detach(self) -> Schedule:
        """The same numbers, without their graph."""
        return replace(self, **{k: v.detach() for k, v in vars(self).items() if isinstance(v, Tensor)})


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
    carry: Any = 1.0,
) -> tuple[Tensor, History]:
    """One update, s' x_{i+1} = (s' r_i / s) (s x_i) + sum_j (s' c_ij) d_{i-j}. Source: DyWeight eq. (5).

    Args:
        coefficients: row i of ``Schedule.increments`` (K floats, or a differentiable 1-D tensor).
        x: the state s x_i, any shape.
        derivative: d_i, or D_i in a solver that remembers data predictions; same shape.
        history: d_{i-1}, d_{i-2}, ..., newest first.
        scale, next_scale: s and s', the frames of the state given and returned.
        carry: r_i.

    Returns:
        s' x_{i+1} and the history for the next step (at most K derivatives).
    """
    history = (derivative, *history)[: len(coefficients)]
    terms = ((next_scale * c, d) for c, d in zip(fold(coefficients, len(history)), history))
    return combine((next_scale / scale * carry, x), *terms), history


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
        if schedule.carries is None:
            x, history = step(schedule.increments[i], x, d, history)
        else:
            x, history = step(schedule.increments[i], x, x - sigma * d, history, carry=schedule.carries[i])
    return x
