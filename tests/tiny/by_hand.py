"""The papers' equations written out in plain numbers, and what a call did compared with them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dywspan import SolverTable, SpanLiftScheduler
from dywspan.core.layout import LAYOUTS

from .registry import Tiny, Trace


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, in units of the values' own size."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-8))


def check(tiny: Tiny, trace: Trace, table: SolverTable, lifted: SpanLiftScheduler | None) -> None:
    """Every step and every time of a call with ``table``, lifted or not."""
    n = tiny.steps
    if tiny.flow:  # sigma = 2t / (1 + t)
        grid = [2 * t / (1 + t) for t in (1 - i / n for i in range(n + 1))]
    else:
        grid = [(10 ** (1 / 7) * (1 - i / n) + 0.03 ** (1 / 7) * i / n) ** 7 for i in range(n + 1)]
    levels = grid[:1]
    for target, weights in zip(grid[1:], table.weights.tolist()):
        levels.append(levels[-1] + sum(weights) * (target - levels[-1]))
    taus = [float(s) * level for s, level in zip(table.time_scale, levels)]
    torch.testing.assert_close(trace.timesteps.double(), model_times(tiny, taus), rtol=1e-5, atol=1e-3)

    # The frame the network sees: x / sqrt(1 + tau^2) for the first two kinds of network in derivative(); of EDM's,
    # whose output stands for data of another deviation, x / sqrt(sigma_data^2 + tau^2).
    scale = [(tiny.sigma_data**2 + tau**2) ** -0.5 for tau in taus]
    frame = [1.0] * (n + 1) if tiny.flow else [*scale, 1.0]
    begin = trace.timesteps.tolist().index(float(tiny.seen(trace.timesteps)[0]))
    for time, clean, noise, noisy in trace.noised:
        i = trace.timesteps.tolist().index(time)
        alpha = 1 - levels[i] if tiny.flow else 1
        assert distance(noisy.double(), frame[i] * (alpha * clean.double() + levels[i] * noise.double())) < 1e-6
    lift = lifted.lifts[n] if lifted else None
    past: list[Tensor] = []  # newest first
    for i, (output, sample, prev_sample) in enumerate(trace.steps, start=begin):
        x, output = sample.double() / frame[i], output[:, : sample.shape[1]].double()
        if tiny.raw_noise and i == 0:
            x = sample.double() * grid[0]
        d = derivative(tiny, x, output, levels[i], taus[i])
        newest, older = table.weights[i].tolist()
        h, state, past = grid[i + 1] - levels[i], x * frame[i], [d, *past]
        change = h * (newest * d + older * past[min(1, len(past) - 1)])
        if lifted is not None and lift is not None:
            alpha = 1 - levels[i] if tiny.flow else 1.0
            log_snr = math.log(alpha / levels[i]) if alpha > 0 else -math.inf
            time = model_times(tiny, taus[i : i + 1]).item() / (1 if tiny.edm else whole(tiny))
            condition = [2 * time - 1, math.tanh(log_snr / 4), math.tanh(math.log(abs(h)) / 4)]
            change = lift.alpha[i] * change + h * lift.beta[i] * operate(lifted, [state, *past[:3]], condition)
        x = x + change
        assert distance(prev_sample.double(), x * frame[i + 1]) < tiny.tolerance


def operate(lifted: SpanLiftScheduler, values: list[Tensor], condition: list[float]) -> Tensor:
    """R_phi(x, d_i, ...; xi), missing derivatives as zeros. (Layouts are proved in test_layout.py.)"""
    layout, size, operator = LAYOUTS[lifted.config["layout"]], lifted.request.latent_size, lifted.operators["shared"]
    images = torch.cat([layout.to_grid(v, size).float() for v in values], 1)
    missing = (1 + operator.order) * operator.channels - images.shape[1]
    images = torch.nn.functional.pad(images, (0, 0, 0, 0, 0, missing))
    return layout.from_grid(operator(images, torch.tensor([condition])).double(), values[0], size)


def whole(tiny: Tiny) -> int:
    """The time that stands for 1: 1000 almost everywhere."""
    return tiny.pipe.scheduler.config.num_train_timesteps


def model_times(tiny: Tiny, taus: list[float]) -> Tensor:
    """tau or 1 - tau in whole times; log(tau) / 4; or linear in log alpha between integers, log alpha = 0 at t = -1."""
    scheduler, tau = tiny.pipe.scheduler, torch.tensor(taus, dtype=torch.float64)
    if tiny.flow:
        return whole(tiny) * ((1 - tau) if scheduler.config.get("invert_sigmas") else tau)
    if tiny.edm:
        return tau.log() / 4
    nodes = -scheduler.alphas_cumprod.double().clamp(min=2**-24).log() / 2
    values = np.interp(torch.log1p(tau**2) / 2, [0.0, *nodes.tolist()], np.arange(-1, len(nodes)))
    return torch.from_numpy(values)


def derivative(tiny: Tiny, x: Tensor, output: Tensor, sigma: float, tau: float) -> Tensor:
    """d = (x - D) / sigma, D = x - tau * eps or (x - tau * sqrt(1 + tau^2) * v) / (1 + tau^2); flow: the velocity.

    EDM's own networks: D = (s^2 x + s tau sqrt(s^2 + tau^2) F) / (s^2 + tau^2), s = sigma_data.
    """
    scheduler, config = tiny.pipe.scheduler, tiny.pipe.scheduler.config
    if tiny.flow:
        return -output if config.get("invert_sigmas") else output
    x0 = x - tau * output
    if tiny.edm and config.prediction_type == "epsilon":  # D = c_skip x + c_out F
        variance = tiny.sigma_data**2 + tau**2
        x0 = tiny.sigma_data**2 / variance * x + tau * tiny.sigma_data * variance**-0.5 * output
    elif config.prediction_type != "epsilon":
        x0 = (x - tau * (1 + tau**2) ** 0.5 * output) / (1 + tau**2)
    if config.get("thresholding"):
        x0 = scheduler._threshold_sample(x0)
    elif config.get("clip_sample"):
        x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
    return (x - x0) / sigma
