"""Pipelines whose schedulers integrate no ODE that a solver here could take over, and that must therefore be refused.

``REFUSED`` maps a row's name to its builder and to what the error has to say.
"""

# ruff: noqa: E731  (a row's inputs are one expression with one name)
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers as d
import torch

from .flow_images import sana_parts
from .flow_video import WAN, ltx_text, wan_inputs
from .modular import LATENTS, modular
from .others import pixel_unet
from .parts import LATENT, NO_TEXT, UNET, UP, Stub, flow_euler, normal, positive, sd_betas, text, vae
from .registry import Indices, Tiny
from .stable_diffusion import sd
from .video_recent import kandinsky6

REFUSED: dict[str, tuple[Callable[[], Tiny], str]] = {}


def refused(name: str, reason: str) -> Callable[[Callable[[], Tiny]], Callable[[], Tiny]]:
    """Register a builder under a diffusers class name, with an optional variant after a space."""

    def register(builder: Callable[[], Tiny]) -> Callable[[], Tiny]:
        REFUSED[name] = builder, reason
        return builder

    return register


def loaded(kind: Any, **settings: Any) -> Any:
    """As from a file: only then a configuration says which class it is of."""
    return kind.from_config({"_class_name": kind.__name__, **settings})


def scheduled(tiny: Tiny, scheduler: Any, exercises: str) -> Tiny:
    """A pipeline of another row that came with this scheduler instead."""
    tiny.pipe.scheduler = scheduler
    return replace(tiny, exercises=exercises)


# ------------------------------------------------------------------------------------------ jumps to the end and back


@refused("LatentConsistencyModelPipeline", "LCMScheduler|original_inference_steps")
def lcm() -> Tiny:
    pipe = d.LatentConsistencyModelPipeline(
        vae=vae(), unet=d.UNet2DConditionModel(**UNET, **UP, time_cond_proj_dim=16), scheduler=loaded(d.LCMScheduler),
        **NO_TEXT, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    inputs = lambda i: {**positive(text(i, 8, 16)), **LATENT, "height": 32, "width": 32}
    return Tiny(pipe, inputs, "a consistency model: each step jumps to the data and noises again", "unet")


@refused("StableDiffusionPipeline (LCMScheduler)", "LCMScheduler")
def sd_lcm() -> Tiny:
    return scheduled(sd(), loaded(d.LCMScheduler, **sd_betas()), "a consistency model by its LoRA")


@refused("StableDiffusionPipeline (TCDScheduler)", "TCDScheduler")
def sd_tcd() -> Tiny:
    return scheduled(sd(), loaded(d.TCDScheduler, **sd_betas()), "trajectory consistency: jumps by its own formula")


@refused("ConsistencyModelPipeline", "CMStochasticIterativeScheduler")
def consistency_model() -> Tiny:
    pipe = d.ConsistencyModelPipeline(unet=pixel_unet(), scheduler=loaded(d.CMStochasticIterativeScheduler))
    inputs = lambda i: {"batch_size": len(i), "output_type": "np"}
    return Tiny(pipe, inputs, "a consistency model of pixels", "unet", channels=3)


@refused("SanaSprintPipeline", "SCMScheduler|max_timesteps")
def sana_sprint() -> Tiny:
    parts = sana_parts(guidance_embeds=True) | {"scheduler": loaded(d.SCMScheduler)}
    inputs = lambda i: {
        **positive(text(i, 8, 8, mask=True)),
        **LATENT,
        "height": 256,
        "width": 256,
        "use_resolution_binning": False,
        "intermediate_timesteps": None,
    }
    return Tiny(d.SanaSprintPipeline(**parts, **NO_TEXT), inputs, "a consistency model in angles")


@refused("AnyFlowPipeline", "FlowMapEulerDiscreteScheduler")
def anyflow() -> Tiny:
    transformer = d.AnyFlowTransformer3DModel(**WAN)
    pipe = d.AnyFlowPipeline(
        vae=None, scheduler=loaded(d.FlowMapEulerDiscreteScheduler), transformer=transformer, **NO_TEXT
    )
    inputs = lambda i: positive(wan_inputs(i))
    return Tiny(pipe, inputs, "a flow map: the network is told where the step ends", layout="video")


@refused("LTXPipeline (FlowMatchLCMScheduler)", "FlowMatchLCM")
def ltx_lcm() -> Tiny:
    return scheduled(ltx_text(), loaded(d.FlowMatchLCMScheduler), "a consistency model of flow")


@refused("Kandinsky6TI2VAPipeline (PiflowScheduler)", "Piflow")
def kandinsky6_piflow() -> Tiny:
    tiny = kandinsky6(10 * 4, sample_audio=False, guidance_scale=1.0)("")
    scheduler = loaded(d.PiflowScheduler, n_grid=10)
    return scheduled(tiny, scheduler, "the network predicts a policy of many small steps")


# -------------------------------------------------------------------------------------------------- other equations


@refused("StableCascadeDecoderPipeline", "DDPMWuerstchenScheduler")
def stable_cascade() -> Tiny:
    unet = d.StableCascadeUNet(
        in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, patch_size=2, conditioning_dim=8,
        block_out_channels=(8, 16), num_attention_heads=(-1, 2), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), clip_text_pooled_in_channels=8, effnet_in_channels=4, dropout=(0.0, 0.0),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
    )  # fmt: skip
    pipe = d.StableCascadeDecoderPipeline(
        decoder=unet, **NO_TEXT, scheduler=loaded(d.DDPMWuerstchenScheduler), vqgan=None, latent_dim_scale=4.0
    )

    def inputs(i: Indices) -> dict[str, Any]:
        prompts = {"prompt_embeds": normal(i, 8, 8), "prompt_embeds_pooled": normal(i, 1, 8)}
        return {**prompts, **LATENT, "image_embeddings": normal(i, 4, 4, 4)}

    return Tiny(pipe, inputs, "times from 1 to 0, noise added at each step", "decoder")


@refused("StableDiffusionLatentUpscalePipeline", "original_sample")
def latent_upscale() -> Tiny:
    unet = d.UNet2DConditionModel(**UNET, **UP, in_channels=8, out_channels=5, time_cond_proj_dim=64 + 64 + 16)
    scheduler = loaded(d.EulerDiscreteScheduler, **sd_betas(), prediction_type="original_sample")
    pipe = d.StableDiffusionLatentUpscalePipeline(vae=vae(), unet=unet, scheduler=scheduler, **NO_TEXT)

    def inputs(i: Indices) -> dict[str, Any]:
        arguments = text(i, 8, 16, pooled=16)
        arguments["negative_pooled_prompt_embeds"] = normal([99] * len(i), 16, salt=3)
        return {**arguments, **LATENT, "image": normal(i, 4, 8, 8, salt=1)}

    return Tiny(pipe, inputs, "preconditions by scheduler.sigmas itself", "unet")


@refused("Cosmos2TextToImagePipeline", "sigma_max|sigmas|Cosmos|Karras|karras")
def cosmos2() -> Tiny:
    transformer = d.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, mlp_ratio=2,
        text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 16, 16), rope_scale=(1.0, 4.0, 4.0),
        extra_pos_embed_type=None, concat_padding_mask=False,
    )  # fmt: skip
    scheduler = loaded(d.FlowMatchEulerDiscreteScheduler, use_karras_sigmas=True)
    pipe = d.Cosmos2TextToImagePipeline(
        **NO_TEXT, transformer=transformer, vae=None, scheduler=scheduler, safety_checker=Stub(to=lambda *a: None)
    )
    inputs = lambda i: {**text(i, 8, 16), **LATENT, "height": 64, "width": 64}
    return Tiny(pipe, inputs, "levels above 1 in a flow scheduler, preconditioned by the pipeline", layout="video")


# --------------------------------------------------------------------------------------------- times apart from levels


@refused("CogView4Pipeline", "CogView4")
def cogview4() -> Tiny:
    transformer = d.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, text_embed_dim=16,
        time_embed_dim=16, condition_dim=8, sample_size=16, rope_axes_dim=(16, 16),
    )  # fmt: skip
    scheduler = flow_euler(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear")
    pipe = d.CogView4Pipeline(vae=vae(), transformer=transformer, scheduler=scheduler, **NO_TEXT)
    inputs = lambda i: {**text(i, 16, 16), **LATENT, "height": 32, "width": 32}
    return Tiny(pipe, inputs, "times that are not shifted beside levels that are")


@refused("GlmImagePipeline", "CogView4")
def glm_image() -> Tiny:
    transformer = d.GlmImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, text_embed_dim=16,
        time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=16,
    )  # fmt: skip
    scheduler = flow_euler(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear")
    pipe = d.GlmImagePipeline(
        **NO_TEXT, processor=None, vision_language_encoder=None, vae=vae(), transformer=transformer, scheduler=scheduler
    )

    def inputs(i: Indices) -> dict[str, Any]:
        tokens = torch.zeros(len(i), 8 * 8, dtype=torch.long)
        return {**text(i, 8, 16), **LATENT, "height": 32, "width": 32, "prior_token_ids": tokens}

    return Tiny(pipe, inputs, "times that are not shifted beside levels that are")


# ------------------------------------------------------------------------------------ another convention of a network


@refused("MiniMaxH3ModularPipeline", "MiniMaxH3Scheduler")
def minimax_h3() -> Tiny:
    transformer = d.MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=16, hidden_size=16, num_layers=1, num_refiner_layers=1, ffn_dim=16,
        text_dim=8, freq_dim=16, time_embed_hidden_dim=16, time_embed_dim=16, rope_freq_dim=2,
    )  # fmt: skip
    schedulers = {"scheduler": loaded(d.MiniMaxH3Scheduler), "audio_scheduler": d.MiniMaxH3Scheduler(shift=3.0)}
    pipe = modular("MiniMaxH3Blocks", {"transformer": transformer, **schedulers})
    inputs = lambda i: {
        **LATENTS,
        "prompt_embeds": normal(i, 8, 8),
        "text_token_tags": torch.ones(8, dtype=torch.long),
        "height": 32,
        "width": 32,
        "num_frames": 124,
    }
    exercises = "a flow whose velocity points to the data, told in times from 0 to 1; video and sound in one network"
    return Tiny(pipe, inputs, exercises, result=lambda latents: latents, layout="packed_video")
