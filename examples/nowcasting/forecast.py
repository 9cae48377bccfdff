"""A latent diffusion model of rain: frames that are known in, frames of the future out, as a diffusers pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel, UNet2DOutput
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from rain import FUTURE, KNOWN, SIZE
from torch import Tensor

CHANNELS, FACTOR = 4, 4  # of the latent, and how many pixels of a side one of it stands for


class ForecastNetwork(ModelMixin, ConfigMixin):
    """v of the latents of the future (B, T, H, W, C), told the known frames' latents: a UNet that sees all at once.

    Args:
        known, future: frames.
        channels: of the latents.
        size: of a side of the latents.
        widths: of the UNet's levels.
        layers: of each level.
    """

    @register_to_config
    def __init__(
        self,
        known: int = KNOWN,
        future: int = FUTURE,
        channels: int = CHANNELS,
        size: int = SIZE // FACTOR,
        widths: tuple[int, ...] = (48, 96),
        layers: int = 1,
    ) -> None:
        super().__init__()
        self.unet = UNet2DModel(
            sample_size=size,
            in_channels=(known + future) * channels,
            out_channels=future * channels,
            block_out_channels=tuple(widths),
            layers_per_block=layers,
            down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * (len(widths) - 1)),
            up_block_types=(*["AttnUpBlock2D"] * (len(widths) - 1), "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=24,
        )

    def forward(
        self, sample: Tensor, timestep: Tensor | float, context: Tensor, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """v (B, T, H, W, C) of a sample of that shape; ``context`` (B, known, H, W, C)."""
        frames = torch.cat([sample, context.to(sample)], 1)
        stacked = frames.permute(0, 1, 4, 2, 3).flatten(1, 2)
        v = self.unet(stacked, timestep).sample
        v = v.unflatten(1, (sample.shape[1], sample.shape[4])).permute(0, 1, 3, 4, 2)
        return UNet2DOutput(sample=v) if return_dict else (v,)


@dataclass
class Forecast(BaseOutput):
    """
    Attributes:
        frames: (B, T, H, W) in [0, 1], or latents (B, T, H', W', C).
    """

    frames: Tensor


class NowcastPipeline(DiffusionPipeline):
    """Rain of the next frames from the last ones."""

    model_cpu_offload_seq = "denoiser->vae"
    vae: AutoencoderTiny
    denoiser: ForecastNetwork
    scheduler: Any

    def __init__(self, vae: AutoencoderTiny, denoiser: ForecastNetwork, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(vae=vae, denoiser=denoiser, scheduler=scheduler)

    def encode(self, frames: Tensor) -> Tensor:
        """Latents (B, T, H', W', C) of frames (B, T, H, W) in [0, 1]."""
        images = 2 * frames.flatten(0, 1)[:, None].to(self.vae.dtype) - 1
        z = cast(Any, self.vae.encode(images)).latents * self.vae.config["scaling_factor"]
        return z.unflatten(0, frames.shape[:2]).permute(0, 1, 3, 4, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames (B, T, H, W) of latents, not clamped."""
        z = latents.permute(0, 1, 4, 2, 3).flatten(0, 1) / self.vae.config["scaling_factor"]
        images = cast(Any, self.vae.decode(z.to(self.vae.dtype))).sample
        return ((images[:, 0].float() + 1) / 2).unflatten(0, latents.shape[:2])

    @torch.no_grad()
    def __call__(
        self,
        context: Tensor,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "frames",
        return_dict: bool = True,
    ) -> Forecast | tuple[Tensor]:
        """
        Args:
            context: (B, known, H, W) in [0, 1], the last frames.
            output_type: "frames" or "latent".
        """
        known = self.encode(context.to(self._execution_device))
        shape = (len(context), self.denoiser.config["future"], *known.shape[2:])
        latents = randn_tensor(shape, generator, torch.device(self._execution_device), self.denoiser.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        latents = latents * self.scheduler.init_noise_sigma
        for t in cast(Any, self).progress_bar(self.scheduler.timesteps):
            v = self.denoiser(self.scheduler.scale_model_input(latents, t), t, known).sample
            latents = self.scheduler.step(v, t, latents).prev_sample
        frames = latents if output_type == "latent" else self.decode(latents).clamp(0, 1)
        self.maybe_free_model_hooks()
        return Forecast(frames=frames) if return_dict else (frames,)


def autoencoder() -> AutoencoderTiny:
    """One untrained autoencoder of single frames, ``FACTOR`` times smaller."""
    return AutoencoderTiny(
        in_channels=1,
        out_channels=1,
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        upsampling_scaling_factor=2,
        latent_channels=CHANNELS,
    )


def scheduler() -> DDIMScheduler:
    """DDIM from all noise, of a network of v."""
    return DDIMScheduler(
        1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=False,
    )
