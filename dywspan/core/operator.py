"""SpanLift's residual operator R_phi: a small FiLM-conditioned CNN that reaches outside the span of past derivatives.

    x_{i+1} = x_i + alpha_i base_i + h_i beta_i R_phi(c_in x_i, d_i, ..., d_{i-K+1}; xi_i),  xi = (t, lambda, log|h|)

Source: SpanLift (arXiv 2606.08672) eqs. (14)-(15). Architecture from the paper's description and its counts.
"""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available
from torch.nn.functional import silu

from .check import identifier, shown, whole
from .table import InvalidSolverError


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


class Operator(nn.Module, ABC):
    """Abstract: what can stand for R_phi.

    Attributes:
        channels: C of the unpacked latent.
        order: K, derivatives it reads; missing ones are zeros.
    """

    channels: int
    order: int

    @abstractmethod
    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        """One residual, to be multiplied by beta_i and the step size; an untrained operator's is zero.

        Args:
            images: (B, (1 + K) C, H, W), the scaled state and the derivatives, newest first, each of unit order.
            condition: (1 or B, 3), see :func:`conditioning`.

        Returns:
            (B, C, H, W)
        """

    @property
    def dtype(self) -> torch.dtype:
        """The precision it computes in."""
        return next(self.parameters()).dtype

    def flops(self, height: int, width: int) -> int:
        """Multiply-adds of the convolutions counted as two, for one step at this latent size."""
        convolutions = (m for m in self.modules() if isinstance(m, nn.Conv2d))
        return 2 * height * width * sum(m.weight.numel() for m in convolutions)


class ResidualOperator(Operator):
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
        y = self.stem(images)
        e = self.condition(condition)
        for block in self.blocks:
            y = block(y, e)
        return self.head(y)

    @property
    def dtype(self) -> torch.dtype:
        return self.stem.weight.dtype


@dataclass(frozen=True)
class Kind:
    """One kind of operator: what makes it, and the least and the largest value of each size argument."""

    make: Callable[..., Operator]
    limits: Mapping[str, tuple[int, int]]


OPERATORS: dict[str, Kind] = {
    "spatial": Kind(
        ResidualOperator,
        {
            "channels": (1, 1024),
            "order": (1, 16),
            "width": (1, 2048),
            "blocks": (0, 32),
            "expansion": (1, 16),
            "kernel": (1, 15),
        },
    ),
}


def make_operator(spec: Mapping[str, Any]) -> Operator:
    """An untrained operator: ``{"kind": "spatial", "channels": C, "order": K, ...}``; "spatial" may be left out.

    Raises:
        ValueError: no such kind, a size it does not have or lacks, or one that is no whole number within its limits.
    """
    if not isinstance(spec, Mapping):
        raise ValueError(f"operator={shown(spec)} must be a mapping of sizes such as {{'channels': 4, 'order': 3}}.")
    name, sizes = spec.get("kind", "spatial"), {k: v for k, v in spec.items() if k != "kind"}
    if not isinstance(name, str) or name not in OPERATORS:
        raise ValueError(f"Unknown operator kind={shown(name)}: use one of {sorted(OPERATORS)}.")
    kind = OPERATORS[name]
    if unknown := sorted(map(str, sizes.keys() - kind.limits.keys())):
        raise ValueError(f"Operator {name!r} has no size {shown(unknown)}: it takes {sorted(kind.limits)}.")
    parameters = inspect.signature(kind.make).parameters.values()
    if missing := [p.name for p in parameters if p.default is p.empty and p.name not in sizes]:
        raise ValueError(f"Operator {name!r} needs {' and '.join(missing)}.")
    return kind.make(**{k: whole(k, v, *kind.limits[k]) for k, v in sizes.items()})


def conditioning(times: Tensor, log_snr: Tensor, sizes: Tensor) -> Tensor:
    """xi = (t, lambda, log|h|) of N steps, each bounded at both ends of the grid.

    lambda = log(alpha / sigma) is infinite at flow's sigma = 1, log|h| at h = 0; tanh(. / 4) takes both to [-1, 1].

    Args:
        times: (N,) the network's time, in units of its range.
        log_snr, sizes: (N,) lambda_i and h_i.

    Returns:
        (N, 3)
    """
    return torch.stack([2 * times - 1, torch.tanh(log_snr / 4), torch.tanh(sizes.abs().log() / 4)], 1)


@torch.compiler.assume_constant_result  # what it asks is a builtin that PyTorch 2.11's compiler cannot trace
def _knows_autocast(device: str) -> bool:
    return is_autocast_available(device)


def residual(operator: Operator, state: Tensor, history: Sequence[Tensor], condition: Tensor) -> Tensor:
    """R_phi on images, in the operator's own precision whatever the pipeline's.

    Args:
        state: (B, C, H, W), c_in(tau) * x.
        history: d_i, d_{i-1}, ..., newest first; those missing are zeros, those beyond K unused.
        condition: (3,), a row of :func:`conditioning`.
    """
    known = history[: operator.order]
    missing = [torch.zeros_like(state)] * (operator.order - len(known))
    device = state.device.type  # some know no autocast, and may not even be told to leave it off
    with torch.autocast(device, enabled=False) if _knows_autocast(device) else contextlib.nullcontext():
        images = torch.cat([state, *known, *missing], 1).to(operator.dtype)
        return operator(images.contiguous(memory_format=torch.channels_last), condition[None]).to(state.dtype)


@dataclass(frozen=True, eq=False)
class Lift:
    """SpanLift's scalars for one number of steps.

    Attributes:
        alpha, beta: (N,) factors of the base step and of the residual.
        operator: name of the operator it uses; several step counts may share one.
        provenance: where it comes from: free JSON.

    Raises:
        InvalidSolverError: different lengths, or numbers that are not finite.
        ValueError: a name that is no identifier.
    """

    alpha: Tensor
    beta: Tensor
    operator: str = "shared"
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def detach(self) -> Lift:
        """The same numbers, without their graph."""
        return replace(self, alpha=self.alpha.detach(), beta=self.beta.detach())

    def __post_init__(self) -> None:
        identifier("operator", self.operator)
        for name in ("alpha", "beta"):
            values = getattr(self, name)
            if values.ndim != 1 or values.shape != self.alpha.shape or not bool(values.detach().isfinite().all()):
                raise InvalidSolverError(
                    f"alpha and beta must be finite, one entry per step; got {name} = {shown(values.tolist())}."
                )
