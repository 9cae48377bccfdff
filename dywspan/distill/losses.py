"""What makes an endpoint close to the teacher's: on latents, or on features of the decoded images.

A loss is a function (pipe, endpoint, target) -> scalar; a feature network one of images (B, 3, H, W) in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss, normalize

from ..core.layout import LAYOUTS

Loss = Callable[[Any, Tensor, Tensor], Tensor]
Features = Callable[[Tensor], Sequence[Tensor]]


def latent_mse(pipe: Any, endpoint: Tensor, target: Tensor) -> Tensor:
    """mean |z - z*|^2: DyWeight's loss for latent models."""
    return mse_loss(endpoint, target)


def latent_and_features(features: Features, layout: str = "image", weight: float = 0.1) -> Loss:
    """c |z - z*|^2 + |f(D(z)) - f(D(z*))|^2, c = 0.1. Source: SpanLift eq. (16), with means for sums.

    Args:
        features: f, frozen.
        layout: of the latents, see ``LAYOUTS``.
        weight: c.
    """

    def loss(pipe: Any, endpoint: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            reference = features(decode(pipe, target, layout))
        student = features(decode(pipe, endpoint, layout))
        return weight * mse_loss(endpoint, target) + _distance(student, reference)

    loss.__name__ = f"{weight}_latent_mse_and_features"  # what the provenance says
    return loss


def decode(pipe: Any, latents: Tensor, layout: str = "image") -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] of a pipeline's last latents, differentiable.

    Raises:
        ValueError: the pipeline has no decoder of images.
    """
    vae = getattr(pipe, "vae", None)
    if vae is None or layout.startswith(("video", "packed_video")):
        raise ValueError(f"{type(pipe).__name__} has no image decoder for layout {layout!r}: use a latent loss.")
    z = LAYOUTS[layout].to_grid(latents)
    if (mean := vae.config.get("latents_mean")) is not None:
        mean, std = (
            torch.tensor(v, dtype=z.dtype, device=z.device)[:, None, None] for v in (mean, vae.config.latents_std)
        )
        z = z * std + mean
    else:
        z = z / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)
    return vae.decode(z.to(vae.dtype)).sample.float()


def dinov2(name: str = "facebook/dinov2-base", model: nn.Module | None = None) -> Features:
    """DINOv2's last hidden states at 224 x 224, the features of SpanLift eq. (16).

    Args:
        name: weights on the Hub; needs transformers and, the first time, the network.
        model: a ``transformers.Dinov2Model`` to use instead.
    """
    network: nn.Module | None = model
    if network is None:
        from transformers import Dinov2Model

        try:
            network = cast(nn.Module, Dinov2Model.from_pretrained(name))
        except OSError as error:
            raise OSError(
                f"The weights of {name} are needed for this loss and could not be had: download them once with "
                f"`hf download {name}`, or use --features encoder."
            ) from error
    network.eval().requires_grad_(False)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def features(images: Tensor) -> Sequence[Tensor]:
        network.to(images.device)
        x = interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True)
        x = (x / 2 + 0.5 - mean.to(x)[:, None, None]) / std.to(x)[:, None, None]
        return [network(pixel_values=x).last_hidden_state]

    return features


def encoder(pipe: Any) -> Features:
    """The pipeline's own image encoder: every convolution's output, of unit length over channels.

    LPIPS' distance without learned weights, on a network that needs no download and knows the pipeline's images.
    """
    convolutions = [m for m in pipe.vae.encoder.modules() if isinstance(m, nn.Conv2d)][1:]

    def features(images: Tensor) -> Sequence[Tensor]:
        maps: list[Tensor] = []
        hooks = [m.register_forward_hook(lambda *args: maps.append(normalize(args[-1].float()))) for m in convolutions]
        try:
            pipe.vae.encode(images.to(pipe.vae.dtype))
        finally:
            for hook in hooks:
                hook.remove()
        return maps

    return features


@torch.no_grad()
def feature_distance(features: Features, images: Tensor, reference: Tensor) -> Tensor:
    """(B,) distance of each image to its reference: the mean over feature maps of their squared difference."""
    pairs = zip(features(images), features(reference))
    return torch.stack([(a - b).square().flatten(1).mean(1) for a, b in pairs]).mean(0)


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([mse_loss(x, y) for x, y in zip(a, b)]).mean()


# By name, for the command line; each gets the pipeline.
FEATURES: dict[str, Callable[[Any], Features]] = {"dinov2": lambda pipe: dinov2(), "encoder": encoder}
