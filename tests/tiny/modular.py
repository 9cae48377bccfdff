"""Modular pipelines: the denoising blocks of a kind, with the components of the ordinary pipeline in another row.

Text and image encoders and decoders are blocks of their own, and left out: the call takes embeddings and gives latents.
"""

# ruff: noqa: E731  (a row's inputs are one expression with one name)
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers as d
import torch

from .flow_images import flux2, flux_text, qwen, sd3_text, z_image
from .flow_video import ltx_text, wan
from .parts import flow_euler, normal, per_mille, text
from .registry import Indices, Tiny, row
from .stable_diffusion import sdxl
from .video_recent import ltx2, video_and_sound, wan_two_experts

LATENTS: dict[str, Any] = {"output": "latents"}


def modular(blocks: str, components: dict[str, Any], without: tuple[str, ...] = ()) -> Any:
    parts = getattr(d, blocks)()
    for name in [name for name in parts.sub_blocks if name != "denoise"]:
        parts.sub_blocks.pop(name)
    prepare(parts, without)
    pipe = parts.init_pipeline()
    wanted = pipe.components.keys() & {name for name, component in components.items() if component is not None}
    pipe.update_components(**{name: components[name] for name in wanted})
    return pipe


def prepare(block: Any, without: tuple[str, ...]) -> None:
    """Leave out the blocks of these names, and the progress bar that each loop has for itself."""
    if hasattr(block, "set_progress_bar_config"):
        block.set_progress_bar_config(disable=True)
    parts = getattr(block, "sub_blocks", {})
    for name in parts.keys() & set(without):
        parts.pop(name)
    for part in parts.values():
        prepare(part, without)


def of(other: Callable[[], Tiny], blocks: str, exercises: str, without: tuple[str, ...] = (), **changes: Any) -> Tiny:
    """The row of the modular pipeline that does what an ordinary one in another row does."""
    tiny = other()

    def inputs(i: Indices) -> dict[str, Any]:
        return {k: v for k, v in tiny.inputs(i).items() if k not in ("output_type", *without)} | LATENTS

    pipe = modular(blocks, tiny.pipe.components)
    return replace(tiny, pipe=pipe, inputs=inputs, exercises=exercises, result=lambda latents: latents, **changes)


@row("FluxModularPipeline")
def flux_modular() -> Tiny:
    return of(flux_text, "FluxAutoBlocks", "blocks: packed tokens, a shift by size")


@row("Flux2ModularPipeline")
def flux2_modular() -> Tiny:
    return of(flux2, "Flux2AutoBlocks", "blocks: packed tokens of a patchified latent")


@row("StableDiffusionXLModularPipeline")
def sdxl_modular() -> Tiny:
    return of(sdxl, "StableDiffusionXLAutoBlocks", "blocks: a guider asks the network once for each branch", branches=2)


@row("StableDiffusion3ModularPipeline")
def sd3_modular() -> Tiny:
    return of(sd3_text, "StableDiffusion3AutoBlocks", "blocks: flow with a guider", branches=2)


@row("QwenImageModularPipeline")
def qwen_modular() -> Tiny:
    return of(qwen, "QwenImageAutoBlocks", "blocks: packed tokens with a guider", ("true_cfg_scale",))


@row("ZImageModularPipeline")
def z_image_modular() -> Tiny:
    return of(z_image, "ZImageAutoBlocks", "blocks: lists of samples, output negated by a block")


@row("WanModularPipeline")
def wan_modular() -> Tiny:
    return of(wan, "WanBlocks", "blocks: video")


@row("WanModularPipeline (two experts)")
def wan_modular_two_experts() -> Tiny:
    tiny = of(wan_two_experts, "Wan22Blocks", "blocks: the time decides which network and guider are asked")
    tiny.pipe.update_components(boundary_ratio=0.5)
    return tiny


@row("LTXModularPipeline")
def ltx_modular() -> Tiny:
    return of(
        ltx_text,
        "LTXAutoBlocks",
        "blocks: packed video tokens",
        branches=2,
        unlifted="nothing tells the size of its frames",
    )


@row("Flux3ModularPipeline")
def flux3_modular() -> Tiny:
    transformer = d.Flux3Transformer2DModel(
        in_channels=16, cond_in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    scheduler = flow_euler(shift=3.0)
    pipe = modular("Flux3AutoBlocks", {"transformer": transformer, "scheduler": scheduler})
    inputs = lambda i: {**text(i, 8, 16), **LATENTS, "height": 64, "width": 64}
    exercises = "blocks: packed tokens unpacked after the last step"
    return Tiny(pipe, inputs, exercises, branches=2, told=per_mille, layout="packed", result=lambda latents: latents)


@row("AnimaModularPipeline")
def anima_modular() -> Tiny:
    transformer = d.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, mlp_ratio=2,
        text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 16, 16), rope_scale=(1.0, 4.0, 4.0),
        extra_pos_embed_type=None, concat_padding_mask=False,
    )  # fmt: skip
    components = {"transformer": transformer, "scheduler": flow_euler(shift=3.0)}
    pipe = modular("AnimaAutoBlocks", components, without=("text_conditioning",))
    inputs = lambda i: {**text(i, 8, 16), **LATENTS, "height": 64, "width": 64}
    exercises = "blocks: an image of one frame"
    return Tiny(pipe, inputs, exercises, branches=2, told=per_mille, layout="video", result=lambda latents: latents)


@row("LTX25ModularPipeline")
def ltx25_modular() -> Tiny:
    def inputs(i: Indices) -> dict[str, Any]:
        arguments: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 9, "batch_size": len(i)}
        arguments["dtype"] = torch.float32
        arguments["output"] = ["latents", "audio_latents"]
        for sign, who in (("", i), ("negative_", [99] * len(i))):
            arguments[f"{sign}connector_prompt_embeds"] = normal(who, 8, 16, salt=2)
            arguments[f"{sign}connector_audio_prompt_embeds"] = normal(who, 8, 16, salt=3)
            arguments[f"{sign}connector_attention_mask"] = torch.ones(len(i), 8, dtype=torch.long)
        return arguments

    tiny = ltx2()
    pipe = modular("LTX25AutoBlocks", tiny.pipe.components)
    exercises = "blocks: sound beside video, four passes of a guider of its own"
    result = lambda output: video_and_sound([output["latents"], output["audio_latents"]])
    return replace(tiny, pipe=pipe, inputs=inputs, exercises=exercises, branches=4, result=result)
