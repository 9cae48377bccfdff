"""Functions of the grid that write a solver's numbers for every number of steps: a table's, and SpanLift's scalars."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .bases import multistep
from .check import as_float, identifier, shown, whole
from .grid import make_grid
from .operator import Lift
from .prediction import Prediction
from .table import SOME_NETWORK, InvalidSolverError, SolverTable, base_weights, check_convention, check_name

FEATURES = ("1", "u", "2u^2-1", "delta", "delta u", "first", "last", "last but one")
HIGHEST_ORDER = 8
LARGEST = 1e6  # coefficient, horizon, guidance scale
GUIDED = tuple(f"({name}) log(g/g0)" for name in FEATURES)


@dataclass(frozen=True, eq=False)
class ContinuousTable:
    """A base solver and corrections to it that fade as steps get small, so that the base's order of convergence stays.

        logit p_{i+1}     += f^(K-1) (C_0 . phi_i),                  p_i = (u_i - u_N) / (u_0 - u_N),    i = 0 .. N-2
        sum_j w_ij d_{i-j} = L_i (sum_j base_ij d_{i-j} + sum_m f^(K-m) (C_m . phi_i) nabla^m d_i),    m = 1 .. K-1
        s_i                = exp(f^K (C_K . phi_i)),                                        f = 1 / (1 + N / horizon)

    The first moves the levels of the states between the first and the last (by f if K = 1), and the base is that of the
    levels moved to. L_i is how much longer the step there is than to the grid's level, and in the last step
    exp(f^(K-1) (C_0 . phi)). nabla^m d is the m-th backward difference, of the size h^m: every correction is of the
    size h^K, times the step. phi are ``FEATURES`` of a step: u = tanh(log(sigma / alpha) / 4), where it stands; delta,
    how much longer than the mean it is in u; whether it is the first, the last, or the one before. With the guidance
    scale g as an input, phi are twice as many: these, and these times log(g / g0).

    Attributes:
        coefficients: (K + 1, 8) C, or (K + 1, 16) with g0, dimensionless; zeros are the base solver.
        grid: the nominal grid for every N, see :func:`dywspan.core.grid.make_grid`.
        base: of ``BASES``, with K = ``order``.
        horizon: number of steps at which f is 1/2.
        guidance_scale: g0, that it was learned around; None: the guidance scale is no input.
        provenance: where it comes from: free JSON.
        convention: what its levels mean, see :class:`dywspan.core.table.SolverTable`.

    Raises:
        ValueError: wrong shape, non-finite numbers, no such base or grid, a horizon or g0 that is not positive.
    """

    coefficients: Tensor
    grid: Mapping[str, Any]
    base: str = "adams"
    horizon: float = 8.0
    guidance_scale: float | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    convention: str | None = None

    def __post_init__(self) -> None:
        _check(self)
        check_name(self.convention)
        whole("K = rows of coefficients - 1", self.order, 1, HIGHEST_ORDER)
        if self.base not in multistep():
            raise ValueError(f"Unknown base solver {shown(self.base)}: use one of {sorted(multistep())}.")
        if isinstance(self.grid, Mapping) and "sigmas" in self.grid:
            raise ValueError("A solver for every number of steps needs a named grid, not a list of sigmas.")
        make_grid(self.grid, 2, SOME_NETWORK)

    @property
    def order(self) -> int:
        """K, derivatives a step uses."""
        return len(self.coefficients) - 1

    @classmethod
    def initial(
        cls, order: int, grid: Mapping[str, Any], *, base: str = "adams", horizon: float = 8.0
    ) -> ContinuousTable:
        """The base solver."""
        return cls(torch.zeros(order + 1, len(FEATURES), dtype=torch.float64), dict(grid), base, horizon)

    def fades(self, num_inference_steps: int) -> Tensor:
        """(K + 1,) what each row of C counts for: f^(K-1) of levels, f^(K-m) of nabla^m, f^K of the time scale."""
        exponents = [max(1, self.order - 1), *range(self.order - 1, 0, -1), self.order]
        return _fade(num_inference_steps, self.horizon) ** torch.tensor(exponents, dtype=torch.float64)

    def table(
        self,
        num_inference_steps: int,
        prediction: Prediction,
        mu: float | None = None,
        sigmas: Tensor | None = None,
        guidance_scale: float | None = None,
        whole: int | None = None,
    ) -> SolverTable:
        """The table for one number of steps; differentiable in the coefficients.

        Args:
            mu: the pipeline's resolution-dependent shift.
            sigmas: (N+1,) another grid than the nominal one.
            guidance_scale: g; None: g0. Nothing depends on it where it is no input.
            whole: number of steps of the whole way of which ``sigmas`` are the end: corrections fade as there.

        Raises:
            ValueError: the corrections move the levels out of their order.
        """
        n, order = num_inference_steps, self.order
        check_convention(self.convention, self.grid if sigmas is None else {}, prediction, "This solver")
        grid = dict(self.grid) if sigmas is None else {"sigmas": sigmas.tolist()}
        levels = make_grid(grid, n, prediction, mu)
        alphas = prediction.signal(levels)
        corrections = features(levels, alphas) @ _at(self, guidance_scale).T * self.fades(whole or n)
        moves, *bends, scales = corrections.unbind(1)
        moved = _moved(levels, alphas, moves)
        lengths = torch.cat([moved.diff()[:-1] / (levels[1:-1] - moved[:-2]), moves[-1:].exp()])
        try:
            weights = base_weights(self.base, moved, prediction, order)
        except (ZeroDivisionError, torch.linalg.LinAlgError) as error:  # deis: levels as near as rounding
            raise InvalidSolverError(f"The corrections move levels onto one another: {moved.tolist()}.") from error
        if bends:  # step i has i + 1 derivatives
            weights = weights + torch.stack(bends, 1).tril(-1) @ differences(order)[1:]
        weights, own = lengths[:, None] * weights, {"provenance": self.provenance, "convention": prediction.convention}
        return SolverTable(weights, scales.exp(), grid, **own)


def _moved(sigmas: Tensor, alphas: Tensor, moves: Tensor) -> Tensor:
    """(N+1,) the levels of the states, between the first and the last of the grid."""
    u, move = _place(sigmas, alphas), torch.expm1(moves[:-1])
    place, whole = u[1:-1], u[0] - u[-1]
    p = (place - u[-1]) / whole
    delta = whole * p * (1 - p) * move / (1 + p * move)  # of u
    grow = ((1 + delta / (1 + place)) / (1 - delta / (1 - place))) ** 2 - 1  # of r = ((1 + u) / (1 - u))^2
    inner = sigmas[1:-1] * (1 + grow) / (1 + (1 - alphas[1:-1]) * grow)
    moved = torch.cat([sigmas[:1], inner, sigmas[-1:]])
    if not bool((moved.detach().diff() < 0).all()):
        raise InvalidSolverError(f"The corrections move the levels out of their order: {moved.tolist()}.")
    return moved


@dataclass(frozen=True, eq=False)
class ContinuousLift:
    """SpanLift's scalars for every number of steps, which fade as a continuous table's corrections do.

        alpha_i = 1 + f^K (C_0 . phi_i),    beta_i = f^K (C_1 . phi_i),    f = 1 / (1 + N / horizon)

    A base of order K so keeps its order of convergence, whatever the operator. phi are ``FEATURES`` of a step between
    the levels of the base's schedule, on any grid; with the guidance scale as an input twice as many, as there.

    Attributes:
        coefficients: (2, 8) C, or (2, 16) with g0, dimensionless; zeros are the base.
        order: K, of the base.
        horizon: number of steps at which f is 1/2.
        operator: name of the operator it uses.
        guidance_scale: g0, as in :class:`ContinuousTable`.
        provenance: where it comes from: free JSON.

    Raises:
        ValueError: wrong shape, non-finite numbers, an order, a horizon or g0 that is not positive, no name.
    """

    coefficients: Tensor
    order: int
    horizon: float = 8.0
    operator: str = "shared"
    guidance_scale: float | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self, 2)
        whole("order", self.order, 1, HIGHEST_ORDER)
        identifier("operator", self.operator)

    @classmethod
    def initial(cls, order: int, *, horizon: float = 8.0, operator: str = "shared") -> ContinuousLift:
        """alpha_i = 1, beta_i = f^K: the base while the operator's head is zero, which a gradient reaches at once."""
        coefficients = torch.zeros(2, len(FEATURES), dtype=torch.float64)
        coefficients[1, 0] = 1.0
        return cls(coefficients, order, horizon, operator)

    def lift(
        self, levels: Tensor, prediction: Prediction, guidance_scale: float | None = None, whole: int | None = None
    ) -> Lift:
        """alpha and beta of N steps; differentiable in the coefficients.

        Args:
            levels: (N+1,) of the states, see :class:`dywspan.core.step.Schedule`.
            guidance_scale: g; None: g0.
            whole: as of :meth:`ContinuousTable.table`.
        """
        fade = _fade(whole or len(levels) - 1, self.horizon)
        phi = features(levels, prediction.signal(levels))
        alpha, beta = (fade**self.order * (phi @ _at(self, guidance_scale).T)).unbind(1)
        return Lift(1 + alpha, beta, self.operator, self.provenance)


Continuous = TypeVar("Continuous", ContinuousTable, ContinuousLift)


def names(guidance_scale: float | None) -> tuple[str, ...]:
    """Of the columns of the coefficients."""
    return FEATURES if guidance_scale is None else FEATURES + GUIDED


def guided(function: Continuous, guidance_scale: float | None) -> Continuous:
    """The same with the guidance scale as an input, around g0, and no effect yet; as it is if it has that input."""
    if guidance_scale is None or function.guidance_scale is not None:
        return function
    wide = torch.cat([function.coefficients, torch.zeros_like(function.coefficients)], 1)
    return replace(function, coefficients=wide, guidance_scale=guidance_scale)


def check_guidance_scale(value: Any) -> None:
    """It has a logarithm.

    Raises:
        ValueError: it is not None and no positive number up to ``LARGEST``.
    """
    if value is not None and not 0 < as_float(value) <= LARGEST:
        raise ValueError(
            f"guidance_scale={shown(value)} must be a positive number, 1 without guidance, or None; up to {LARGEST:g}."
        )


def _fade(num_inference_steps: int, horizon: float) -> float:
    """f = 1 / (1 + N / horizon)."""
    return 1 / (1 + num_inference_steps / horizon)


def _at(function: ContinuousTable | ContinuousLift, guidance_scale: float | None) -> Tensor:
    """(rows, 8) float64 coefficients of phi at a guidance scale."""
    check_guidance_scale(guidance_scale)
    coefficients, around = function.coefficients.double(), function.guidance_scale
    if around is None:
        return coefficients
    plain, slopes = coefficients.tensor_split(2, dim=1)
    return plain + math.log((guidance_scale or around) / around) * slopes


def _check(function: ContinuousTable | ContinuousLift, rows: int | None = None) -> None:
    coefficients, horizon = function.coefficients, function.horizon
    check_guidance_scale(function.guidance_scale)
    shape, columns = tuple(coefficients.shape), len(names(function.guidance_scale))
    if len(shape) != 2 or shape[1] != columns or (shape[0] < 2 if rows is None else shape[0] != rows):
        raise ValueError(
            f"coefficients must be {rows or '(K + 1)'} x {columns} numbers"
            + (", twice the features with guidance_scale" if function.guidance_scale is not None else "")
            + f"; got shape {shape}."
        )
    if not bool((coefficients.detach().abs() <= LARGEST).all()):
        raise InvalidSolverError(
            f"coefficients must be finite; got {shown(coefficients.tolist())}; none may be larger than {LARGEST:g}."
        )
    if not 0 < as_float(horizon) <= LARGEST:
        raise ValueError(f"horizon={shown(horizon)} must be a positive number of steps, at most {LARGEST:g}.")


def differences(order: int) -> Tensor:
    """(K, K): row m are the weights of d_i, d_{i-1}, ... in nabla^m d_i = sum_j (-1)^j binomial(m, j) d_{i-j}."""
    rows = [[(-1.0) ** j * math.comb(m, j) for j in range(order)] for m in range(order)]
    return torch.tensor(rows, dtype=torch.float64)


def features(sigmas: Tensor, alphas: Tensor) -> Tensor:
    """(N, 8) phi of each step, see :class:`ContinuousTable`; bounded at sigma = 0 and at flow's sigma = 1.

    Args:
        sigmas, alphas: (N+1,) noise and signal levels.
    """
    u, n = _place(sigmas, alphas), len(sigmas) - 1
    place = u[:-1]
    longer = n * (u[:-1] - u[1:]) / (u[0] - u[-1]) - 1
    ends = torch.eye(n + 1, n, dtype=torch.float64)[[0, n - 1, n - 2 if n > 1 else n]]
    return torch.stack([torch.ones_like(place), place, 2 * place**2 - 1, longer, longer * place, *ends], 1)


def _place(sigmas: Tensor, alphas: Tensor) -> Tensor:
    """u = tanh(log(sigma / alpha) / 4), in [-1, 1]."""
    return torch.tanh((sigmas.double().log() - alphas.double().clamp(min=0).log()) / 4)  # sigma = 1 may be rounded up
