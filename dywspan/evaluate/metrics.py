"""The metrics by name, and those that compare an image to the reference solver's from the same noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..pipelines.features import Features, feature_distance, named_features
from ..pipelines.features import lpips as lpips_features
from .frechet import fid
from .kernel import kid
from .rewards import clip_score, hps, image_reward
from .statistics import Metric, Sample


def latent_mse(pipe: Any = None) -> Metric:
    """mean (z - z*)^2 of each endpoint z to the reference solver's z*, in the latents' own units."""
    return _latent("latent_mse", lambda squares: squares)


def latent_rmse(pipe: Any = None) -> Metric:
    """(mean (z - z*)^2)^(1/2) of each endpoint; the mean of these is ruled less by the few that end elsewhere."""
    return _latent("latent_rmse", Tensor.sqrt)


def psnr(pipe: Any = None) -> Metric:
    """10 log10 1 / mean (y - y*)^2 of each image y to the reference solver's y*, in dB; then the mean over images.

    Of equal images it is that of one value off by one level, 1/255: an infinite row would outweigh all others.
    """

    def rows(sample: Sample) -> Tensor:
        error = (sample.images - _reference_images(sample, "psnr")).square().flatten(1)
        return -10 * error.mean(1, keepdim=True).clamp(min=255**-2 / error.shape[1]).log10()

    return Metric("psnr", rows, lower_is_better=False, needs=("reference_images",))


def image_distance(pipe: Any, features: str | Features = "encoder") -> Metric:
    """Distance of each image's features to the reference's, see :func:`dywspan.pipelines.features.feature_distance`.

    Args:
        features: by name, see :func:`dywspan.pipelines.features.find_features`, or itself.

    Raises:
        ValueError, OSError, ModuleNotFoundError: the network is unknown, its weights or its package are missing.
    """
    return _distance("feature_distance", *named_features(pipe, features))


def lpips(pipe: Any = None, net: str = "alex", model: torch.nn.Module | None = None) -> Metric:
    """LPIPS v0.1 of each image to the reference solver's, at the images' own size.

    Source: Zhang et al. 2018, eq. (1).

    Args:
        net: "alex", its authors' choice for evaluation, "vgg" or "squeeze".
        model: an ``lpips.LPIPS`` to use instead of the pretrained one.

    Raises:
        ValueError, OSError, ModuleNotFoundError: the network is unknown, its weights or its package are missing.
    """
    return _distance("lpips", lpips_features(net, model), f"lpips 0.1, {net}")


def _latent(name: str, of: Callable[[Tensor], Tensor]) -> Metric:
    def rows(sample: Sample) -> Tensor:
        z, target = (sample.need(field, name).float() for field in ("latents", "reference_latents"))
        return of((z - target.to(z.device)).square().flatten(1).mean(1, keepdim=True))

    return Metric(name, rows, needs=("latents", "reference_latents"))


def _distance(name: str, network: Features, fact: str) -> Metric:
    def rows(sample: Sample) -> Tensor:
        target = _reference_images(sample, name)
        return feature_distance(network, 2 * sample.images - 1, 2 * target - 1)[:, None].float()

    return Metric(name, rows, facts={"network": fact}, needs=("reference_images",))


def _reference_images(sample: Sample, metric: str) -> Tensor:
    return sample.need("reference_images", metric).to(sample.images.device)


# By name; each gets the pipeline and its own options.
METRICS: dict[str, Callable[..., Metric]] = {
    "latent_mse": latent_mse,
    "latent_rmse": latent_rmse,
    "feature_distance": image_distance,
    "psnr": psnr,
    "lpips": lpips,
    "fid": fid,
    "kid": kid,
    "clip_score": clip_score,
    "image_reward": image_reward,
    "hps": hps,
}
