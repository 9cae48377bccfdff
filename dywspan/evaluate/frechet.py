"""Frechet distance of features: FID on Inception-v3, and its like on any feature network.

d^2 = |m - m*|^2 + tr S + tr S* - 2 tr (S^1/2 S* S^1/2)^1/2,   m, S = mean and covariance of the features
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..pipelines.features import Features, named_features
from .references import of_features, read_reference, vectors
from .statistics import Metric


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of features, float64.

    Attributes:
        mean: (D,).
        covariance: (D, D), symmetric; of fewer samples than D + 1 it is singular, which is no obstacle here.
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """Of features (N, D), with N - 1 in the covariance.

        Raises:
            ValueError: fewer than 2 samples.
        """
        if len(rows) < 2:
            raise ValueError(f"A covariance needs at least 2 samples; got {len(rows)}.")
        rows = rows.cpu().double()
        return cls(rows.mean(0), torch.cov(rows.T).reshape(rows.shape[1], -1))

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Of an .npz file with the arrays "mu" and "sigma", the format of EDM's reference statistics.

        Raises:
            ValueError: the file is a pickle, or holds something else.
        """
        if Path(path).suffix != ".npz":
            raise ValueError(
                f"{path} is no .npz file. Pickles are not read, as reading executes them: if you trust it, convert it "
                'once with np.savez("refs.npz", mu=..., sigma=...).'
            )
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= {*file.files}:
                raise ValueError(f'{path} must hold the arrays "mu" (D,) and "sigma" (D, D); it has {file.files}.')
            mean, covariance = (torch.from_numpy(file[name]).double() for name in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
            raise ValueError(f"{path}: mu and sigma must have the shapes (D,) and (D, D); they have {shapes}.")
        return cls(mean, covariance)

    def save(self, path: str | Path) -> None:
        """As what :meth:`load` reads."""
        np.savez(path, mu=self.mean.numpy(), sigma=self.covariance.numpy())

    @cached_property
    def root(self) -> Tensor:
        """(D, D) S^1/2, symmetric."""
        values, vectors = torch.linalg.eigh(self.covariance)
        # Of a zero that was rounded, the root would be 1e-8.
        return vectors * values.where(values > _rounding(values), 0).sqrt() @ vectors.T


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of the normal distributions with these moments, in float64.

    tr (S^1/2 S* S^1/2)^1/2 is computed as the sum of the singular values of S^1/2 S*^1/2: no root is taken of an
    eigenvalue that is zero but for rounding, so that singular covariances cost no accuracy.

    Source: Heusel et al. 2017, eq. (6); Dowson and Landau 1982.

    Raises:
        ValueError: the dimensions differ.
    """
    _check_dimensions(a, b)
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()
    return float(distance - 2 * torch.linalg.svdvals(a.root @ b.root).sum())


def influence(rows: Tensor, a: Moments, b: Moments) -> Tensor:
    """(N,) how the distance of ``rows``, whose moments are ``a``, to ``b`` moves with each row's share, to first order.

        I(x) = 2 (x - m)(m - m*) + (x - m)(1 - T)(x - m),   T = S*^1/2 (S*^1/2 S S*^1/2)^-1/2 S*^1/2

    up to a constant. T, the optimal transport's matrix, only meets directions in which the rows vary.
    """
    _, values, vectors = torch.linalg.svd(a.root @ b.root)
    kept = values > _rounding(values)
    x = rows.cpu().double() - a.mean
    transported = (x @ b.root @ vectors[kept].T).square() / values[kept]
    return 2 * x @ (a.mean - b.mean) + x.square().sum(1) - transported.sum(1)


def _rounding(values: Tensor) -> Tensor:
    return values.max() * len(values) * torch.finfo(values.dtype).eps


def _check_dimensions(a: Moments, b: Moments) -> None:
    if len(a.mean) != len(b.mean):
        raise ValueError(
            f"Features of {len(a.mean)} dimensions have no distance to a reference of {len(b.mean)}: it must be made "
            "with the same network."
        )


def fid(
    pipe: Any,
    reference: str | Path | Moments | Tensor | None = None,
    features: str | Features = "inception",
    *,
    size: int | None = None,
    split: str = "train",
    column: str = "image",
    batch_size: int = 32,
) -> Metric:
    """Frechet distance of the images' features to a reference's: of Inception-v3's, FID.

    Source: Heusel et al. 2017; with torch-fidelity's network, TensorFlow's weights and resizing, on 8-bit images.

    Args:
        pipe: whose encoder "encoder" is, and on whose device the reference's features are computed.
        reference: a directory of images; an .npz file, see :meth:`Moments.load`; a dataset, as
            ``datasets.load_dataset`` takes it; moments, or features (N, D), of this network; None for the reference
            solver's images from the same noise, whose features are kept beside.
        features: by name, see :func:`dywspan.pipelines.features.find_features`, or itself. Of several maps the last
            counts, averaged over positions.
        size: pixels to which the reference's images are resized and cropped, bicubic; None to take them as they are.
        split, column: of the dataset.
        batch_size: for the reference's features.

    Raises:
        ValueError: a reference with fewer than 2 images, images of several sizes, or of another dimension.
        OSError: a reference that is not there, or weights that are not to be had.
        ModuleNotFoundError: a package is not installed.
    """
    network, name = named_features(pipe, features)
    source: str | None = None
    target: Callable[[], Moments] | None = None
    if reference is not None:
        target, source = _reference(reference, network, size, split, column, batch_size, getattr(pipe, "device", "cpu"))

    @lru_cache(maxsize=1)  # a number and its interval need the same; tensors are looked up by identity
    def sides(rows: Tensor) -> tuple[Tensor, Moments, Tensor | None, Moments]:
        if target:
            return rows, Moments.of(rows), None, target()
        x, y = rows.chunk(2, 1)
        return x, Moments.of(x), y, Moments.of(y)

    def value(rows: Tensor) -> float:
        x, a, _, b = sides(rows)
        if len(x) <= x.shape[1]:
            warnings.warn(
                f"{metric.name} of {len(x)} samples in {x.shape[1]} dimensions: the covariance is singular, and the "
                "distance far above that of many samples. Compare it only with that of as many.",
                stacklevel=2,
            )
        return frechet_distance(a, b)

    def both_influences(rows: Tensor) -> Tensor:
        x, a, y, b = sides(rows)
        return influence(x, a, b) + (0 if y is None else influence(y, b, a))

    metric = of_features(("fid", "fd"), network, name, source, value, both_influences)
    return metric


def _reference(
    reference: str | Path | Moments | Tensor,
    network: Features,
    size: int | None,
    split: str,
    column: str,
    batch_size: int,
    device: torch.device | str,
) -> tuple[Callable[[], Moments], str]:
    """Its moments, computed at the first call and checked now, and what it is."""
    if isinstance(reference, (str, Path)) and not Path(reference).is_file():
        features, source = read_reference(reference, network, size, split, column, batch_size, device)
        return lambda: Moments.of(features()), source
    if isinstance(reference, (str, Path)):
        given, source = Moments.load(reference), str(reference)
    else:
        given, source = Moments.of(reference) if isinstance(reference, Tensor) else reference, "given features"
    probe = vectors(network, torch.zeros(1, 3, 64, 64, device=device))
    _check_dimensions(Moments(probe[0], probe), given)
    return lambda: given, source
