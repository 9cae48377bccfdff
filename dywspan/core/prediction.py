"""Network conventions: which noise level a network is told, and what its output means.

A solver integrates dx/dsigma = d in one of two frames, in both of which d = (x - D) / sigma:

    VE    x = x0 + sigma * eps               (epsilon, v, sample, EDM networks)
    flow  x = (1 - sigma) * x0 + sigma * eps (flow-matching networks)

sigma is the noise level of the state; tau is the level the network is told (tau = s * sigma with time scaling).
Levels are Python floats or 0-dim tensors alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from .step import combine

Level = Any  # float or Tensor


class Prediction(ABC):
    """One network convention. The network is fed ``input_scale(tau) * x`` and ``timestep(tau)``.

    Attributes:
        convention: what levels and times mean, the output's form aside: learned numbers are of one convention.
        steps: M, where the network's time ends; None: it has no end.
    """

    convention: ClassVar[str]
    steps: int | None = None

    def signal(self, sigma: Level) -> Level:
        """alpha(sigma): how much of x0 the solver frame holds at level sigma (1 in the VE frame)."""
        return sigma * 0 + 1

    @abstractmethod
    def input_scale(self, tau: Level) -> Level:
        """c_in(tau): from the solver frame to the frame of the network's input."""

    @abstractmethod
    def timestep(self, tau: Tensor) -> Tensor:
        """The time the network is told at level tau (float64, same shape as ``tau``)."""

    @abstractmethod
    def sigma(self, timestep: Tensor) -> Tensor:
        """Inverse of :meth:`timestep`."""

    @abstractmethod
    def slope(self, sigma: Level, tau: Level) -> tuple[Level, Level]:
        """(p, q) of d = p * x + q * output, the derivative at level sigma of a network told tau: two numbers a step.

        d = (x - D) / sigma. Source: EDM (Karras et al. 2022) eq. (3); DyWeight algorithm 1, line 4.
        """

    def derivative(self, x: Tensor, output: Tensor, sigma: Level, tau: Level) -> Tensor:
        """d, given the state ``x`` (solver frame) and the network's ``output``."""
        p, q = self.slope(sigma, tau)
        return combine((q, output), (p, x))

    def denoised(self, x: Tensor, output: Tensor, tau: Level) -> Tensor:
        """D = x - tau * d: the estimate of x0, given the state ``x`` (solver frame) and the network's ``output``."""
        return x - tau * self.derivative(x, output, tau, tau)


class VariancePreserving(Prediction):
    """Discrete-time VP network, c_in = 1 / sqrt(1 + tau^2); float model times between the trained integers.

    log alpha is piecewise linear in t' = (t + 1) / M with log alpha(0) = 0, and is linear beyond the last node too.
    Source: DPM-Solver (Lu et al. 2022), appendix D.4.

    Args:
        alphas_cumprod: (M,) cumulative products of 1 - beta, decreasing, in (0, 1).
    """

    convention = "vp"

    def __init__(self, alphas_cumprod: Tensor) -> None:
        alphas_cumprod = alphas_cumprod.detach().double().cpu().clone()
        if alphas_cumprod[-1] <= 0:  # zero terminal SNR has no finite sigma; 2^-24 is what diffusers takes for it
            alphas_cumprod[-1] = min(2**-24, float(alphas_cumprod[-2]) / 2)
        if not bool((alphas_cumprod.diff() < 0).all()):
            raise ValueError("alphas_cumprod must decrease: every timestep needs a noise level of its own.")
        self.log_alphas = torch.cat([torch.zeros(1, dtype=torch.float64), alphas_cumprod.log() / 2])
        self.steps = len(alphas_cumprod)

    def input_scale(self, tau: Level) -> Level:
        return (1 + tau**2) ** -0.5

    def timestep(self, tau: Tensor) -> Tensor:
        log_alpha = -torch.log1p(tau.double() ** 2) / 2
        k = torch.searchsorted(-self.log_alphas, -log_alpha.detach()).clamp(1, len(self.log_alphas) - 1)
        low, high = self.log_alphas[k - 1], self.log_alphas[k]
        return (k - 1) + (log_alpha - low) / (high - low) - 1

    def sigma(self, timestep: Tensor) -> Tensor:
        t = timestep.double() + 1
        k = t.detach().floor().long().clamp(0, len(self.log_alphas) - 2)
        log_alpha = torch.lerp(self.log_alphas[k], self.log_alphas[k + 1], t - k)
        return torch.expm1(-2 * log_alpha).clamp(min=0).sqrt()


class Epsilon(VariancePreserving):
    """Output = eps: D = x - tau * eps."""

    def slope(self, sigma: Level, tau: Level) -> tuple[Level, Level]:
        return 0.0, tau / sigma


class Velocity(VariancePreserving):
    """Output = v = alpha * eps - sigma_vp * x0: D = c_in^2 * x - tau * c_in * v."""

    def slope(self, sigma: Level, tau: Level) -> tuple[Level, Level]:
        noise = tau * self.input_scale(tau)  # sigma_vp; 1 - c_in^2 = sigma_vp^2
        return noise**2 / sigma, noise / sigma


class Sample(VariancePreserving):
    """Output = x0 = D."""

    def slope(self, sigma: Level, tau: Level) -> tuple[Level, Level]:
        return 1 / sigma, -1 / sigma


class EDM(Prediction):
    """EDM preconditioning: D = c_skip(tau) * x + c_out(tau) * F(c_in(tau) * x; ln(tau) / 4).

    Source: EDM (Karras et al. 2022), table 1.

    Args:
        sigma_data: standard deviation of the data.
        velocity: F has the opposite sign (diffusers' ``prediction_type="v_prediction"`` of its EDM schedulers).
    """

    convention = "edm"

    def __init__(self, sigma_data: float = 0.5, velocity: bool = False) -> None:
        self.sigma_data, self.sign = sigma_data, -1 if velocity else 1

    def input_scale(self, tau: Level) -> Level:
        return (self.sigma_data**2 + tau**2) ** -0.5

    def timestep(self, tau: Tensor) -> Tensor:
        return tau.double().log() / 4

    def sigma(self, timestep: Tensor) -> Tensor:
        return (4 * timestep.double()).exp()

    def slope(self, sigma: Level, tau: Level) -> tuple[Level, Level]:
        noise = tau * self.input_scale(tau)  # c_skip = 1 - noise^2, c_out = sign * sigma_data * noise
        return noise**2 / sigma, -self.sign * self.sigma_data * noise / sigma


class Flow(Prediction):
    """Output = velocity eps - x0 = dx/dsigma; sigma in [0, 1]; time told = M * tau.

    Args:
        num_train_timesteps: M.
        inverted: the model counts from data to noise the other way round (Mochi): time told = M * (1 - tau) and the
            output is x0 - eps.
    """

    convention = "flow"

    def __init__(self, num_train_timesteps: int = 1000, inverted: bool = False) -> None:
        self.num_train_timesteps, self.inverted = num_train_timesteps, inverted
        self.steps = num_train_timesteps

    def signal(self, sigma: Level) -> Level:
        return 1 - sigma

    def input_scale(self, tau: Level) -> Level:
        return tau * 0 + 1

    def timestep(self, tau: Tensor) -> Tensor:
        return self.num_train_timesteps * (1 - tau.double() if self.inverted else tau.double())

    def sigma(self, timestep: Tensor) -> Tensor:
        tau = timestep.double() / self.num_train_timesteps
        return 1 - tau if self.inverted else tau

    def slope(self, sigma: Level, tau: Level) -> tuple[Level, Level]:
        return 0.0, -1.0 if self.inverted else 1.0


PREDICTIONS: dict[str, type[Prediction]] = {
    "epsilon": Epsilon,
    "v_prediction": Velocity,
    "sample": Sample,
    "edm": EDM,
    "flow_prediction": Flow,
}
