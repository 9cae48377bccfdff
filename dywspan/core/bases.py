"""Classical solvers, one function and one record of ``BASES`` each.

A multistep solver is a function ``(sigmas, alphas, order) -> weights`` with ``sigmas`` the (N+1,) grid, ``alphas`` the
signal levels on it (ones in the VE frame) and ``weights`` an (N, K) float64 table whose rows sum to 1. Column j
multiplies the j-th newest derivative, or data prediction; orders grow from 1 with the history. Over derivatives, an
untrained DyWeight table *is* one of these. "adams" and "deis" are differentiable in the levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .step import Schedule


def euler(sigmas: Tensor, alphas: Tensor, order: int = 1) -> Tensor:
    """w = 1: DDIM in the VE frame. Columns beyond the first are zeros, ready to be learned."""
    weights = torch.zeros(len(sigmas) - 1, order, dtype=torch.float64)
    weights[:, 0] = 1
    return weights


def uniform(sigmas: Tensor, alphas: Tensor, order: int = 2) -> Tensor:
    """w = 1 / (number of derivatives there are): DyWeight's table A.3 tries it as an initial value."""
    return _rows(sigmas, order, lambda i, k: torch.full((k,), 1 / k, dtype=torch.float64))


def ipndm(sigmas: Tensor, alphas: Tensor, order: int = 3) -> Tensor:
    """Adams-Bashforth constants of equal steps: 1 | 3,-1 /2 | 23,-16,5 /12 | 55,-59,37,-9 /24.

    Source: DyWeight eq. (3).
    """
    return _rows(sigmas, order, lambda i, k: _interpolatory(-torch.arange(k, dtype=torch.float64), _MONOMIALS[:k]))


def adams(sigmas: Tensor, alphas: Tensor, order: int = 3) -> Tensor:
    """Adams-Bashforth on the real, unequal grid: the interpolating polynomial in sigma, integrated.

    Source: DyWeight appendix A.
    """

    def row(i: int, k: int) -> Tensor:
        past = sigmas[i - k + 1 : i + 1].flip(0)
        return _interpolatory((past - past[0]) / (sigmas[i + 1] - past[0]), _MONOMIALS[:k])

    return _rows(sigmas, order, row)


def deis(sigmas: Tensor, alphas: Tensor, order: int = 3, lower_order_final: bool = False) -> Tensor:
    """The interpolating polynomial in log sigma, integrated over sigma.

    Source: DEIS (Zhang & Chen 2022), rhoAB in log rho.
    """
    n = len(sigmas) - 1

    def row(i: int, k: int) -> Tensor:
        k = min(k, n - i) if lower_order_final else k
        past = sigmas[i - k + 1 : i + 1].flip(0)
        r = sigmas[i + 1] / past[0]
        log = r.log() if r > 0 else r  # r log(r)^m is 0 at 0
        moments = [r - 1]  # integral of log(y)^m over y in [1, r], by parts
        for m in range(1, k):
            moments.append(r * log**m - m * moments[-1])
        return _interpolatory((past / past[0]).log(), torch.stack(moments) / (r - 1))

    return _rows(sigmas, order, row)


def dpmpp(sigmas: Tensor, alphas: Tensor, order: int = 2, lower_order_final: bool = False) -> Tensor:
    """DPM-Solver++ (1M, 2M midpoint, 3M). Source: Lu et al. 2022b, algorithm 2 and diffusers' third-order form.

    Over data predictions. The step into sigma = 0 is first order; ``lower_order_final`` lets the order fall again over
    the last steps. The published 3M weighs the second difference with half its Taylor coefficient, so it converges with
    order 2; it is kept as everyone runs it.
    """

    def combine(h: float, gaps: list[float]) -> list[float]:
        phi, r0 = -math.expm1(-h), gaps[0]
        if len(gaps) == 1:
            return [1 + 0.5 / r0, -0.5 / r0]
        r1 = gaps[1]
        new, old = [1 / r0, -1 / r0, 0.0], [0.0, 1 / r1, -1 / r1]  # divided differences over D_i, D_{i-1}, D_{i-2}
        first, second = 1 - phi / h, (h - phi) / h**2 - 0.5
        bend = [a - b for a, b in zip(new, old)]
        slope = [a + r0 / (r0 + r1) * b for a, b in zip(new, bend)]
        return [
            (phi * start + first * s - second * b / (r0 + r1)) / phi
            for start, s, b in zip([1.0, 0.0, 0.0], slope, bend)
        ]

    return _in_log_snr(sigmas, alphas, order, lower_order_final, combine)


def unipc(sigmas: Tensor, alphas: Tensor, order: int = 2, lower_order_final: bool = False) -> Tensor:
    """UniPC's predictor (UniP, B(h) = e^h - 1), over data predictions. Source: Zhao et al. 2023, algorithm 2."""

    def combine(h: float, gaps: list[float]) -> list[float]:
        phi_1 = math.expm1(-h)
        ratios = [-sum(gaps[: j + 1]) for j in range(len(gaps))]
        if len(gaps) == 1:
            rho = [0.5]
        else:
            phi, targets = phi_1 / -h - 1, []
            for m in range(1, len(gaps) + 1):
                targets.append(phi * math.factorial(m) / phi_1)
                phi = phi / -h - 1 / math.factorial(m + 1)
            # An infinitely far point (flow, sigma_0 = 1) has a zero divided difference and no equation.
            near = [r for r in ratios if math.isfinite(r)]
            powers = torch.tensor([[r**m for r in near] for m in range(len(near))], dtype=torch.float64)
            rho = torch.linalg.solve(powers, torch.tensor(targets[: len(near)], dtype=torch.float64)).tolist()
            rho += [0.0] * (len(ratios) - len(near))
        slopes = [p / r for p, r in zip(rho, ratios)]
        return [1 - sum(slopes), *slopes]

    return _in_log_snr(sigmas, alphas, order, lower_order_final, combine)


def res(sigmas: Tensor, alphas: Tensor, order: int = 2) -> Tensor:
    """RES, multistep: the line through two data predictions in lambda, integrated exactly.

        c_1 = -phi_2 / (phi_1 gap),  c_0 = 1 - c_1,   phi_1 = (1 - e^-h) / h,  phi_2 = (e^-h - 1 + h) / h^2

    It is the exponential Adams-Bashforth method of two steps. Source: Zhang et al. 2023 (arXiv 2308.02157).
    """

    def combine(h: float, gaps: list[float]) -> list[float]:
        shrunk = -math.expm1(-h)
        slope = (h - shrunk) / (h * shrunk * gaps[0])
        return [1 + slope, -slope]

    return _in_log_snr(sigmas, alphas, order, False, combine)


def cab(sigmas: Tensor, alphas: Tensor, order: int = 2) -> Tensor:
    """Corrected Adams-Bashforth: Adams-Bashforth in y = x / alpha over rho = sigma / alpha, and a share of how far the
    newest noise prediction lies from the line through the two before it.

        y' = y + (rho' - rho) (sum_j b_j eps_{i-j} + theta (eps_i - (1 + r) eps_{i-1} + r eps_{i-2}))
        r = (rho_i - rho_{i-1}) / (rho_{i-1} - rho_{i-2}),   theta = 0.9

    Without three predictions it steps by Adams-Bashforth; in flow's frame, where y may start infinite, over velocities
    and by the constants of equal steps. Source: Roy & Nair 2026 (arXiv 2605.16736), and the authors' code.

    Returns:
        (N, K) weights of derivatives; in flow's frame K = N, as eps = x + alpha v depends on all of them.
    """
    n, s, a = len(sigmas) - 1, sigmas.double(), alphas.double()
    if order == 1:
        return euler(sigmas, alphas)
    rho, flow = s / a, bool((a != 1).any())
    forms, eps, rows = (torch.zeros(size, n, dtype=torch.float64) for size in (n + 1, n, n))
    for i in range(n):
        # x_i = x_0 + forms_i d; dx / dsigma is eps in the VE frame (alpha = 1), and v in flow's (alpha = 1 - sigma).
        eps[i] = (1 - a[i]) / s[i] * forms[i]
        eps[i, i] += a[i]
        if i < 2 and (flow or i == 0):
            rows[i, : i + 1] = torch.tensor([[1.0], [-0.5, 1.5]][i], dtype=torch.float64)
        else:
            first = next(j for j in range(max(0, i + 1 - order), i + 1) if rho[j].isfinite())  # of those interpolated
            b = pad(adams(rho[first : i + 2], a, i + 1 - first)[-1], (0, 2 + first))[: i + 1]
            if i > 1:
                r = (rho[i] - rho[i - 1]) / (rho[i - 1] - rho[i - 2])
                b[:3] += 0.9 * torch.stack([torch.ones_like(r), -1 - r, r])
            mean = b.flip(0) @ eps[: i + 1]
            moved = a[i + 1] * (forms[i] / a[i] + (rho[i + 1] - rho[i]) * mean)
            rows[i] = (moved - forms[i]) / (s[i + 1] - s[i])
        forms[i + 1] = forms[i] + (s[i + 1] - s[i]) * rows[i]
    newest = torch.stack([pad(rows[i, : i + 1].flip(0), (0, n - i - 1)) for i in range(n)])
    return newest if flow else newest[:, :3]


def heun(sigmas: Tensor) -> tuple[list[float], list[list[float]]]:
    """Heun's method, two evaluations a step: x^ = x + h d_1, then x' = x^ + h/2 (d_2 - d_1); Euler into sigma = 0.

    Source: EDM algorithm 1.
    """
    levels, rows = [], []
    for sigma, end in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        h = end - sigma
        levels += [sigma, end] if end > 0 else [sigma]
        rows += [[h, 0.0], [h / 2, -h / 2]] if end > 0 else [[h, 0.0]]
    return levels, rows


def dpm2(sigmas: Tensor) -> tuple[list[float], list[list[float]]]:
    """DPM-Solver-2: midpoint in log sigma, u = x + (m - sigma) d_1, x' = x + h d_2; Euler into sigma = 0.

    Source: DPM-Solver (Lu et al. 2022), algorithm 1, in the VE frame.
    """
    levels, rows = [], []
    for sigma, end in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        h, middle = end - sigma, math.sqrt(sigma * end)
        levels += [sigma, middle] if end > 0 else [sigma]
        rows += [[middle - sigma, 0.0], [h, sigma - middle]] if end > 0 else [[h, 0.0]]
    return levels, rows


def _derivatives(rows: Tensor, sigmas: Tensor) -> Schedule:
    return Schedule.from_weights(sigmas, rows)


def _data(rows: Tensor, sigmas: Tensor) -> Schedule:
    carries = sigmas[1:] / sigmas[:-1]
    return Schedule(sigmas, sigmas[:-1], (1 - carries)[:, None] * rows, sigmas.diff(), carries=carries)


def _stages(evaluations: tuple[list[float], list[list[float]]], sigmas: Tensor) -> Schedule:
    queries, increments = (torch.tensor(v, dtype=torch.float64) for v in evaluations)
    # A stage's size is what it moves the state by where the derivative is constant. Heun's second, h/2 (d_2 - d_1),
    # moves it by nothing there: its size is that of its newest derivative's part, h/2.
    sizes = torch.where(increments.sum(1) != 0, increments.sum(1), increments[:, 0])
    return Schedule(torch.cat([queries, sigmas[-1:].double()]), queries, increments, sizes)


@dataclass(frozen=True)
class Base:
    """One classical solver.

    Attributes:
        function: (sigmas, alphas, order) -> (N, K) weights; of a solver with stages, sigmas -> levels and rows of them.
        highest: its highest order; 1: there is no choice of it.
        read: how the function's numbers become a schedule: as weights of derivatives, of data predictions, or stages.
        lowers_below: shorter runs than this may end with lower orders, as diffusers' do (``lower_order_final``).
        evaluations: of the network, a step.
    """

    function: Callable[..., Any]
    highest: int
    read: Callable[[Any, Tensor], Schedule] = _derivatives
    lowers_below: float = 0
    evaluations: int = 1

    def __call__(self, sigmas: Tensor, alphas: Tensor, order: int, lower_order_final: bool = False) -> Tensor:
        """(N, K) weights over derivatives; K = N where the function's are of data predictions.

        Raises:
            ValueError: its steps have stages, so that it is no table.
        """
        if self.evaluations > 1:
            raise ValueError(f"A solver of {self.evaluations} evaluations a step is no table of past derivatives.")
        rows = self._rows(sigmas, alphas, order, lower_order_final)
        return from_data_prediction(sigmas, rows) if self.read is _data else rows

    def schedule(self, sigmas: Tensor, alphas: Tensor, order: int, lower_order_final: bool = False) -> Schedule:
        """The solver on a grid, in the form that remembers least.

        Args:
            order: of a multistep solver.
            lower_order_final: end with lower orders, where the solver does.
        """
        if self.evaluations > 1:
            return self.read(self.function(sigmas), sigmas)
        return self.read(self._rows(sigmas, alphas, order, lower_order_final), sigmas)

    def _rows(self, sigmas: Tensor, alphas: Tensor, order: int, lower_order_final: bool) -> Tensor:
        options = {"lower_order_final": lower_order_final} if self.lowers_below else {}
        return self.function(sigmas, alphas, order, **options)


BASES: dict[str, Base] = {
    "euler": Base(euler, 1),
    "uniform": Base(uniform, 4),
    "ipndm": Base(ipndm, 4),
    "adams": Base(adams, 4),
    "deis": Base(deis, 3, lowers_below=15),
    "dpmpp": Base(dpmpp, 3, _data, lowers_below=15),
    "unipc": Base(unipc, 3, _data, lowers_below=math.inf),
    "res": Base(res, 2, _data),
    "cab": Base(cab, 3),
    "heun": Base(heun, 1, _stages, evaluations=2),
    "dpm2": Base(dpm2, 1, _stages, evaluations=2),
}


def multistep() -> list[str]:
    """Names of the solvers that are tables of past derivatives: one evaluation a step."""
    return [name for name, base in BASES.items() if base.evaluations == 1]


_MONOMIALS = torch.tensor([1.0, 1 / 2, 1 / 3, 1 / 4], dtype=torch.float64)  # integrals of theta^m over [0, 1]


def _rows(sigmas: Tensor, order: int, row: Callable[[int, int], Tensor]) -> Tensor:
    """Table whose row i is ``row(i, k)`` with k = min(order, i + 1) derivatives at hand."""
    rows = [row(i, min(order, i + 1)) for i in range(len(sigmas) - 1)]
    return torch.stack([pad(values, (0, order - len(values))) for values in rows])


def _interpolatory(nodes: Tensor, moments: Tensor) -> Tensor:
    """Weights exact for polynomials: sum_j w_j nodes_j^m = moments_m for m < number of nodes."""
    return torch.linalg.solve(torch.stack([nodes**m for m in range(len(nodes))]), moments)


def _in_log_snr(
    sigmas: Tensor,
    alphas: Tensor,
    order: int,
    lower_order_final: bool,
    combine: Callable[[float, list[float]], Sequence[float]],
) -> Tensor:
    """(N, K) weights of past data predictions, in lambda = log(alpha / sigma), half the log SNR.

    lambda is -inf at flow's sigma = 1 and +inf at sigma = 0, which is stepped into with order 1.

    Args:
        combine: (h, gaps) -> coefficients of D_i, D_{i-1}, ...; h is the step in lambda, gaps[j] = (lambda_{i-j} -
            lambda_{i-j-1}) / h, one for each past D in use.
    """
    lambdas, n = (alphas.double().log() - sigmas.double().log()).tolist(), len(sigmas) - 1

    def row(i: int) -> Sequence[float]:
        k = min(order, i + 1, n - i if lower_order_final else n)
        if k == 1 or sigmas[i + 1] == 0:
            return [1.0]
        h = lambdas[i + 1] - lambdas[i]
        return combine(h, [(lambdas[i - j] - lambdas[i - j - 1]) / h for j in range(k - 1)])

    rows = [torch.tensor(row(i), dtype=torch.float64) for i in range(n)]
    return torch.stack([pad(values, (0, order - len(values))) for values in rows])


def from_data_prediction(sigmas: Tensor, rows: Tensor) -> Tensor:
    """Re-express x' = r x + (1 - r) sum_j c_j D_{i-j}, r = sigma'/sigma, over derivatives: D_k = x_k - sigma_k d_k.

    1 - r = alpha' (1 - e^-h) in both frames. Each x_k is x_0 plus a linear form in d_0..d_{k-1}; the table is the
    difference of consecutive forms over the step size.
    """
    n, s = len(sigmas) - 1, sigmas.double()
    forms = torch.zeros(n + 1, n, dtype=torch.float64)
    denoised = torch.zeros(n, n, dtype=torch.float64)
    weights = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        denoised[i] = forms[i]
        denoised[i, i] -= s[i]
        r = s[i + 1] / s[i]
        mean = sum(c * denoised[i - j] for j, c in enumerate(rows[i, : i + 1].tolist()))
        forms[i + 1] = r * forms[i] + (1 - r) * mean
        weights[i, : i + 1] = ((forms[i + 1] - forms[i]) / (s[i + 1] - s[i]))[: i + 1].flip(0)
    return weights
