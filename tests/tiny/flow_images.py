"""Flow networks that make images."""

# ruff: noqa: E731  (a row's inputs are one expression with one name)
from __future__ import annotations

import functools
from typing import Any

import diffusers as d
import torch
from torch import nn

import dywspan

from .parts import (
    LATENT,
    NO_TEXT,
    NO_TEXT_2,
    NO_TEXT_3,
    flow_euler,
    images,
    masks,
    normal,
    per_mille,
    positive,
    text,
    vae,
)
from .registry import Indices, Tiny, row


def sd3(pipeline: type, channels: int = 4) -> Any:
    transformer = d.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=channels, out_channels=channels, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=16,
    )  # fmt: skip
    small, scheduler = vae(latent_channels=channels), flow_euler(shift=3.0)
    return pipeline(transformer=transformer, scheduler=scheduler, vae=small, **NO_TEXT_3)


@row("StableDiffusion3Pipeline")
def sd3_text() -> Tiny:
    inputs = lambda i: {**text(i, 8, 16, pooled=16), **LATENT, "height": 32, "width": 32}
    return Tiny(sd3(d.StableDiffusion3Pipeline), inputs, "flow network, begin index never set")


@row("StableDiffusion3Img2ImgPipeline")
def sd3_img2img() -> Tiny:
    inputs = lambda i: {
        **text(i, 8, 16, pooled=16),
        **LATENT,
        "height": 32,
        "width": 32,
        "image": images(i),
        "strength": 0.5,
    }
    pipe = sd3(d.StableDiffusion3Img2ImgPipeline)
    return Tiny(pipe, inputs, "start in the middle of the table, scale_noise", steps=4, seen=lambda t: t[2:])


FLUX: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 2, 2),
}


def flux(pipeline: type, in_channels: int = 16) -> Any:
    transformer = d.FluxTransformer2DModel(
        **FLUX, in_channels=in_channels, out_channels=16, pooled_projection_dim=16, guidance_embeds=True
    )
    scheduler = flow_euler(use_dynamic_shifting=True, shift=3.0)
    return pipeline(scheduler=scheduler, vae=vae(), transformer=transformer, **NO_TEXT_2)


def flux_inputs(i: Indices) -> dict[str, Any]:
    return {**positive(text(i, 8, 16, pooled=16)), **LATENT, "height": 32, "width": 32}


@row("FluxPipeline")
def flux_text() -> Tiny:
    exercises = "packed tokens, resolution-dependent shift, times divided by 1000"
    return Tiny(flux(d.FluxPipeline), flux_inputs, exercises, told=per_mille, layout="packed")


@row("FluxPipeline (not square)")
def flux_not_square() -> Tiny:
    pipe = dywspan.bind(flux(d.FluxPipeline))
    inputs = lambda i: {**flux_inputs(i), "height": 24, "width": 40}
    return Tiny(pipe, inputs, "dywspan.bind tells SpanLift what tokens are", told=per_mille, layout="packed")


@row("FluxImg2ImgPipeline")
def flux_img2img() -> Tiny:
    inputs = lambda i: {**flux_inputs(i), "image": images(i), "strength": 0.5}
    pipe = flux(d.FluxImg2ImgPipeline)
    exercises = "packed img2img, scale_noise"
    return Tiny(pipe, inputs, exercises, steps=4, seen=lambda t: t[2:], told=per_mille, layout="packed")


@row("FluxKontextPipeline")
def flux_kontext() -> Tiny:
    inputs = lambda i: {**flux_inputs(i), "image": images(i), "max_area": 32 * 32, "_auto_resize": False}
    exercises = "reference tokens cut off before step"
    return Tiny(flux(d.FluxKontextPipeline), inputs, exercises, told=per_mille, layout="packed")


@row("FluxFillPipeline")
def flux_fill() -> Tiny:
    inputs = lambda i: {**flux_inputs(i), "image": images(i), "mask_image": masks(i)}
    pipe = flux(d.FluxFillPipeline, in_channels=16 + 16 + 4 * 2 * 2)  # latents, masked image, folded mask
    exercises = "network input has more channels than the sample"
    return Tiny(pipe, inputs, exercises, told=per_mille, layout="packed")


def flux2_parts(**changes: Any) -> dict[str, Any]:
    transformer = d.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), **changes,
    )  # fmt: skip
    small = d.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, layers_per_block=1,
    )  # fmt: skip
    scheduler = flow_euler(use_dynamic_shifting=True, shift=3.0)
    return {"scheduler": scheduler, "vae": small, "transformer": transformer, **NO_TEXT}


@row("Flux2Pipeline")
def flux2() -> Tiny:
    pipe = d.Flux2Pipeline(**flux2_parts())
    inputs = lambda i: {"prompt_embeds": normal(i, 8, 16), **LATENT, "height": 32, "width": 32}
    exercises = "packed tokens of a patchified latent, empirical mu"
    return Tiny(pipe, inputs, exercises, told=per_mille, layout="packed")


def chroma_parts() -> dict[str, Any]:
    transformer = d.ChromaTransformer2DModel(
        **FLUX, in_channels=16, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1
    )
    scheduler = flow_euler(use_dynamic_shifting=True)
    return {"scheduler": scheduler, "vae": vae(), "transformer": transformer, **NO_TEXT}


def chroma_inputs(i: Indices) -> dict[str, Any]:
    floats = {k: v.float() for k, v in text(i, 8, 16, mask=True).items()}  # its attention takes masks as numbers
    return {**floats, **LATENT, "height": 32, "width": 32}


CHROMA = "one network writes what all layers are told"


@row("ChromaPipeline")
def chroma() -> Tiny:
    exercises = "Flux layout with true guidance in two calls"
    pipe = d.ChromaPipeline(**chroma_parts())
    return Tiny(pipe, chroma_inputs, exercises, branches=2, told=per_mille, layout="packed", unmodulated=CHROMA)


class UncutDPMSolver(d.DPMSolverMultistepScheduler):
    """Tells a flow network 1000 * sigma; diffusers' class cuts this to an integer."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps


def sana_parts(**changes: Any) -> dict[str, Any]:
    transformer = d.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=8, **changes,
    )  # fmt: skip
    scheduler = d.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    return {"vae": None, "transformer": transformer, "scheduler": scheduler}


@row("SanaPipeline")
def sana() -> Tiny:
    pipe = d.SanaPipeline(**sana_parts(), **NO_TEXT)
    inputs = lambda i: {
        **text(i, 8, 8, mask=True),
        **LATENT,
        "height": 256,
        "width": 256,
        "use_resolution_binning": False,
        "negative_prompt": None,
    }
    exact = {"solver": "dpmpp", "solver_order": 2}
    return Tiny(pipe, inputs, "flow network whose own solver is DPM-Solver++", exact=exact, twin=UncutDPMSolver)


@row("PixArtSigmaPipeline")
def pixart() -> Tiny:
    transformer = d.PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=8,
        in_channels=4, out_channels=8, cross_attention_dim=16, use_additional_conditions=False,
    )  # fmt: skip
    scheduler = d.DPMSolverMultistepScheduler()
    pipe = d.PixArtSigmaPipeline(vae=vae(), transformer=transformer, scheduler=scheduler, **NO_TEXT)
    inputs = lambda i: {
        **text(i, 8, 8, mask=True),
        **LATENT,
        "height": 16,
        "width": 16,
        "use_resolution_binning": False,
        "negative_prompt": None,
    }
    exact = {"solver": "dpmpp", "solver_order": 2}
    return Tiny(pipe, inputs, "learned variance cut off, own solver is DPM-Solver++", exact=exact)


@row("AuraFlowPipeline")
def auraflow() -> Tiny:
    transformer = d.AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=16,
        pos_embed_max_size=64,
    )  # fmt: skip
    pipe = d.AuraFlowPipeline(
        vae=vae(), transformer=transformer, scheduler=flow_euler(shift=1.73), text_encoder=None, tokenizer=None
    )
    inputs = lambda i: {**text(i, 8, 16, mask=True), **LATENT, "height": 32, "width": 32}
    return Tiny(pipe, inputs, "times rebuilt from numbers, not views of timesteps", told=per_mille)


@row("Lumina2Pipeline")
def lumina2() -> Tiny:
    transformer = d.Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(64, 64, 64),
        cap_feat_dim=8,
    )  # fmt: skip
    pipe = d.Lumina2Pipeline(transformer=transformer, scheduler=flow_euler(shift=6.0), vae=vae(), **NO_TEXT)
    inputs = lambda i: {**text(i, 8, 8, mask=True), **LATENT, "height": 32, "width": 32}
    told = lambda t: 1 - t / 1000
    return Tiny(pipe, inputs, "time runs the other way, output negated by the pipeline", branches=2, told=told)


def qwen_image(height: int, width: int) -> Any:
    transformer = d.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    scheduler = flow_euler(use_dynamic_shifting=True)
    pipe = d.QwenImagePipeline(scheduler=scheduler, vae=None, transformer=transformer, **NO_TEXT)

    def inputs(i: Indices) -> dict[str, Any]:
        mask = torch.ones(len(i), 8, dtype=torch.long)
        masks = {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask}
        return {**text(i, 8, 16), **masks, **LATENT, "height": height, "width": width, "true_cfg_scale": 4.0}

    return functools.partial(Tiny, pipe, inputs, branches=2, told=per_mille, layout="packed")


@row("QwenImagePipeline")
def qwen() -> Tiny:
    return qwen_image(64, 64)("packed tokens, true guidance rescaled per token")


@row("QwenImagePipeline (not square)")
def qwen_not_square() -> Tiny:
    tiny = qwen_image(96, 64)("dywspan.bind tells SpanLift what tokens are")
    dywspan.bind(tiny.pipe)
    return tiny


@row("ZImagePipeline")
def z_image() -> Tiny:
    transformer = d.ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=[4, 2, 2], axes_lens=[256, 32, 32],
    )  # fmt: skip
    # Not initialised with zeros but left uninitialised.
    for name in ("x_pad_token", "cap_pad_token"):
        nn.init.normal_(getattr(transformer, name))
    pipe = d.ZImagePipeline(scheduler=flow_euler(shift=3.0), vae=vae(), transformer=transformer, **NO_TEXT)

    def inputs(i: Indices) -> dict[str, Any]:
        prompts = {k: list(v) for k, v in text(i, 8, 8).items()}
        return {**prompts, **LATENT, "height": 32, "width": 32}

    told = lambda t: 1 - t / 1000
    return Tiny(pipe, inputs, "lists of samples, time runs the other way, output negated", told=told)


@row("Kandinsky5T2IPipeline")
def kandinsky5() -> Tiny:
    transformer = d.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=16, out_visual_dim=4, model_dim=16, ff_dim=16,
        num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 2, 2),
    )  # fmt: skip
    pipe = d.Kandinsky5T2IPipeline(transformer=transformer, vae=None, scheduler=flow_euler(shift=3.0), **NO_TEXT_2)
    pipe.resolutions = [(64, 64)]  # its smallest one is 4096 tokens

    def inputs(i: Indices) -> dict[str, Any]:
        lengths = torch.arange(len(i) + 1, dtype=torch.int32) * 8
        embeds = {
            f"{sign}prompt_embeds_{name}": normal(who, *shape)
            for sign, who in (("", i), ("negative_", [99] * len(i)))
            for name, shape in (("qwen", (8, 8)), ("clip", (8,)))
        }
        lengths = {"prompt_cu_seqlens": lengths, "negative_prompt_cu_seqlens": lengths}
        return {**embeds, **lengths, **LATENT, "height": 64, "width": 64}

    exercises = "channels last, the sample is a slice of a larger tensor"
    return Tiny(pipe, inputs, exercises, branches=2, layout="video_channels_last")
