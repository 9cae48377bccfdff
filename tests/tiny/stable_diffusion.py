"""Stable Diffusion, XL and video diffusion."""

# ruff: noqa: E731  (a row's inputs are one expression with one name)
from __future__ import annotations

from typing import Any

import diffusers as d

from .parts import (
    LATENT,
    NO_TEXT,
    NO_TEXT_2,
    UNET,
    UP,
    ddim,
    images,
    masks,
    normal,
    sd_betas,
    text,
    vae,
)
from .registry import Tiny, awaken, row


def stable_diffusion(pipeline: type, in_channels: int = 4, **extra: Any) -> Any:
    return pipeline(
        vae=vae(),
        unet=d.UNet2DConditionModel(in_channels=in_channels, **UNET, **UP),
        scheduler=ddim(**sd_betas()),
        **NO_TEXT,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **extra,
    )


@row("StableDiffusionPipeline")
def sd() -> Tiny:
    pipe = stable_diffusion(d.StableDiffusionPipeline)
    inputs = lambda i: {**text(i, 8, 16), **LATENT, "height": 32, "width": 32}
    return Tiny(pipe, inputs, "epsilon network, classifier-free guidance, init_noise_sigma", "unet")


@row("StableDiffusionPipeline (v-prediction)")
def sd_v() -> Tiny:
    pipe = stable_diffusion(d.StableDiffusionPipeline)
    pipe.scheduler = d.EulerDiscreteScheduler(**sd_betas(), prediction_type="v_prediction", timestep_spacing="leading")
    inputs = lambda i: {**text(i, 8, 16), **LATENT, "height": 32, "width": 32}
    return Tiny(pipe, inputs, "v-prediction network whose own scheduler works in the unscaled frame", "unet")


@row("StableDiffusionImg2ImgPipeline")
def sd_img2img() -> Tiny:
    pipe = stable_diffusion(d.StableDiffusionImg2ImgPipeline)
    inputs = lambda i: {**text(i, 8, 16), **LATENT, "image": images(i), "strength": 0.5}
    return Tiny(pipe, inputs, "start in the middle of the table, add_noise", "unet", 4, seen=lambda t: t[2:])


@row("StableDiffusionInpaintPipeline (strength 1)")
def sd_inpaint() -> Tiny:
    pipe = stable_diffusion(d.StableDiffusionInpaintPipeline)
    inputs = lambda i: {
        **text(i, 8, 16),
        **LATENT,
        "height": 32,
        "width": 32,
        "image": images(i),
        "mask_image": masks(i),
        "strength": 1.0,
    }
    return Tiny(pipe, inputs, "from pure noise; known region noised again after every step", "unet")


@row("StableDiffusionInpaintPipeline (strength 0.5)")
def sd_inpaint_part() -> Tiny:
    pipe = stable_diffusion(d.StableDiffusionInpaintPipeline)
    inputs = lambda i: {
        **text(i, 8, 16),
        **LATENT,
        "height": 32,
        "width": 32,
        "image": images(i),
        "mask_image": masks(i),
        "strength": 0.5,
    }
    return Tiny(pipe, inputs, "inpainting from the middle of the table", "unet", steps=4, seen=lambda t: t[2:])


@row("StableDiffusionInpaintPipeline (9 channels)")
def sd_inpaint_nine() -> Tiny:
    pipe = stable_diffusion(d.StableDiffusionInpaintPipeline, in_channels=9)
    inputs = lambda i: {
        **text(i, 8, 16),
        **LATENT,
        "height": 32,
        "width": 32,
        "image": images(i),
        "mask_image": masks(i),
        "strength": 1.0,
    }
    return Tiny(pipe, inputs, "network input has more channels than the sample", "unet")


@row("StableDiffusionControlNetPipeline")
def sd_controlnet() -> Tiny:
    control = d.ControlNetModel(
        **{k: v for k, v in UNET.items() if k != "sample_size"}, conditioning_embedding_out_channels=(4, 8)
    )
    awaken(control)
    pipe = stable_diffusion(d.StableDiffusionControlNetPipeline, controlnet=control.eval())
    inputs = lambda i: {**text(i, 8, 16), **LATENT, "image": images(i), "height": 32, "width": 32}
    return Tiny(pipe, inputs, "a second network asked at the same times", "unet")


def stable_diffusion_xl(pipeline: type, scheduler: Any = None) -> Any:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet = d.UNet2DConditionModel(**UNET, **UP, **added, projection_class_embeddings_input_dim=6 * 8 + 16)
    scheduler = scheduler or d.EulerDiscreteScheduler(**sd_betas(), timestep_spacing="leading")
    return pipeline(vae=vae(), unet=unet, scheduler=scheduler, **NO_TEXT_2)


@row("StableDiffusionXLPipeline")
def sdxl() -> Tiny:
    inputs = lambda i: {**text(i, 8, 16, pooled=16), **LATENT, "height": 32, "width": 32}
    return Tiny(stable_diffusion_xl(d.StableDiffusionXLPipeline), inputs, "size conditioning", "unet")


@row("StableDiffusionXLPipeline (denoising_end)")
def sdxl_base() -> Tiny:
    inputs = lambda i: {**text(i, 8, 16, pooled=16), **LATENT, "height": 32, "width": 32, "denoising_end": 0.5}
    # Halfway latents are in the scheduler's frame: DDIM's is ours, EulerDiscrete's is not.
    pipe = stable_diffusion_xl(d.StableDiffusionXLPipeline, ddim(**sd_betas()))
    return Tiny(pipe, inputs, "base half of base + refiner: stops mid-table", "unet", 4, seen=lambda t: t[t >= 500])


@row("StableDiffusionXLImg2ImgPipeline")
def sdxl_img2img() -> Tiny:
    inputs = lambda i: {**text(i, 8, 16, pooled=16), **LATENT, "image": images(i), "strength": 0.5}
    pipe = stable_diffusion_xl(d.StableDiffusionXLImg2ImgPipeline)
    return Tiny(pipe, inputs, "start in the middle of the table", "unet", steps=4, seen=lambda t: t[2:])


@row("StableDiffusionXLImg2ImgPipeline (denoising_start)")
def sdxl_refiner() -> Tiny:
    inputs = lambda i: {
        **text(i, 8, 16, pooled=16),
        **LATENT,
        "image": normal(i, 4, 16, 16, salt=1),
        "denoising_start": 0.5,
    }
    pipe = stable_diffusion_xl(d.StableDiffusionXLImg2ImgPipeline, ddim(**sd_betas()))
    return Tiny(pipe, inputs, "refiner half: begins mid-table, adds no noise", "unet", 4, seen=lambda t: t[t < 500])


@row("StableVideoDiffusionPipeline")
def svd() -> Tiny:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, projection_dim=8, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16,
    )  # fmt: skip
    unet = d.UNetSpatioTemporalConditionModel(
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64), layers_per_block=1, num_attention_heads=(2, 4), cross_attention_dim=8,
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, sample_size=16, num_frames=2,
    )  # fmt: skip
    scheduler = d.EulerDiscreteScheduler(
        **{k: v for k, v in sd_betas().items() if k != "steps_offset"}, prediction_type="v_prediction",
        timestep_type="continuous", timestep_spacing="leading", use_karras_sigmas=True, sigma_min=0.002,
        sigma_max=700.0,
    )  # fmt: skip
    pipe = d.StableVideoDiffusionPipeline(
        vae=d.AutoencoderKLTemporalDecoder(down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32)),
        image_encoder=CLIPVisionModelWithProjection(vision), unet=unet, scheduler=scheduler,
        feature_extractor=CLIPImageProcessor(crop_size=32, size=32),
    )  # fmt: skip
    # One generator draws the augmentation noise of the whole batch, so the image is not augmented here.
    inputs = lambda i: {**LATENT, "image": images(i), "height": 32, "width": 32, "noise_aug_strength": 0.0}
    # It integrates from sigma = 700 to data of size 1: float32 keeps three digits less.
    exercises = "continuous log-sigma times, frames before channels"
    return Tiny(pipe, inputs, exercises, "unet", layout="video_frames_first", tolerance=1e-3)
