"""Classical multistep solvers as weight tables over past derivatives.

Each base is a function ``(sigmas, alphas, order, ...) -> weights`` with ``sigmas`` the (N+1,) grid, ``alphas`` the
signal levels on it (ones in the VE frame) and ``weights`` an (N, K) float64 table whose rows sum to 1: an untrained
DyWeight table *is* one of these. Column j multiplies the j-th newest derivative; orders grow from 1 with the history.
"adams" and "deis" are differentiable in the levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


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

    The step into sigma = 0 is first order; ``lower_order_final`` lets the order fall again over the last steps.
    Re-expressed over derivatives a data-prediction solver needs the whole history: K = N. The published 3M weighs the
    second difference with half its Taylor coefficient, so it converges with order 2; it is kept as everyone runs it.
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
    """UniPC's predictor (UniP, B(h) = e^h - 1, data prediction). Source: Zhao et al. 2023, algorithm 2. K = N."""

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


BASES: dict[str, Callable[..., Tensor]] = {
    "euler": euler,
    "uniform": uniform,
    "ipndm": ipndm,
    "adams": adams,
    "deis": deis,
    "dpmpp": dpmpp,
    "unipc": unipc,
}
MAX_ORDER = {"euler": 1, "uniform": 4, "ipndm": 4, "adams": 4, "deis": 3, "dpmpp": 3, "unipc": 3}

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
    """Table of a data-prediction solver in lambda = log(alpha / sigma), half the log SNR.

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

    return from_data_prediction(sigmas, row)


def from_data_prediction(sigmas: Tensor, combine: Callable[[int], Sequence[float]]) -> Tensor:
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
        mean = sum(c * denoised[i - j] for j, c in enumerate(combine(i)))
        forms[i + 1] = r * forms[i] + (1 - r) * mean
        weights[i, : i + 1] = ((forms[i + 1] - forms[i]) / (s[i + 1] - s[i]))[: i + 1].flip(0)
    return weights
