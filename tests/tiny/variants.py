"""Pipelines of other rows with something added: adapters, perturbed attention and caches of steps."""

# ruff: noqa: E731  (a row's inputs are one expression with one name)
from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers as d
import torch

from .flow_images import UncutDPMSolver, flux_text, sana_parts
from .flow_video import wan
from .others import ddim_pixels, ddpm
from .parts import LATENT, NO_TEXT, ddim, normal, text
from .registry import Tiny, row
from .stable_diffusion import sd, stable_diffusion


@row("StableDiffusionPipeline (guidance_rescale)")
def sd_rescaled() -> Tiny:
    tiny = sd()
    inputs = lambda i: {**tiny.inputs(i), "guidance_rescale": 0.7}
    return replace(tiny, inputs=inputs, exercises="the guided output rescaled for each sample")


@row("StableDiffusionPipeline (LoRA)")
def sd_lora() -> Tiny:
    from peft import LoraConfig

    tiny = sd()
    tiny.pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return replace(tiny, exercises="low-rank weights beside the network's own")


@row("StableDiffusionPipeline (IP-Adapter)")
def sd_ip_adapter() -> Tiny:
    tiny = sd()
    unet, weights = tiny.pipe.unet, {}
    generator = torch.Generator().manual_seed(6)
    rand = lambda *shape: torch.randn(shape, generator=generator) / 2
    for key, name in enumerate(n for n in unet.attn_processors if "attn2" in n):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for which in ("k", "v"):
            weights[f"{2 * key + 1}.to_{which}_ip.weight"] = rand(attention.to_k.out_features, 16)
    projection = {
        "proj.weight": rand(4 * 16, 8), "proj.bias": rand(4 * 16), "norm.weight": torch.ones(16), "norm.bias": rand(16)
    }  # fmt: skip
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}], low_cpu_mem_usage=False)

    # Negative and positive, one for all samples.
    images = torch.cat([torch.zeros(1, 1, 8), normal([0], 1, 8, salt=4)])
    inputs = lambda i: {**tiny.inputs(i), "ip_adapter_image_embeds": [images]}
    return replace(tiny, inputs=inputs, exercises="images as prompts, by attention of their own")


@row("StableDiffusionPAGPipeline")
def sd_pag() -> Tiny:
    pipe = stable_diffusion(d.StableDiffusionPAGPipeline, pag_applied_layers="mid")
    inputs = lambda i: {**text(i, 8, 16), **LATENT, "height": 32, "width": 32}
    return Tiny(pipe, inputs, "a third branch, of perturbed attention", "unet")


@row("SanaPAGPipeline")
def sana_pag() -> Tiny:
    pipe = d.SanaPAGPipeline(**sana_parts(), **NO_TEXT)
    inputs = lambda i: {
        **text(i, 8, 8, mask=True),
        **LATENT,
        "height": 256,
        "width": 256,
        "use_resolution_binning": False,
        "negative_prompt": None,
    }
    exact = {"solver": "dpmpp", "solver_order": 2}
    return Tiny(pipe, inputs, "flow with a branch of perturbed attention", exact=exact, twin=UncutDPMSolver)


def cached(tiny: Tiny, config: Any, exercises: str) -> Tiny:
    tiny.pipe.transformer.enable_cache(config)
    return replace(tiny, exercises=exercises)


@row("FluxPipeline (FirstBlockCache)")
def flux_first_block() -> Tiny:
    # A threshold that is always met: what is cached depends on no sample.
    return cached(flux_text(), d.FirstBlockCacheConfig(threshold=1e9), "blocks after the first one asked once")


@row("FluxPipeline (TaylorSeer)")
def flux_taylor() -> Tiny:
    config = d.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1)
    return cached(flux_text(), config, "features extrapolated in the steps between")


@row("WanPipeline (PyramidAttentionBroadcast)")
def wan_pyramid() -> Tiny:
    tiny = wan()
    config = d.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, cross_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900), cross_attention_timestep_skip_range=(100, 900),
        current_timestep_callback=lambda: tiny.pipe.current_timestep,
    )  # fmt: skip
    return cached(tiny, config, "attention kept within a range of timesteps")


@row("DDIMPipeline (clip_sample)")
def ddim_clipped() -> Tiny:
    tiny = ddim_pixels()
    tiny.pipe.scheduler = ddim(clip_sample=True)
    inputs = lambda i: {**tiny.inputs(i), "use_clipped_model_output": True}
    return replace(tiny, inputs=inputs, exercises="each estimate of the image is clipped to its range")


@row("DDPMPipeline (thresholding)")
def ddpm_thresholded() -> Tiny:
    scheduler = d.DPMSolverMultistepScheduler(thresholding=True)
    tiny = ddpm()
    tiny.pipe.scheduler = scheduler
    exercises = "each estimate of the image is divided by its own percentile"
    return replace(tiny, exercises=exercises, exact={"solver": "dpmpp", "solver_order": 2}, twin=None)
