"""Fields of rain that move, grow and decay, as a weather radar sees them; none of it is data of a real radar.

A Gaussian field z of many scales is carried by the wind, and forgets its past, small scales first:

    z_k(t + 1) = exp(-i k v) phi_k z_k(t) + (1 - phi_k^2)^1/2 a_k n_k,   phi_k = exp(-|k| / life)
    rain = 1 - exp(-g max(z - c, 0))

Source: the cascade of STEPS (Bowler, Pierce and Seed 2006), without its steps between the scales.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

SIZE = 32  # pixels of a side
KNOWN, FUTURE = 4, 6  # frames that a forecast is given, and those that it makes
LIFE = 40.0  # frames, of what is as large as the domain
STEEPNESS, LARGEST = 1.6, 3.0  # of the spectrum, flat up to so many waves in the domain
WIND = (0.4, 1.6)  # pixels a frame
DRY, GAIN = (0.1, 0.9), (0.6, 1.6)  # c and g, drawn for each sequence


@cache
def _spectrum(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k_y, k_x, |k| and a_k of fields of n x n pixels, whose deviation is 1."""
    ky, kx = torch.fft.fftfreq(n, 1 / n)[:, None], torch.fft.rfftfreq(n, 1 / n)[None]
    k = (ky.square() + kx.square()).sqrt()
    amplitude = (1 + (k / LARGEST).square()).pow(-STEEPNESS / 2 - 0.5)
    amplitude[0, 0] = 0
    white = torch.fft.rfft2(torch.randn(64, n, n, generator=torch.Generator().manual_seed(0)))
    return ky, kx, k, amplitude / torch.fft.irfft2(white * amplitude).std()


def sequences(count: int, seed: int, frames: int = KNOWN + FUTURE) -> Tensor:
    """(count, frames, SIZE, SIZE) in [0, 1): rain, the same for the same seed; 1 stands for the radar's 255.

    The domain is twice as wide as what is seen of it, so that rain comes in over the edge.
    """
    draw, n = torch.Generator().manual_seed(seed), 2 * SIZE

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=draw)

    ky, kx, k, amplitude = _spectrum(n)
    speed, angle = uniform(*WIND), uniform(0, 2 * math.pi)
    moved = torch.exp(-2j * math.pi / n * speed * (ky * angle.sin() + kx * angle.cos()))
    kept = torch.exp(-k.clamp(min=1) / LIFE)
    dry, gain = uniform(*DRY), uniform(*GAIN)

    def fresh() -> Tensor:
        return amplitude * torch.fft.rfft2(torch.randn(count, n, n, generator=draw))

    z, seen = fresh(), []
    for _ in range(frames):
        field = torch.fft.irfft2(z)[:, :SIZE, :SIZE]
        seen.append(-torch.expm1(-gain * (field - dry).clamp(min=0)))
        z = moved * kept * z + (1 - kept.square()).sqrt() * fresh()
    return torch.stack(seen, 1)
