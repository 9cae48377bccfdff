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

from .prediction import Prediction, VariancePreserving


def polynomial(n: int, *, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """sigma_i = (sigma_max^(1/rho) + i/N (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho. Source: EDM eq. (5)."""
    return _line(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n) ** rho


def logsnr(n: int, *, sigma_min: float, sigma_max: float) -> Tensor:
    """Uniform in log sigma. Source: DPM-Solver, section 3.4."""
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
        raise ValueError(f"Grid 'discrete' needs a network with discrete VP times, not {type(prediction).__name__}.")
    ends = prediction.timestep(torch.tensor([sigma_max, sigma_min], dtype=torch.float64))
    return prediction.sigma(_line(float(ends[0]), float(ends[1]), n))


def flow(n: int, *, shift: float | None = None, mu: float | None = None) -> Tensor:
    """sigma = a / (a + 1/t - 1), t = linspace(1, 0, N+1), a = shift = e^mu. Source: SD3 eq. (23); FLUX.

    Leave both out for the resolution-dependent shift: the pipeline's own ``mu`` is used then.
    """
    if (shift is None) == (mu is None):
        raise ValueError(f"Grid 'flow' takes one of shift and mu (the pipeline's, if neither); got {shift=}, {mu=}.")
    a = math.exp(mu) if mu is not None else float(shift or 0)
    t = torch.linspace(1, 0, n + 1, dtype=torch.float64)
    return a * t / (a * t + (1 - t))  # exactly 1 at t = 1


GRIDS: dict[str, Callable[..., Tensor]] = {
    "polynomial": polynomial,
    "logsnr": logsnr,
    "time_uniform": time_uniform,
    "discrete": discrete,
    "flow": flow,
}


def make_grid(spec: Mapping[str, Any], n: int, prediction: Prediction, mu: float | None = None) -> Tensor:
    """The N + 1 nominal levels that ``spec`` describes.

    Args:
        spec: a named grid with its parameters, or ``{"sigmas": [...]}`` with N + 1 values.
        n: number of solver steps N.
        prediction: the network convention (grid 'discrete' is uniform in its times).
        mu: the pipeline's resolution-dependent shift, used by grid 'flow' where the spec fixes none.

    Raises:
        ValueError: unknown name or parameter, wrong number of levels, levels that are not finite and decreasing.
    """
    if not isinstance(spec, Mapping):
        raise ValueError(f"A grid is a mapping such as {{'name': 'flow'}} or {{'sigmas': [...]}}; got {spec!r}.")
    params = dict(spec)
    if "sigmas" in params:
        sigmas = torch.as_tensor(params["sigmas"], dtype=torch.float64)
    else:
        name = params.pop("name", None)
        if name not in GRIDS:
            raise ValueError(f"Unknown grid {name!r}: use one of {sorted(GRIDS)}, or {{'sigmas': [...]}}.")
        known = inspect.signature(GRIDS[name]).parameters
        if "prediction" in known:
            params["prediction"] = prediction
        if name == "flow" and params.get("shift") is None and params.get("mu") is None:
            params = {"mu": mu} if mu is not None else {"shift": 1.0}
        if unknown := sorted(params.keys() - known.keys()):
            raise ValueError(f"Grid {name!r} has no parameter {unknown}: it takes {sorted(known.keys() - {'n'})}.")
        try:
            sigmas = GRIDS[name](n, **params)
        except (TypeError, ArithmeticError, RuntimeError) as error:
            raise ValueError(f"Grid {name!r}: {error}.") from error
    if sigmas.shape != (n + 1,):
        raise ValueError(f"A grid for {n} steps has {n + 1} levels; got {tuple(sigmas.shape)} from {dict(spec)}.")
    if not (bool(sigmas.isfinite().all()) and bool((sigmas.diff() < 0).all()) and float(sigmas[-1]) >= 0):
        raise ValueError(f"Grid levels must be finite, decreasing and end at 0 or above; got {sigmas.tolist()}.")
    return sigmas


def _line(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(start, end, n + 1, dtype=torch.float64)
