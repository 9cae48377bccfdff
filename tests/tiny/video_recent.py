"""Flow networks that make video, some with sound, from images or with two experts."""

# ruff: noqa: E731  (a row's inputs are one expression with one name)
from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import diffusers as d
import torch
from torch import Tensor

import dywspan

from .flow_images import UncutDPMSolver
from .flow_video import WAN, wan_inputs
from .parts import LATENT, NO_TEXT, NO_TEXT_2, Stub, flow_euler, images, text
from .registry import Indices, Tiny, row


@row("WanPipeline (two experts)")
def wan_two_experts() -> Tiny:
    transformer, second = d.WanTransformer3DModel(**WAN), d.WanTransformer3DModel(**WAN)
    pipe = d.WanPipeline(
        vae=None, scheduler=flow_euler(shift=5.0), transformer=transformer, transformer_2=second, **NO_TEXT,
        boundary_ratio=0.5,
    )  # fmt: skip
    exercises = "the time decides which network is asked"
    return Tiny(pipe, wan_inputs, exercises, experts=("transformer_2",), branches=2, layout="video", channels=16)


@row("WanImageToVideoPipeline")
def wan_image2video() -> Tiny:
    small = d.AutoencoderKLWan(base_dim=2, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    transformer = d.WanTransformer3DModel(**(WAN | {"in_channels": 36}))
    pipe = d.WanImageToVideoPipeline(vae=small, scheduler=flow_euler(shift=5.0), transformer=transformer, **NO_TEXT)
    inputs = lambda i: {**wan_inputs(i), "image": images([0])}  # one for all
    exercises = "the image in channels that the sample has not"
    return Tiny(pipe, inputs, exercises, branches=2, layout="video", channels=16)


@row("SanaVideoPipeline")
def sana_video() -> Tiny:
    transformer = d.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8,
        sample_size=8, rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = d.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = d.SanaVideoPipeline(vae=None, transformer=transformer, scheduler=scheduler, **NO_TEXT)
    inputs = lambda i: {
        **text(i, 8, 8, mask=True),
        **LATENT,
        "height": 64,
        "width": 64,
        "frames": 5,
        "use_resolution_binning": False,
        "negative_prompt": None,
    }
    exact = {"solver": "dpmpp", "solver_order": 2}
    return Tiny(pipe, inputs, "video by DPM-Solver++", exact=exact, twin=UncutDPMSolver, layout="video")


SOUND = "its sound is of another layout than the video beside it"


def video_and_sound(output: Any) -> Tensor:
    return torch.cat([part.flatten(1) for part in (output[0], output[1])], 1)


@row("LTX2Pipeline")
def ltx2() -> Tiny:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    transformer = d.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=8 * 16, audio_out_channels=8 * 16, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=1, caption_channels=16,
    )  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=16, text_proj_in_factor=1, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8, video_connector_num_layers=1,
        video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
    )  # fmt: skip
    scheduler = flow_euler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1, base_image_seq_len=1024
    )
    frames = Stub(
        spatial_compression_ratio=32, temporal_compression_ratio=8, latents_mean=torch.zeros(4),
        latents_std=torch.ones(4), config=SimpleNamespace(scaling_factor=1.0),
    )  # fmt: skip
    sound = Stub(
        mel_compression_ratio=4, temporal_compression_ratio=4, latents_mean=torch.zeros(128),
        latents_std=torch.ones(128),
        config=SimpleNamespace(mel_bins=64, latent_channels=8, sample_rate=16000, mel_hop_length=160),
    )  # fmt: skip
    pipe = d.LTX2Pipeline(
        scheduler=scheduler, vae=frames, audio_vae=sound, **NO_TEXT, connectors=connectors, transformer=transformer,
        vocoder=None,
    )  # fmt: skip
    inputs = lambda i: {
        **text(i, 8, 16, mask=True),
        **LATENT,
        "height": 64,
        "width": 96,
        "num_frames": 9,
        "guidance_rescale": 0.0,
        "stg_scale": 0.0,
        "modality_scale": 1.0,
        "audio_stg_scale": 0.0,
        "audio_modality_scale": 1.0,
    }
    exercises = "sound beside video, by a copy of the scheduler; guidance in x0 by scheduler.sigmas"
    return Tiny(dywspan.bind(pipe), inputs, exercises, result=video_and_sound, unlifted=SOUND, layout="packed_video")


def kandinsky6(out_channels: int = 4, **call: Any) -> Any:
    transformer = d.Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=out_channels, in_text_dim=8, in_text_dim2=8, time_dim=16, model_dim=16,
        ff_dim=16, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 2, 2), in_audio_dim=4, out_audio_dim=4,
    )  # fmt: skip
    sound = Stub(config=SimpleNamespace(sample_rate=8000), latent_hop_length=400)
    pipe = d.Kandinsky6TI2VAPipeline(
        transformer=transformer, vae=None, scheduler=flow_euler(shift=3.0), **NO_TEXT_2, audio_vae=sound, vocoder=sound
    )

    def inputs(i: Indices) -> dict[str, Any]:
        arguments = text(i, 8, 8, pooled=8)
        return {**arguments, **LATENT, "height": 32, "width": 32, "num_frames": 5, **call}

    return functools.partial(Tiny, pipe, inputs, branches=2, layout="video_channels_last")


@row("Kandinsky6TI2VAPipeline")
def kandinsky6_sound() -> Tiny:
    exercises = "sound beside video, by a copy of the scheduler after set_timesteps"
    return kandinsky6()(exercises, result=video_and_sound, unlifted=SOUND)


@row("Kandinsky6TI2VAPipeline (silent)")
def kandinsky6_silent() -> Tiny:
    return kandinsky6(sample_audio=False)("channels last, and no sound")
