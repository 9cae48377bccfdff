"""Kernel distance of features: KID on Inception-v3, and its like on any feature network."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pipelines.features import Features, named_features
from .references import of_features, read_reference
from .statistics import Metric

CHUNK = 2048  # rows of a kernel matrix at a time


def kernel_means(x: Tensor, y: Tensor) -> Tensor:
    """(N,) float64: each row's mean kernel with the rows of ``y``; with its own, itself left out, where ``y is x``.

    k(a, b) = (a . b / D + 1)^3
    """
    columns, own = y.double(), y is x
    total = torch.cat([((rows @ columns.T / x.shape[1] + 1) ** 3).sum(1) for rows in x.double().split(CHUNK)])
    if own:
        return (total - (columns.square().sum(1) / x.shape[1] + 1) ** 3) / (len(y) - 1)
    return total / len(y)


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy of features (N, D) and (M, D), unbiased: it may be negative.

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y)

    Source: Binkowski et al. 2018, eq. (4), over all pairs instead of subsets.
    """
    return float(kernel_means(x, x).mean() + kernel_means(y, y).mean() - 2 * kernel_means(x, y).mean())


def kid(
    pipe: Any,
    reference: str | Path | Tensor | None = None,
    features: str | Features = "inception",
    *,
    size: int | None = None,
    split: str = "train",
    column: str = "image",
    batch_size: int = 32,
) -> Metric:
    """Kernel distance of the images' features to a reference's: of Inception-v3's, KID.

    Unlike FID it is unbiased, so that hundreds of samples are enough to compare solvers by it.

    Source: Binkowski et al. 2018; the network is that of :func:`dywspan.evaluate.frechet.fid`.

    Args:
        pipe: whose encoder "encoder" is, and on whose device the reference's features are computed.
        reference: a directory of images; a dataset, as ``datasets.load_dataset`` takes it; features (N, D) of this
            network; None for the reference solver's images from the same noise.
        features, size, split, column, batch_size: as of :func:`dywspan.evaluate.frechet.fid`.

    Raises:
        ValueError: a reference with fewer than 2 images, images of several sizes, or moments instead of images.
        OSError: a reference that is not there, or weights that are not to be had.
        ModuleNotFoundError: a package is not installed.
    """
    network, name = named_features(pipe, features)
    source: str | None = None
    target: Callable[[], Tensor] | None = None
    if isinstance(reference, Tensor):
        given = reference
        target, source = lambda: given, "given features"
    elif reference is not None:
        if Path(reference).is_file():
            raise ValueError(f"reference={str(reference)!r} is a file: KID needs a directory of images or a dataset.")
        device = getattr(pipe, "device", "cpu")
        target, source = read_reference(reference, network, size, split, column, batch_size, device)

    @cache
    def within() -> float:  # of the reference: the largest part, and the same for all solvers
        assert target is not None
        return float(kernel_means(target(), target()).mean())

    @lru_cache(maxsize=1)  # a number and its interval need the same; tensors are looked up by identity
    def both(rows: Tensor) -> tuple[float, Tensor]:
        """The distance, and how it moves with each sample's share, to first order."""
        x, y = (rows, target()) if target else rows.chunk(2, 1)
        own, across = kernel_means(x, x), kernel_means(x, y)
        distance, influence = float(own.mean() - 2 * across.mean()), 2 * (own - across)
        if target:
            return distance + within(), influence
        other, back = kernel_means(y, y), kernel_means(y, x)
        return distance + float(other.mean()), influence + 2 * (other - back)

    value, influence = lambda rows: both(rows)[0], lambda rows: both(rows)[1]
    return of_features(("kid", "kd"), network, name, source, value, influence)
