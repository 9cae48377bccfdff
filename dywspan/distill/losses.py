"""What makes an endpoint close to the teacher's: on latents, and on features of the decoded images.

    loss = c l(z, z*) + mean over maps of |f(D(z)) - f(D(z*))|^2        (SpanLift eq. (16), with means for sums)

A loss is a function (pipe, endpoint, target) -> scalar, a mean over samples: a batch may be split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import huber_loss, l1_loss, mse_loss

from ..core.check import one_of
from ..core.layout import LAYOUTS, Size
from ..pipelines.decode import decode, find_vae
from ..pipelines.features import Features, find_features

Loss = Callable[[Any, Tensor, Tensor], Tensor]


def rmse_loss(endpoint: Tensor, target: Tensor) -> Tensor:
    """Mean over samples of (mean (z - z*)^2)^(1/2): less ruled by samples that end in another image than the mse."""
    return _root_difference(endpoint, target, endpoint).square().sum(1).mean()  # without a slope at 0


CAUCHY = 0.03  # of latents of unit variance


def cauchy_loss(endpoint: Tensor, target: Tensor) -> Tensor:
    """Mean over samples of log(1 + mse / c^2) / 2, c = ``CAUCHY``: no sample rules the gradient.

    Above c a change of the error counts by its ratio, so that samples which end in another image hardly matter. It
    suits many numbers that are learned from a few samples an update.
    """
    return torch.log1p(_scaled_difference(endpoint, target).square().sum(1) / CAUCHY**2).mean() / 2


LATENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mse_loss,
    "rmse": rmse_loss,
    "l1": l1_loss,
    "huber": huber_loss,
    "cauchy": cauchy_loss,
}


def make_loss(
    pipe: Any,
    latent: str = "mse",
    features: str | Features | None = None,
    latent_weight: float | None = None,
    layout: str = "image",
    size: Size | None = None,
) -> Loss:
    """c l(z, z*) + |f(D(z)) - f(D(z*))|^2, a mean over samples. Source: SpanLift eq. (16), with means for sums.

    Its ``__name__`` is what a provenance records: "latent_mse", "0.1 latent_mse + dinov2".

    Args:
        pipe: the pipeline; says whether there is a decoder D, and whose encoder "encoder" is.
        latent: l, of ``LATENT``.
        features: f by name, see :func:`find_features`, or itself; None for l alone.
        latent_weight: c. By default 1 without features, 0.1 with them, 0 with them on a pixel-space pipeline; with 0,
            l is not computed.
        layout, size: of the latents, see :func:`decode`.

    Raises:
        ValueError: an unknown name, or a weight that leaves nothing to learn from.
        ModuleNotFoundError: the features need a package that is not installed.
        OSError: the features need weights that are neither cached nor to be had.
    """
    one_of("latent", latent, LATENT)
    one_of("layout", layout, LAYOUTS)
    default = 1.0 if features is None else 0.1 if find_vae(pipe) is not None else 0.0
    weight = default if latent_weight is None else latent_weight
    if weight < 0 or (weight == 0 and features is None):
        raise ValueError(f"latent_weight={weight} must be positive, or 0 with features to learn from.")
    network = find_features(pipe, features) if isinstance(features, str) else features

    def loss(pipe: Any, endpoint: Tensor, target: Tensor) -> Tensor:
        value = weight * LATENT[latent](endpoint, target) if weight else endpoint.new_zeros(())
        if network is None:
            return value
        with torch.no_grad():
            reference = network(decode(pipe, target, layout, size))
        student = network(decode(pipe, endpoint, layout, size))
        return value + torch.stack([mse_loss(a, b) for a, b in zip(student, reference)]).mean().to(value.device)

    def residuals(pipe: Any, endpoint: Tensor, target: Tensor, near: Tensor) -> Tensor:
        rows = [weight**0.5 * RESIDUALS[latent](endpoint, target, near)] if weight else []
        if network is not None:
            maps = zip(*(network(decode(pipe, z, layout, size)) for z in (endpoint, target)))
            own = [_scaled_difference(a, b) for a, b in maps]
            rows += [differences.to(endpoint.device) / len(own) ** 0.5 for differences in own]
        return torch.cat(rows, 1)

    if latent in RESIDUALS or not weight:
        loss.residuals = residuals  # type: ignore[attr-defined]
    terms = [f"latent_{latent}" if weight == 1 else f"{weight:g} latent_{latent}"] if weight else []
    if features is not None:
        terms.append(features if isinstance(features, str) else getattr(features, "__name__", "features"))
    loss.__name__ = " + ".join(terms)
    return loss


def latent_mse(pipe: Any, endpoint: Tensor, target: Tensor) -> Tensor:
    """mean |z - z*|^2: DyWeight's loss for latent models."""
    return mse_loss(endpoint, target)


latent_mse.residuals = lambda pipe, *ends: RESIDUALS["mse"](*ends)  # type: ignore[attr-defined]


def residuals_of(loss: Loss) -> Callable[[Any, Tensor, Tensor, Tensor], Tensor]:
    """(pipe, endpoint, target, near) -> (B, R), rows whose squares sum to each sample's loss if it ends near.

    Rows are linear in the latents: a root mean square is a mean square by a weight that is taken where the sample ended
    ``near``, and the least of the sum so weighed is no worse there (iteratively reweighted least squares).

    Raises:
        ValueError: the loss is no sum of squares.
    """
    if not hasattr(loss, "residuals"):
        name = getattr(loss, "__name__", loss)
        raise ValueError(
            f"Loss {name!r} is no sum of squares, which least_squares needs: use loss='mse' or 'rmse', or adam."
        )
    return loss.residuals  # type: ignore[attr-defined]


def _scaled_difference(a: Tensor, b: Tensor) -> Tensor:
    """(B, R), rows whose squares sum to the mean squared difference."""
    return ((a - b) / a[0].numel() ** 0.5).flatten(1)


def _root_difference(a: Tensor, b: Tensor, near: Tensor) -> Tensor:
    """(B, R), rows whose squares sum to the root mean square of the difference at a = near: r / |r_near|^(1/2)."""
    size = torch.linalg.vector_norm(_scaled_difference(near, b), dim=1, keepdim=True)
    return _scaled_difference(a, b) / size.clamp(min=1e-30) ** 0.5


RESIDUALS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mse": lambda a, b, near: _scaled_difference(a, b),
    "rmse": _root_difference,
}
