"""Images of a pipeline's last latents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.layout import LAYOUTS, Size
from .networks import dtype_of, place, stored


def decode(pipe: Any, latents: Tensor, layout: str = "image", size: Size | None = None) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] of a pipeline's last latents, differentiable.

        D(z * std / scaling_factor + mean), mean = the decoder's latents_mean or shift_factor

    as diffusers' image pipelines do, but not clamped, so that every pixel has a gradient; and in one piece, whatever
    slicing or tiling is switched on: tiles are blended. A pixel-space pipeline's sample is its image, clamped.

    Args:
        latents: the last sample, in ``layout``: images, or videos of one frame.
        layout: of ``LAYOUTS``.
        size: (height, width) of the unpacked latent, where packed tokens are not a square.

    Raises:
        ValueError: the latents are videos or sounds, or the pipeline has no decoder for them.
    """
    vae, z = find_vae(pipe), latents
    if (norm := getattr(vae, "bn", None)) is not None:  # FLUX.2's statistics are those of packed channels
        mean, variance = (stored(vae, f"bn.running_{name}").to(z.device) for name in ("mean", "var"))
        z = z * (variance + norm.eps).sqrt() + mean
    try:
        z = LAYOUTS[layout].to_grid(z, size)
    except ValueError as error:
        raise ValueError(f"{error} A loss is told by make_loss(..., layout=..., size=(height, width)).") from error
    if len(z) != len(latents):
        raise ValueError(f"{layout!r} latents {tuple(latents.shape)} are videos: use a loss on latents alone.")
    if layout == "audio":
        raise ValueError(f"{layout!r} latents {tuple(latents.shape)} are sounds: use a loss on latents alone.")
    if vae is None:
        if z.shape[1] != 3:
            raise ValueError(
                f"{type(pipe).__name__} has no image decoder for {z.shape[1]} channels: use a latent loss."
            )
        return z.float().clamp(-1, 1)
    config = vae.config
    std, mean = config.get("latents_std") or 1.0, config.get("latents_mean") or config.get("shift_factor") or 0.0
    std, mean = (torch.as_tensor(v, dtype=z.dtype, device=z.device).reshape(-1, 1, 1) for v in (std, mean))
    z = z * std / (config.get("scaling_factor") or 1.0) + mean
    with in_one_piece(vae):
        if is_video(vae):
            return decoded(pipe, vae, z[:, :, None])[:, :, 0].float()
        # Convolutions keep this memory format, and are the faster for it: a quarter to a third on a CPU.
        return decoded(pipe, vae, z.contiguous(memory_format=torch.channels_last)).float()


def decoded(pipe: Any, vae: Any, z: Tensor) -> Tensor:
    """What the decoder makes of latents, where and in what it computes.

    In float16 that is float32 if its configuration says ``force_upcast``, as SDXL's does: it overflows otherwise. Its
    weights stay as they are, and copies take part, so that gradients find in the backward pass what they passed.
    """
    dtype, device = dtype_of(vae), place(pipe, vae)
    if dtype != torch.float16 or not vae.config.get("force_upcast"):
        return vae.decode(z.to(device, dtype)).sample
    module = _Decoder(getattr(vae, "_orig_mod", vae))
    own = (*module.named_parameters(), *module.named_buffers())
    wide = {name: t.to(t.device if t.is_meta else device, torch.float32) for name, t in own if t.is_floating_point()}
    return torch.func.functional_call(module, wide, (z.to(device, torch.float32),))


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample


def to_images(pipe: Any, latents: Tensor, layout: str = "image", size: Size | None = None) -> Tensor:
    """Decoded latents as a PNG would hold them: (B, 3, H, W) float32 in [0, 1], on 8-bit levels."""
    pixels = decode(pipe, latents, layout, size)
    return ((pixels + 1) * 127.5).round().clamp(0, 255) / 255


def usual_layout(latents: Tensor) -> str:
    """The layout of a pipeline's last latents, where nobody says: tokens are packed, all else is an image."""
    return "packed" if latents.ndim == 3 else "image"


def find_vae(pipe: Any) -> Any:
    """The pipeline's autoencoder; None in pixel space."""
    return getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)


def is_video(vae: nn.Module) -> bool:
    """Whether it reads (B, C, T, H, W): QwenImage and Wan decode an image as a video of one frame."""
    return any(isinstance(m, nn.Conv3d) for m in vae.modules())


@contextmanager
def in_one_piece(vae: nn.Module) -> Iterator[None]:
    """Within, it neither slices nor tiles."""
    on = [name for name in ("use_slicing", "use_tiling") if getattr(vae, name, False)]
    for name in on:
        setattr(vae, name, False)
    try:
        yield
    finally:
        for name in on:
            setattr(vae, name, True)
