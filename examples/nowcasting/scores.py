"""How good forecasts of rain are: the scores of SEVIR's protocol, with paired intervals.

    CSI = hits / (hits + misses + false alarms)
    HSS = 2 (h r - m f) / ((h + m) (m + r) + (h + f) (f + r)),   r: both say no

each of all pixels at a threshold, then the mean over thresholds. CSI-4 and CSI-16 look at the maximum of each 4 x 4 or
16 x 16 pixels. Source: Veillette, Samsi and Mattioli 2020 (SEVIR); Gao et al. 2023 (PreDiff).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

THRESHOLDS = (16, 74, 133, 160, 181, 219)  # of 255
Counts = Tensor  # (N, thresholds, 4): of each sample its hits, misses, false alarms, and pixels where both say no


def counts(forecast: Tensor, observed: Tensor, pool: int = 1) -> Counts:
    """Of each sample (N, T, H, W) in [0, 1], over its frames and pixels.

    Raises:
        ValueError: shapes that differ, or sides that are no multiple of ``pool``.
    """
    if forecast.shape != observed.shape or forecast.ndim != 4:
        raise ValueError(f"Forecast {tuple(forecast.shape)} and {tuple(observed.shape)} must both be (N, T, H, W).")
    if any(side % pool for side in forecast.shape[2:]):
        raise ValueError(f"Sides {tuple(forecast.shape[2:])} must be multiples of pool={pool}.")
    said, seen = ((max_pool2d(x, pool) if pool > 1 else x).flatten(1)[:, None] for x in (forecast, observed))
    levels = torch.tensor(THRESHOLDS)[:, None] / 255
    a, b = said >= levels, seen >= levels
    return torch.stack([(a & b).sum(2), (~a & b).sum(2), (a & ~b).sum(2), (~a & ~b).sum(2)], 2).double()


def csi(found: Counts) -> float:
    """Critical success index; a threshold that nobody reaches counts for nothing."""
    hits, misses, alarms, _ = found.sum(0).unbind(1)
    told = hits + misses + alarms
    return float((hits / told)[told > 0].mean())


def hss(found: Counts) -> float:
    """Heidke skill score: 1 for a perfect forecast, 0 for chance."""
    h, m, f, r = found.sum(0).unbind(1)
    below = (h + m) * (m + r) + (h + f) * (f + r)
    return float((2 * (h * r - m * f) / below)[below > 0].mean())


SCORES: dict[str, tuple[int, Callable[[Counts], float]]] = {
    "hss": (1, hss),
    "csi": (1, csi),
    "csi_4": (4, csi),
    "csi_16": (16, csi),
}


def scores(forecast: Tensor, observed: Tensor) -> dict[str, float]:
    """All of ``SCORES``, by name."""
    return {name: score(counts(forecast, observed, pool)) for name, (pool, score) in SCORES.items()}


def compared(
    forecast: Tensor, other: Tensor, observed: Tensor, draws: int = 500, seed: int = 0
) -> Mapping[str, Mapping[str, Any]]:
    """By score, how one forecast's differs from another's of the same samples: ``difference``, ``low`` and ``high``.

    The 95 % interval is that of samples drawn again with replacement, the same ones for both.
    """
    generator, found = torch.Generator().manual_seed(seed), {}
    chosen = torch.randint(len(observed), (draws, len(observed)), generator=generator)
    for name, (pool, score) in SCORES.items():
        a, b = (counts(x, observed, pool) for x in (forecast, other))
        drawn = torch.tensor([score(a[rows]) - score(b[rows]) for rows in chosen])
        low, high = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()
        found[name] = {"difference": score(a) - score(b), "low": low, "high": high}
    return found
