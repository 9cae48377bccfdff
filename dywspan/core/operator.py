"""SpanLift's residual operator R_phi: a small FiLM-conditioned CNN that reaches outside the span of past derivatives.

    x_{i+1} = x_i + alpha_i base_i + h_i beta_i R_phi(c_in x_i, d_i, ..., d_{i-K+1}; xi_i),  xi = (t, lambda, log|h|)

Source: SpanLift (arXiv 2606.08672) eqs. (14)-(15). Architecture from the paper's description and its counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from .step import History


class Block(nn.Module):
    """y = x + FiLM_2(W_2 silu(D silu(W_1 FiLM_1(x)))): 1x1 up, depthwise k x k, 1x1 down.

    FiLM(x; e) = x * (1 + gamma(e)) + delta(e).
    """

    def __init__(self, width: int, expansion: int, kernel: int) -> None:
        super().__init__()
        inner = width * expansion
        self.film = nn.Linear(width, 4 * width)
        self.up = nn.Conv2d(width, inner, 1)
        self.depthwise = nn.Conv2d(inner, inner, kernel, padding="same", groups=inner)
        self.down = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gamma_1, delta_1, gamma_2, delta_2 = self.film(condition)[:, :, None, None].chunk(4, 1)
        y = x * (1 + gamma_1) + delta_1
        y = self.down(silu(self.depthwise(silu(self.up(y)))))
        return x + y * (1 + gamma_2) + delta_2


class ResidualOperator(nn.Module):
    """R_phi, shared over steps. Its head starts at zero, so with any beta the solver starts exactly as its base.

    Args:
        channels: C of the unpacked latent.
        order: K, derivatives it reads; missing ones are zeros.
        width, blocks, expansion: size of the network.
        kernel: of the depthwise convolutions and the head; 1 is the paper's pointwise ablation.
    """

    def __init__(
        self, channels: int, order: int, *, width: int = 64, blocks: int = 2, expansion: int = 4, kernel: int = 3
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel={kernel} must be odd: the operator is centred on its pixel.")
        self.channels, self.order = channels, order
        self.stem = nn.Conv2d((1 + order) * channels, width, 1)
        self.condition = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(Block(width, expansion, kernel) for _ in range(blocks))
        self.head = nn.Conv2d(width, channels, kernel, padding="same")
        nn.init.zeros_(self.head.weight)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        """One residual.

        Args:
            images: (B, (1 + K) C, H, W), the scaled state and the derivatives, newest first, each of unit order.
            condition: (1 or B, 3), see :func:`conditioning`.

        Returns:
            (B, C, H, W), to be multiplied by beta_i and the step size.
        """
        y = self.stem(images)
        e = self.condition(condition)
        for block in self.blocks:
            y = block(y, e)
        return self.head(y)

    def flops(self, height: int, width: int) -> int:
        """Multiply-adds of the convolutions counted as two, for one step at this latent size."""
        convolutions = (m for m in self.modules() if isinstance(m, nn.Conv2d))
        return 2 * height * width * sum(m.weight.numel() for m in convolutions)


OPERATORS: dict[str, dict[str, Any]] = {"spatial": {"kernel": 3}, "pointwise": {"kernel": 1}}


def conditioning(timestep: float, log_snr: float, size: float, num_train_timesteps: int = 1000) -> list[float]:
    """xi = (t, lambda, log|h|), each brought to about [-1, 1] and bounded at both ends of the grid.

    lambda = log(alpha / sigma) is infinite at sigma = 0 and at flow's sigma = 1, log|h| at h = 0.
    """
    log_size = math.log(abs(size)) if size else -math.inf
    return [2 * timestep / num_train_timesteps - 1, math.tanh(log_snr / 4), math.tanh(log_size / 4)]


def residual(operator: ResidualOperator, state: Tensor, history: History, condition: Sequence[float]) -> Tensor:
    """R_phi on images.

    Args:
        state: (B, C, H, W), c_in(tau) * x.
        history: d_i, d_{i-1}, ..., newest first; at most K.
    """
    missing = [torch.zeros_like(state)] * (operator.order - len(history))
    images = torch.cat([state, *history[: operator.order], *missing], 1)
    return operator(images, torch.tensor([condition], dtype=state.dtype, device=state.device))
