"""Flow networks that make video."""

# ruff: noqa: E731  (a row's inputs are one expression with one name)
from __future__ import annotations

from typing import Any

import diffusers as d

import dywspan

from .parts import (
    LATENT,
    NO_TEXT,
    NO_TEXT_2,
    flow_euler,
    images,
    normal,
    positive,
    text,
)
from .registry import Indices, Tiny, row

WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16,
    "out_channels": 16, "text_dim": 16, "freq_dim": 16, "ffn_dim": 16, "num_layers": 1, "rope_max_seq_len": 32,
}  # fmt: skip


def wan_inputs(i: Indices) -> dict[str, Any]:
    return {**text(i, 8, 16), **LATENT, "height": 32, "width": 32, "num_frames": 5}


@row("WanPipeline")
def wan() -> Tiny:
    transformer = d.WanTransformer3DModel(**WAN)
    pipe = d.WanPipeline(vae=None, scheduler=flow_euler(shift=5.0), transformer=transformer, **NO_TEXT)
    exercises = "video, reads scheduler.sigmas, guidance in two calls"
    return Tiny(pipe, wan_inputs, exercises, branches=2, layout="video", channels=16)


@row("WanVideoToVideoPipeline")
def wan_video2video() -> Tiny:
    small = d.AutoencoderKLWan(base_dim=2, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = flow_euler(shift=5.0)
    pipe = d.WanVideoToVideoPipeline(
        vae=small, scheduler=scheduler, transformer=d.WanTransformer3DModel(**WAN), **NO_TEXT
    )

    def inputs(i: Indices) -> dict[str, Any]:
        video = normal(i, 5, 3, 32, 32, salt=1).sigmoid()
        return {**text(i, 8, 16), **LATENT, "height": 32, "width": 32, "video": video, "strength": 0.5}

    return Tiny(
        pipe, inputs, "slices timesteps and never sets a begin index", steps=4, seen=lambda t: t[2:], branches=2,
        layout="video", channels=16,
    )  # fmt: skip


LTX: dict[str, Any] = {
    "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
    "num_layers": 1, "caption_channels": 16,
}  # fmt: skip


def ltx(pipeline: type, **shift: Any) -> Any:
    small = d.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
    )  # fmt: skip
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}
    scheduler, transformer = flow_euler(**(shift or dynamic)), d.LTXVideoTransformer3DModel(**LTX)
    return pipeline(scheduler=scheduler, vae=small, transformer=transformer, **NO_TEXT)


def ltx_inputs(i: Indices) -> dict[str, Any]:
    return {**text(i, 8, 16, mask=True), **LATENT, "height": 64, "width": 64, "num_frames": 9}


@row("LTXPipeline")
def ltx_text() -> Tiny:
    pipe = dywspan.bind(ltx(d.LTXPipeline))
    inputs = lambda i: {**ltx_inputs(i), "width": 96}
    exercises = "packed video tokens, stretched shift (shift_terminal), dywspan.bind"
    return Tiny(pipe, inputs, exercises, layout="packed_video", channels=8)


@row("LTXImageToVideoPipeline")
def ltx_image() -> Tiny:
    inputs = lambda i: {**ltx_inputs(i), "image": images(i, 64)}
    exercises = "first frame kept: step sees the other frames only"
    return Tiny(ltx(d.LTXImageToVideoPipeline), inputs, exercises, layout="video", channels=8)


@row("LTXConditionPipeline")
def ltx_condition() -> Tiny:
    exercises = "a time for each token, the velocity's sign turned"
    pipe = dywspan.bind(ltx(d.LTXConditionPipeline, shift=1.0))
    return Tiny(pipe, ltx_inputs, exercises, layout="packed_video", channels=8)


@row("MochiPipeline")
def mochi() -> Tiny:
    transformer = d.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=4, max_sequence_length=8,
    )  # fmt: skip
    scheduler = flow_euler(invert_sigmas=True)
    pipe = d.MochiPipeline(scheduler=scheduler, vae=None, transformer=transformer, **NO_TEXT)
    inputs = lambda i: {
        **text(i, 8, 16, mask=True),
        **LATENT,
        "height": 32,
        "width": 32,
        "num_frames": 7,
        "max_sequence_length": 8,
    }
    return Tiny(pipe, inputs, "inverted flow: time runs from data to noise", steps=4, layout="video")


@row("HunyuanVideoPipeline")
def hunyuan_video() -> Tiny:
    transformer = d.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    pipe = d.HunyuanVideoPipeline(vae=None, transformer=transformer, scheduler=flow_euler(shift=7.0), **NO_TEXT_2)

    def inputs(i: Indices) -> dict[str, Any]:
        arguments = positive(text(i, 8, 16, pooled=8, mask=True))
        return {**arguments, **LATENT, "height": 32, "width": 32, "num_frames": 5}

    return Tiny(pipe, inputs, "video with embedded guidance", layout="video")
