"""Variance-preserving and EDM networks of other kinds: video, pixels, sound, upscaling."""

# ruff: noqa: E731  (a row's inputs are one expression with one name)
from __future__ import annotations

from typing import Any

import diffusers as d
import torch
from torch import Tensor

from .parts import LATENT, NO_TEXT, UNET, UP, Stub, ddim, flow_euler, images, normal, sd_betas, text, vae
from .registry import Indices, Tiny, row


@row("PixArtAlphaPipeline")
def pixart_alpha() -> Tiny:
    transformer = d.PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=8,
        in_channels=4, out_channels=8, cross_attention_dim=16, use_additional_conditions=False,
    )  # fmt: skip
    scheduler = d.DEISMultistepScheduler()
    pipe = d.PixArtAlphaPipeline(vae=vae(), transformer=transformer, scheduler=scheduler, **NO_TEXT)
    inputs = lambda i: {
        **text(i, 8, 8, mask=True),
        **LATENT,
        "height": 16,
        "width": 16,
        "use_resolution_binning": False,
        "negative_prompt": None,
    }
    exact = {"solver": "deis", "solver_order": 2}
    return Tiny(pipe, inputs, "learned variance cut off, own solver is DEIS", exact=exact)


@row("CogView3PlusPipeline")
def cogview3plus() -> Tiny:
    transformer = d.CogView3PlusTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, text_embed_dim=16,
        time_embed_dim=16, condition_dim=8, pos_embed_max_size=16, sample_size=16,
    )  # fmt: skip
    scheduler = d.CogVideoXDDIMScheduler(
        **{k: v for k, v in sd_betas().items() if k != "steps_offset"}, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, snr_shift_scale=4.0, timestep_spacing="trailing", clip_sample=False,
    )  # fmt: skip
    pipe = d.CogView3PlusPipeline(vae=vae(), transformer=transformer, scheduler=scheduler, **NO_TEXT)
    inputs = lambda i: {**text(i, 8, 16), **LATENT, "height": 32, "width": 32, "original_size": (32, 32)}
    return Tiny(pipe, inputs, "an image at zero terminal SNR, size conditioning", tolerance=1e-3)


@row("AllegroPipeline")
def allegro() -> Tiny:
    transformer = d.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=24, sample_width=8, sample_height=8, sample_frames=2, caption_channels=16,
    )  # fmt: skip
    small = d.AutoencoderKLAllegro(
        block_out_channels=(8, 8), latent_channels=4, layers_per_block=1,
        norm_num_groups=2, temporal_compression_ratio=4,
        down_block_types=("AllegroDownBlock3D",) * 2, up_block_types=("AllegroUpBlock3D",) * 2,
        temporal_downsample_blocks=(True, False), temporal_upsample_blocks=(False, True),
    )  # fmt: skip
    scheduler = d.EulerAncestralDiscreteScheduler()
    pipe = d.AllegroPipeline(vae=small, transformer=transformer, scheduler=scheduler, **NO_TEXT)
    inputs = lambda i: {
        **text(i, 8, 16, mask=True),
        **LATENT,
        "height": 16,
        "width": 16,
        "num_frames": 8,
        "negative_prompt": None,
    }
    return Tiny(pipe, inputs, "video whose own scheduler adds noise", twin=d.EulerDiscreteScheduler, layout="video")


@row("LattePipeline")
def latte() -> Tiny:
    transformer = d.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=16, video_length=2,
        norm_type="ada_norm_single", norm_elementwise_affine=False, attention_bias=True,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    pipe = d.LattePipeline(vae=vae(), transformer=transformer, scheduler=ddim(), **NO_TEXT)
    inputs = lambda i: {
        **text(i, 8, 16),
        **LATENT,
        "height": 16,
        "width": 16,
        "video_length": 2,
        "negative_prompt": None,
        "clean_caption": False,
    }
    return Tiny(pipe, inputs, "video, learned variance cut off by what variance_type says", layout="video")


@row("AnimateDiffPipeline")
def animatediff() -> Tiny:
    unet = d.UNet2DConditionModel(**{**UNET, "block_out_channels": (8, 16)}, **UP)
    adapter = d.MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
        use_motion_mid_block=False,
    )
    pipe = d.AnimateDiffPipeline(vae=vae(), unet=unet, motion_adapter=adapter, scheduler=ddim(**sd_betas()), **NO_TEXT)
    inputs = lambda i: {**text(i, 8, 16), **LATENT, "height": 32, "width": 32, "num_frames": 2}
    return Tiny(pipe, inputs, "a motion adapter in an image network", "unet", layout="video")


class NoVariance(d.DDIMScheduler):
    """DDIM, which does not know that the second half of an output can be a learned variance."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().step(model_output[:, : sample.shape[1]], timestep, sample, *args, **kwargs)


@row("IFPipeline")
def deepfloyd() -> Tiny:
    unet = d.UNet2DConditionModel(**(UNET | {"sample_size": 8}), **UP, in_channels=3, out_channels=6)
    pipe = d.IFPipeline(
        unet=unet, scheduler=d.DDPMScheduler(variance_type="learned_range", clip_sample=False), **NO_TEXT,
        safety_checker=None, feature_extractor=None, watermarker=None, requires_safety_checker=False,
    )  # fmt: skip
    inputs = lambda i: {**text(i, 8, 16), "output_type": "pt"}
    exercises = "pixels, and a learned variance that comes as far as step"
    return Tiny(pipe, inputs, exercises, "unet", twin=NoVariance, channels=3)


@row("StableDiffusionUpscalePipeline")
def upscale() -> Tiny:
    unet = d.UNet2DConditionModel(**UNET, **UP, in_channels=4 + 3, num_class_embeds=1000)
    pipe = d.StableDiffusionUpscalePipeline(
        vae=vae(), unet=unet, low_res_scheduler=d.DDPMScheduler(), scheduler=ddim(prediction_type="v_prediction"),
        **NO_TEXT,
    )  # fmt: skip
    inputs = lambda i: {**text(i, 8, 16), **LATENT, "image": images(i, 16)}
    return Tiny(pipe, inputs, "a second scheduler noises the small image", "unet")


@row("StableAudioPipeline")
def stable_audio() -> Tiny:
    transformer = d.StableAudioDiTModel(
        sample_size=8, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        num_key_value_attention_heads=1, out_channels=4, cross_attention_dim=16, time_proj_dim=8,
        global_states_input_dim=32, cross_attention_input_dim=16,
    )  # fmt: skip
    small = d.AutoencoderOobleck(
        encoder_hidden_size=4, downsampling_ratios=[1, 2], decoder_channels=2, decoder_input_channels=4,
        channel_multiples=[1, 2], sampling_rate=4,
    )  # fmt: skip
    scheduler = d.EDMDPMSolverMultistepScheduler(
        prediction_type="v_prediction", sigma_data=1.0, sigma_min=0.3, sigma_max=500.0, sigma_schedule="exponential"
    )
    projection = d.StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=32)
    pipe = d.StableAudioPipeline(
        vae=small, **NO_TEXT, projection_model=projection, transformer=transformer, scheduler=scheduler
    )

    def inputs(i: Indices) -> dict[str, Any]:
        return {**text(i, 8, 16), **LATENT, "audio_end_in_s": 4.0}

    exact = {"solver": "dpmpp", "solver_order": 2}
    exercises = "sound: latents of one axis, EDM times"
    return Tiny(pipe, inputs, exercises, exact=exact, layout="audio", tolerance=1e-3)


@row("StableAudio3Pipeline")
def stable_audio3() -> Tiny:
    from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder

    transformer = d.StableAudio3DiTModel(
        io_channels=4, embed_dim=16, depth=1, num_heads=2, cond_token_dim=16, global_cond_dim=16, local_add_cond_dim=5,
        timestep_features_dim=16, num_memory_tokens=2,
    )  # fmt: skip
    pipe = d.StableAudio3Pipeline(
        vae=Stub(config=Stub(sampling_rate=4, latent_dim=4), downsampling_ratio=2), **NO_TEXT, transformer=transformer,
        duration_embedder=StableAudio3DurationEmbedder(output_dim=16, fourier_dim=8), scheduler=flow_euler(),
    )  # fmt: skip

    def inputs(i: Indices) -> dict[str, Any]:
        mask = torch.ones(len(i), 8, dtype=torch.bool)
        masks = {"encoder_attention_mask": mask, "negative_encoder_attention_mask": mask}
        prompts = {"prompt_embeds": normal(i, 8, 16), "negative_prompt_embeds": normal([99] * len(i), 8, 16)}
        return {**prompts, **masks, **LATENT, "duration": 4.0, "guidance_scale": 3.0}

    return Tiny(pipe, inputs, "sound: flow latents of one axis, levels by log SNR", layout="audio")
