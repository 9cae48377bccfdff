"""Any linear scheduler of diffusers as a table: its steps are asked what they make of unit vectors.

    x_{i+1} = x_i + (sigma_{i+1} - sigma_i) sum_j w_ij d_{i-j}

A deterministic solver of one evaluation a step combines the noise and the network's outputs linearly, whatever its code
does with predictors, correctors and logarithms. Given the noise and the outputs as unit vectors, its states are the
coefficients.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.prediction import Flow, Prediction, VariancePreserving
from ..core.table import SolverTable

_NEAR = 1e-3  # of what is left of the noise, and of the rows' sums, which are 1: it computes in float32


def as_table(scheduler: Any, prediction: Prediction, steps: int, mu: float | None = None) -> SolverTable:
    """The table that samples what a scheduler of diffusers does.

    Args:
        scheduler: for networks of this prediction.
        mu: the pipeline's resolution-dependent shift.

    Raises:
        ValueError: it is none: random, not linear, of several evaluations a step, or on levels apart from its times.
    """
    kind = type(scheduler)
    name, plain = kind.__name__, dict[str, Any](clip_sample=False, thresholding=False)
    if isinstance(prediction, VariancePreserving):
        plain["prediction_type"] = "epsilon"  # outputs that are the derivative itself
    elif not isinstance(prediction, Flow):
        raise ValueError(
            f"{name} for {type(prediction).__name__} networks is not read: their outputs are no derivatives."
        )
    own = built(kind, {**scheduler.config, **plain})
    own.set_timesteps(steps, **({"mu": mu} if own.config.get("use_dynamic_shifting") else {}))
    levels, times = getattr(own, "sigmas", None), own.timesteps
    if len(times) != steps or levels is None or len(levels) != steps + 1:
        raise ValueError(f"{name} takes {len(times)} evaluations for {steps} steps, or names no levels.")
    levels = levels.double().cpu()
    states = _states(own, prediction, levels)
    if float((states[:, 0] / states[0, 0] - 1).abs().max()) > _NEAR:
        raise ValueError(f"{name} does not keep the noise's part as an ODE's solver does: {states[:, 0].tolist()}.")
    weights = (states[1:, 1:] - states[:-1, 1:]) / levels.diff()[:, None]  # of d_0, d_1, ...
    if (
        not bool(weights.isfinite().all())
        or float((weights.sum(1) - 1).abs().max()) > _NEAR
        or float(weights.triu(1).abs().max()) > _NEAR
    ):
        raise ValueError(f"{name} does not follow a straight line: {weights.tolist()}.")
    rows = torch.stack([pad(row[: i + 1].flip(0), (0, steps - i - 1)) for i, row in enumerate(weights)])
    rows[rows.abs() < 1e-5] = 0  # what rounding leaves
    rows = rows / rows.sum(1, keepdim=True)
    width = 1 + max(int(j) for j in rows.abs().amax(0).nonzero())
    # s = 1: the network is told the time of each level, which such schedulers round.
    ones = torch.ones(steps, dtype=torch.float64)
    return SolverTable(rows[:, :width], ones, {"sigmas": levels.tolist()}, convention=prediction.convention)


def built(kind: type, settings: Mapping[str, Any]) -> Any:
    """A scheduler of diffusers with those of the settings that it has."""
    known = inspect.signature(kind.__init__).parameters
    return kind(**{name: value for name, value in settings.items() if name in known})


def _states(scheduler: Any, prediction: Prediction, levels: Tensor) -> Tensor:
    """(N + 1, N + 1) float64: of each state in the solver's frame, the parts of the noise and of each output."""
    n, is_flow = len(levels) - 1, isinstance(prediction, Flow)
    unit = torch.eye(n + 1, dtype=torch.float64).reshape(n + 1, 1, n + 1, 1, 1)
    x, states = unit[0] * float(getattr(scheduler, "init_noise_sigma", 1.0)), list[Tensor]()
    for i, t in enumerate(scheduler.timesteps):
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        states.append(given.flatten() * (1.0 if is_flow else float((1 + levels[i] ** 2).sqrt())))
        x = scheduler.step(unit[i + 1], t, x, return_dict=False)[0]
    return torch.stack([*states, x.flatten() * (1.0 if is_flow else float((1 + levels[-1] ** 2).sqrt()))])
