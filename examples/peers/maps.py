"""What other learned solvers learn, as differentiable maps from few numbers to levels, weights and times of a table.

    x_{i+1} = x_i + (t_{i+1} - t_i) sum_j w_ij d_{i-j},   the network is told s_i t_i

A form is (t, w, s). Every solver whose numbers do not depend on the sample is one: a classical solver on moved levels,
a look ahead at a midpoint, a past derivative that an interpolated one replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dywspan.core.prediction import Prediction

Theta = Mapping[str, Tensor]  # by name, vectors of float64
NEAR = 1e-6  # shares of a distance lie between this and 1 - this
GAIN = 3.0  # of numbers that a sigmoid or softmax takes, so that the rates that suit weights suit them
CONTROLS = 4  # numbers of a Bezier curve


class Form(NamedTuple):
    """A table's numbers: (N+1,) levels, (N, K) weights, (N,) time scale."""

    levels: Tensor
    weights: Tensor
    times: Tensor


@dataclass(frozen=True, eq=False)
class Ground:
    """What a peer starts from.

    Attributes:
        levels: (M+1,) where its M steps begin and end.
        prediction: the network's convention.
        base: levels -> (N, K) weights of the classical solver that it starts from.
        weights: (N, K) where weights start that are learned themselves.
        stages: (M,) evaluations of each step.
    """

    levels: Tensor
    prediction: Prediction
    base: Callable[[Tensor], Tensor]
    weights: Tensor
    stages: Sequence[int]

    @property
    def evaluations(self) -> int:
        """N."""
        return sum(self.stages)


# ------------------------------------------------------------------------------------------------- numbers and levels


def logits(shares: Tensor) -> Tensor:
    """The numbers whose :func:`shares_of` these are."""
    return torch.logit(((shares - NEAR) / (1 - 2 * NEAR)).clamp(1e-9, 1 - 1e-9)) / GAIN


def shares_of(numbers: Tensor) -> Tensor:
    """q = NEAR + (1 - 2 NEAR) sigmoid(GAIN theta)."""
    return NEAR + (1 - 2 * NEAR) * torch.sigmoid(GAIN * numbers)


def start_levels(levels: Tensor) -> Tensor:
    """(N-1,) numbers of the levels between the first and the last, see :func:`falling`."""
    left = levels - levels[-1]
    return logits(left[1:-1] / left[:-2])


def falling(numbers: Tensor, levels: Tensor) -> Tensor:
    """t_{i+1} = t_N + q_i (t_i - t_N), q = :func:`shares_of` the numbers: (N+1,) decreasing, whatever these are.

    Args:
        levels: (N+1,), whose first and last stay.
    """
    left = torch.cat([levels[:1] - levels[-1], shares_of(numbers)]).cumprod(0)
    return torch.cat([levels[:1], levels[-1] + left[1:], levels[-1:]])


def bezier(numbers: Tensor, levels: Tensor) -> Tensor:
    """(N+1,) the levels at B(i/N), linear between those given; B is a Bezier curve with rising control points.

    p_0 = 0, p_{k+1} = p_k + q_k (1 - p_k), ..., p_{C+1} = 1, so that B rises too; equally spaced ones make B(u) = u.

    Args:
        numbers: (C,), see :func:`shares_of`.
        levels: (N+1,).
    """
    n, degree = len(levels) - 1, len(numbers) + 1
    left = torch.cat([numbers.new_ones(1), (1 - shares_of(numbers)).cumprod(0), numbers.new_zeros(1)])
    u, k = torch.arange(n + 1, dtype=torch.float64)[:, None] / n, torch.arange(degree + 1, dtype=torch.float64)
    ways = torch.tensor([_binomial(degree, int(j)) for j in k], dtype=torch.float64)
    place = n * (ways * u**k * (1 - u) ** (degree - k) * (1 - left)).sum(1)
    low = place.detach().clamp(0, n - 1e-9).floor().long()
    found = torch.lerp(levels[low], levels[low + 1], place - low)
    return torch.cat([levels[:1], found[1:-1], levels[-1:]])


def start_bezier() -> Tensor:
    """(CONTROLS,) of B(u) = u."""
    return logits(1 / torch.arange(CONTROLS + 1, 1, -1, dtype=torch.float64))


def _binomial(n: int, k: int) -> int:
    return 1 if k in (0, n) else _binomial(n - 1, k - 1) + _binomial(n - 1, k)


# ------------------------------------------------------------------------------------------------- weights


def on_levels(base: Callable[[Tensor], Tensor], levels: Tensor) -> Tensor:
    """(N, K) a classical solver's weights on these levels, with the gradient of central differences.

    Solvers compute in plain numbers, so autograd does not see them; in float64 the differences are right to 1e-8.
    """
    at = levels.detach()
    value = base(at)
    if not levels.requires_grad:
        return value
    size = 1e-5 * torch.minimum(-at.diff()[1:], -at.diff()[:-1])  # the ends stay
    columns = [torch.zeros_like(value)]
    for i, h in enumerate(size, start=1):
        move = h * torch.eye(len(at), dtype=at.dtype)[i]
        columns.append((base(at + move) - base(at - move)) / (2 * h))
    slope = torch.stack([*columns, torch.zeros_like(value)], -1)
    return value + slope @ (levels - at)  # adds 0, and the gradient


def start_weights(weights: Tensor) -> Tensor:
    """The numbers of :func:`normalised`: those of all derivatives but the newest."""
    return weights[_older(*weights.shape)]


def normalised(numbers: Tensor, n: int, order: int) -> Tensor:
    """(N, K) rows that sum to 1: w_i0 = 1 - sum of the others, which are free."""
    weights = torch.zeros(n, order, dtype=torch.float64)
    weights[_older(n, order)] = numbers
    return torch.cat([1 - weights[:, 1:].sum(1, keepdim=True), weights[:, 1:]], 1)


def _older(n: int, order: int) -> Tensor:
    return torch.ones(n, order, dtype=torch.bool).tril().logical_and(torch.arange(order) > 0)


def compensated(ratios: Tensor, weights: Tensor, times: Tensor) -> Tensor:
    """(N, N) a solver over compensated derivatives: each new one is taken at u_i + rho_i (u_{i-1} - u_i) instead.

        e_i = sum_k L_k(u_i + rho_i (u_{i-1} - u_i)) e'_{i-k},   e'_i = d_i, e'_{i-k} = e_{i-k}

    L are Lagrange's polynomials of at most three nodes; e_i stays in the memory in place of d_i.

    Args:
        ratios: (N-1,) rho of steps 1 to N-1; 0 leaves the solver as it is.
        weights: (N, K) of the solver.
        times: (N,) u, what the network is told.
    """
    n, kept, rows = len(weights), list[Tensor](), list[Tensor]()
    for i in range(n):
        newest = torch.eye(n, dtype=torch.float64)[i]
        if i > 0:
            nodes, memory = times[max(0, i - 2) : i + 1].flip(0), [newest, *kept[: -min(i, 2) - 1 : -1]]
            at = times[i] + ratios[i - 1] * (times[i - 1] - times[i])
            newest = sum((_lagrange(nodes, k, at) * e for k, e in enumerate(memory)), start=torch.zeros_like(newest))
        kept.append(newest)
        memory = kept[::-1]
        row = sum((w * e for w, e in zip(weights[i], memory)), start=torch.zeros_like(newest))
        rows.append(pad(row[: i + 1].flip(0), (0, n - i - 1)))
    return torch.stack(rows)


def _lagrange(nodes: Tensor, k: int, at: Tensor) -> Tensor:
    others = torch.cat([nodes[:k], nodes[k + 1 :]])
    return ((at - others) / (nodes[k] - others)).prod()


# ------------------------------------------------------------------------------------------------- steps of stages


def split(evaluations: int, most: int) -> tuple[int, ...]:
    """Stages of each step: as many steps of ``most`` as there are, then one of what is left over.

    Seven evaluations by threes are (3, 3, 1). One evaluation makes an Euler step, two a midpoint step.
    """
    whole, left = divmod(evaluations, most)
    return (most,) * whole + ((left,) if left else ())


def start_stages(ground: Ground) -> dict[str, Tensor]:
    """Numbers of :func:`staged`: points equally spaced in log t, or in t in a step that ends at 0; all else neutral."""
    points, mixes = list[Tensor](), list[Tensor]()
    for stages, t, end in zip(ground.stages, ground.levels, ground.levels[1:]):
        part = torch.arange(stages, dtype=torch.float64) / stages
        nodes = t ** (1 - part) * end**part if end > 0 else t * (1 - part)
        points.append(logits((nodes[1:] - end) / (nodes[:-1] - end)))
        mixes.append(torch.zeros(max(0, stages - 2), dtype=torch.float64))
    inner = torch.cat(points)
    scales = torch.ones(sum(stages > 1 for stages in ground.stages), dtype=torch.float64)
    return {"points": inner, "scales": scales, "mixes": torch.cat(mixes), "times": torch.ones_like(inner)}


def staged(theta: Theta, ground: Ground) -> Form:
    """Steps that look ahead with the first derivative and step with those found there.

        x_p = x + (m_p - t) d_0,  d_p = d(x_p, m_p),  p = 1..P;    x' = x + c h sum_p l_p d_p,  h = t' - t

    P = 0 is Euler's step, without c; P = 1 a midpoint step. The x_p are made one after the other, each from the last:
    a table of P + 1 columns.

    Args:
        theta: "points", m; "scales", c; "mixes", l by softmax against the first; "times", s of the points, ones where
            there are none.
    """
    points, scales, mixes = (list(theta.get(name, ())) for name in ("points", "scales", "mixes"))
    times = list(theta.get("times", torch.ones(len(points), dtype=torch.float64)))
    levels, rows, told = list[Tensor](), list[Tensor](), list[Tensor]()
    order = max(ground.stages)
    unit = torch.eye(order, dtype=torch.float64)
    for stages, t, end in zip(ground.stages, ground.levels, ground.levels[1:]):
        nodes = [t]
        for number in points[: stages - 1]:
            nodes.append(end + shares_of(number) * (nodes[-1] - end))
        told += [torch.ones_like(t), *times[: stages - 1]]
        rows += [unit[p] for p in range(stages - 1)]  # each moves the look ahead on, along d_0
        if stages == 1:
            rows.append(unit[0])
        else:
            share = (GAIN * torch.stack([torch.zeros_like(t), *mixes[: stages - 2]])).softmax(0).flip(0)  # newest first
            moved = scales.pop(0) * (end - t) * share
            increments = torch.cat([moved, (t - nodes[-1])[None]])  # and what the look ahead added is taken back
            rows.append(pad(increments / (end - nodes[-1]), (0, order - stages)))
        levels += nodes
        points, mixes, times = points[stages - 1 :], mixes[max(0, stages - 2) :], times[stages - 1 :]
    return Form(torch.stack([*levels, ground.levels[-1]]), torch.stack(rows), torch.stack(told))
