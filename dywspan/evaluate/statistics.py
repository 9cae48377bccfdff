"""What an evaluation measures: rows kept of each image, the number they make together, and its interval.

    rows_b = r(images_b, prompts_b, ...), (B, D);   number = v(the rows of all batches, (N, D))

so that images are never kept, batches are measured wherever they are sampled, and a killed evaluation can resume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """A batch that was just sampled.

    Attributes:
        images: (B, 3, H, W) float32 in [0, 1], on 8-bit levels: what a PNG would hold.
        prompts: one an image, or None without text.
        latents: the sampler's endpoint.
        reference_images, reference_latents: of the reference solver, from the same noise and prompts.
    """

    images: Tensor
    prompts: Sequence[str] | None = None
    latents: Tensor | None = None
    reference_images: Tensor | None = None
    reference_latents: Tensor | None = None

    def need(self, field: str, metric: str) -> Any:
        """A field that a metric cannot do without.

        Raises:
            ValueError: it was not given.
        """
        if (value := getattr(self, field)) is None:
            raise ValueError(f"{metric} needs {field}, which these samples have not: give them, or drop the metric.")
        return value


def mean(rows: Tensor) -> float:
    """Mean of the only column."""
    return float(rows.double().mean())


@dataclass(frozen=True)
class Metric:
    """A number of many samples.

    Attributes:
        name: column name in results.
        rows: of a batch, (B, D) float32: all that is kept of each image.
        value: of the rows of all samples, (N, D), the number.
        lower_is_better: whether a smaller number is the better one.
        facts: what the number depends on, stated in every table that uses it.
        needs: the fields of :class:`Sample` that ``rows`` reads, besides the images; with ``latents``, instead of them:
            for such metrics alone nothing is decoded.
        influence: of the rows of all samples, (N,): how the number moves with each sample's share, to first order.
            Stated where resampling is biased, see :func:`interval`.
    """

    name: str
    rows: Callable[[Sample], Tensor]
    value: Callable[[Tensor], float] = mean
    lower_is_better: bool = True
    facts: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    influence: Callable[[Tensor], Tensor] | None = None


def interval(
    metric: Metric, rows: Tensor, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Confidence interval of a metric over the drawing of its samples, their number held.

        quantiles of v(rows drawn again with replacement);   or, given the influence I,   v +- z sd(I) / sqrt(N)

    The first is the percentile bootstrap. It fails for a Frechet distance, which grows with every repeated sample: a
    resample's distance lies above all that it was drawn from. There the infinitesimal jackknife is used. It tells how
    far the number of N other samples would lie from this one, not how far this one lies from that of infinitely many.
    Simulated at 95%, from a quarter as many samples as dimensions to fifty times as many, it covers 93% to 99%.

    Source: Efron and Tibshirani 1993, ch. 13; Jaeckel 1972.

    Args:
        metric: says how the number is computed.
        rows: (N, D), of all samples.
        level: probability that the interval covers.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than 2 samples, or a level outside (0, 1).
    """
    n = len(rows)
    if n < 2:
        raise ValueError(f"An interval needs at least 2 samples; {metric.name} has {n}: evaluate more of them.")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1: 0.95 is usual.")
    if metric.influence is not None:
        value = metric.value(rows)
        spread = NormalDist().inv_cdf((1 + level) / 2) * float(metric.influence(rows).double().std()) / n**0.5
        return value - spread, value + spread
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(n, (n,), generator=generator).to(rows.device) for _ in range(resamples))
    values = torch.tensor([metric.value(rows[draw]) for draw in draws], dtype=torch.float64)
    low, high = values.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def numbers(metrics: Sequence[Metric], values: Mapping[str, Tensor]) -> dict[str, Any]:
    """A row of results: every metric's number by its name, ``interval``, theirs, and ``median`` of the means.

    Args:
        values: by metric, the rows of all samples.
    """
    found: dict[str, Any] = {m.name: m.value(values[m.name]) for m in metrics}
    medians = {m.name: float(values[m.name].double().median()) for m in metrics if m.influence is None}
    found |= {"median": medians} if medians else {}
    return found | {"interval": {m.name: [*interval(m, values[m.name])] for m in metrics}}
