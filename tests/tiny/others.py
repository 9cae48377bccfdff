"""Variance-preserving transformers, and pixels."""

# ruff: noqa: E731  (a row's inputs are one expression with one name)
from __future__ import annotations

from typing import Any

import diffusers as d

from dywspan.edm import EDMPipeline, EDMUNet

from .parts import (
    LATENT,
    NO_TEXT,
    NO_TEXT_2,
    ddim,
    text,
    vae,
)
from .registry import Indices, Tiny, row


@row("CogVideoXPipeline")
def cogvideox() -> Tiny:
    transformer = d.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=1, sample_width=4, sample_height=4, sample_frames=5, max_text_seq_length=8,
    )  # fmt: skip
    scheduler = d.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0, timestep_spacing="trailing",
        clip_sample=False,
    )  # fmt: skip
    pipe = d.CogVideoXPipeline(vae=None, transformer=transformer, scheduler=scheduler, **NO_TEXT)
    inputs = lambda i: {
        **text(i, 8, 16),
        **LATENT,
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "max_sequence_length": 8,
    }
    # DDIM starts at an infinite sigma, a table at 2^12, the floor of diffusers' DPM-Solver.
    exercises = "v-prediction at zero terminal SNR, frames before channels"
    return Tiny(pipe, inputs, exercises, layout="video_frames_first", tolerance=1e-3)


@row("HunyuanDiTPipeline")
def hunyuan_dit() -> Tiny:
    transformer = d.HunyuanDiT2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=8, hidden_size=16, text_len=8,
        text_len_t5=8,
    )  # fmt: skip
    pipe = d.HunyuanDiTPipeline(
        vae=None, transformer=transformer, **NO_TEXT_2, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
        scheduler=ddim(beta_start=0.00085, beta_end=0.03, prediction_type="v_prediction", steps_offset=1),
    )  # fmt: skip

    def inputs(i: Indices) -> dict[str, Any]:
        one = text(i, 8, 16, mask=True)
        two = {f"{k}_2": v for k, v in text([9 + k for k in i], 8, 16, mask=True).items()}
        return {**one, **two, **LATENT, "height": 128, "width": 128, "use_resolution_binning": False}

    return Tiny(pipe, inputs, "v-prediction, learned variance cut off, times rebuilt from numbers")


def pixel_unet() -> d.UNet2DModel:
    return d.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


@row("DDPMPipeline")
def ddpm() -> Tiny:
    pipe = d.DDPMPipeline(unet=pixel_unet(), scheduler=d.DDPMScheduler(clip_sample=False))
    inputs = lambda i: {"batch_size": len(i), "output_type": "np"}
    return Tiny(
        pipe,
        inputs,
        "pixels, noise never scaled, own scheduler stochastic",
        "unet",
        twin=d.DDIMScheduler,
        raw_noise=True,
        channels=3,
    )


@row("DDIMPipeline")
def ddim_pixels() -> Tiny:
    pipe = d.DDIMPipeline(unet=pixel_unet(), scheduler=ddim())
    inputs = lambda i: {"batch_size": len(i), "output_type": "np"}
    exercises = "pixels, passes eta and use_clipped_model_output to step"
    return Tiny(pipe, inputs, exercises, "unet", raw_noise=True, channels=3)


@row("DiTPipeline")
def dit() -> Tiny:
    transformer = d.DiTTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    pipe = d.DiTPipeline(transformer=transformer, vae=vae(), scheduler=ddim())
    inputs = lambda i: {"class_labels": [3 + k for k in i], "output_type": "np"}
    return Tiny(pipe, inputs, "class labels, batch doubled for guidance throughout", raw_noise=True)


@row("EDMPipeline")
def edm() -> Tiny:
    unet = EDMUNet("adm", 8, num_class_embeds=9, model_channels=64, channel_mult=(1, 1), layers_per_block=1,
                   attention_resolutions=(4,))  # fmt: skip
    pipe = EDMPipeline(unet, d.EDMEulerScheduler())
    inputs = lambda i: {"class_labels": [3 + k for k in i], "output_type": "np"}
    exercises = "dywspan's own, of EDM's pixel networks: class labels, preconditioned by the scheduler"
    # diffusers starts at sqrt(80^2 + 1).
    return Tiny(pipe, inputs, exercises, "unet", channels=3, tolerance=1e-3)
