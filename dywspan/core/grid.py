"""Noise-level grids: sigma_0 > ... > sigma_N for N steps, as float64 tensors of N + 1 values on the CPU.

A grid is written down as a mapping: ``{"name": "polynomial", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}`` or,
explicitly, ``{"sigmas": [...]}``. A published table is only meaningful on its own grid.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .check import as_float, number, shown
from .prediction import Flow, Prediction, VariancePreserving


def polynomial(n: int, *, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """sigma_i = (sigma_max^(1/rho) + i/N (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho. Source: EDM eq. (5)."""
    return _line(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n) ** rho


def logsnr(n: int, *, sigma_min: float, sigma_max: float) -> Tensor:
    """Uniform in log sigma. Source: DPM-Solver, section 3.4."""
    if sigma_min <= 0:
        raise ValueError(f"sigma_min={sigma_min:g} must be above 0: it has a logarithm")
    return _line(math.log(sigma_max), math.log(sigma_min), n).exp()


def time_uniform(n: int, *, sigma_min: float, sigma_max: float, rho: float = 1.0, epsilon: float = 1e-3) -> Tensor:
    """Uniform in the time t of the continuous VP process whose sigma(1) = sigma_max and sigma(epsilon) = sigma_min.

    sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1. Source: EDM table 1 (VP column).
    """
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (low / epsilon - high) / (epsilon - 1)
    beta_min = high - beta_d / 2
    t = _line(1.0, epsilon ** (1 / rho), n) ** rho
    return torch.expm1(beta_d * t**2 / 2 + beta_min * t).sqrt()


def discrete(n: int, *, prediction: Prediction, sigma_min: float, sigma_max: float) -> Tensor:
    """Uniform in the model time of a VP network, from t(sigma_max) to t(sigma_min); sigma_min = 0 is allowed."""
    if not isinstance(prediction, VariancePreserving):
        raise ValueError(f"it needs a network with discrete VP times, not {type(prediction).__name__}")
    ends = prediction.timestep(torch.tensor([sigma_max, sigma_min], dtype=torch.float64))
    return prediction.sigma(_line(float(ends[0]), float(ends[1]), n))


def flow(n: int, *, shift: float | None = None, mu: float | None = None) -> Tensor:
    """sigma = a / (a + 1/t - 1), t = linspace(1, 0, N+1), a = shift = e^mu. Source: SD3 eq. (23); FLUX.

    Leave both out for the resolution-dependent shift: the pipeline's own ``mu`` is used then.
    """
    if shift is not None and mu is not None:
        raise ValueError(f"it takes one of shift and mu (the pipeline's, if neither); got {shift=}, {mu=}")
    a = math.exp(mu) if mu is not None else 1.0 if shift is None else shift
    t = torch.linspace(1, 0, n + 1, dtype=torch.float64)
    return a * t / (a * t + (1 - t))  # exactly 1 at t = 1


GRIDS: dict[str, Callable[..., Tensor]] = {
    "polynomial": polynomial,
    "logsnr": logsnr,
    "time_uniform": time_uniform,
    "discrete": discrete,
    "flow": flow,
}


# What the parameters of every grid may be; of one that is not here, any finite number.
RANGES: dict[str, tuple[float, float]] = {
    "sigma_min": (0.0, 1e6),
    "sigma_max": (1e-6, 1e6),
    "rho": (0.1, 100.0),
    "epsilon": (1e-8, 0.99),
    "shift": (1e-3, 1e3),
    "mu": (-10.0, 10.0),
}


def make_grid(spec: Mapping[str, Any], n: int, prediction: Prediction, mu: float | None = None) -> Tensor:
    """The N + 1 nominal levels that ``spec`` describes.

    Args:
        spec: a named grid with its parameters, or ``{"sigmas": [...]}`` with N + 1 values.
        n: number of solver steps N.
        prediction: the network convention (grid 'discrete' is uniform in its times).
        mu: the pipeline's resolution-dependent shift, used by grid 'flow' where the spec fixes none.

    Raises:
        ValueError: unknown name or parameter, a value out of ``RANGES``, wrong number of levels, levels that are not
            finite and decreasing, or above 1 for a flow network.
    """
    if not isinstance(spec, Mapping):
        raise ValueError(f"A grid is a mapping such as {{'name': 'flow'}} or {{'sigmas': [...]}}; got {shown(spec)}.")
    sigmas = _listed(spec) if "sigmas" in spec else _named(spec, n, prediction, mu)
    if sigmas.shape != (n + 1,):
        raise ValueError(f"A grid for {n} steps has {n + 1} levels; got {len(sigmas)} from {shown(dict(spec))}.")
    if not (bool(sigmas.isfinite().all()) and bool((sigmas.diff() < 0).all()) and float(sigmas[-1]) >= 0):
        levels = shown(sigmas.tolist())
        raise ValueError(f"Grid levels must be finite, decreasing and end at 0 or above; got {levels}.")
    if isinstance(prediction, Flow) and float(sigmas[0]) > 1 + 1e-6:  # sigma = 1 may be rounded up
        raise ValueError(f"A flow network's levels are in [0, 1]: the grid {shown(dict(spec))} starts at {sigmas[0]}.")
    return sigmas


def _listed(spec: Mapping[str, Any]) -> Tensor:
    """The levels of ``{"sigmas": [...]}``."""
    if rest := sorted(map(str, spec.keys() - {"sigmas"})):
        raise ValueError(f"A grid of sigmas has no other keys; got {shown(rest)} too. Give sigmas, or a named grid.")
    sigmas, (low, high) = spec["sigmas"], RANGES["sigma_min"]
    if not isinstance(sigmas, (list, tuple)) or not all(abs(as_float(sigma)) <= high for sigma in sigmas):
        raise ValueError(f"sigmas={shown(sigmas)} must be a list of finite numbers from {low:g} to {high:g}.")
    return torch.tensor([float(sigma) for sigma in sigmas], dtype=torch.float64)


def _named(spec: Mapping[str, Any], n: int, prediction: Prediction, mu: float | None) -> Tensor:
    """The levels of ``{"name": ..., ...}``."""
    name, given = spec.get("name"), {k: v for k, v in spec.items() if k != "name"}
    if not isinstance(name, str) or name not in GRIDS:
        raise ValueError(f"Unknown grid {shown(name)}: use one of {sorted(GRIDS)}, or {{'sigmas': [...]}}.")
    known = {k: p for k, p in inspect.signature(GRIDS[name]).parameters.items() if k not in ("n", "prediction")}
    if unknown := sorted(map(str, given.keys() - known.keys())):
        raise ValueError(f"Grid {name!r} has no parameter {shown(unknown)}: it takes {sorted(known)}.")
    if missing := [k for k, p in known.items() if p.default is p.empty and k not in given]:
        raise ValueError(f"Grid {name!r} needs {' and '.join(missing)}.")
    given = {k: v for k, v in given.items() if v is not None or known[k].default is not None}
    if "mu" in known and mu is not None and not given:
        given = {"mu": mu}
    try:
        params: dict[str, Any] = {k: number(k, v, *RANGES.get(k, ())) for k, v in given.items()}
        if params.get("sigma_min", 0) >= params.get("sigma_max", math.inf):
            raise ValueError("sigma_min={sigma_min:g} must be less than sigma_max={sigma_max:g}".format(**params))
        if "prediction" in inspect.signature(GRIDS[name]).parameters:
            params["prediction"] = prediction
        return GRIDS[name](n, **params)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"Grid {name!r}: {str(error).rstrip('.')}.") from error


def _line(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(start, end, n + 1, dtype=torch.float64)
