"""Inputs of a call, and components that several rows have."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch
from torch import Tensor

from .registry import Indices


def normal(indices: Indices, *shape: int, salt: int = 0) -> Tensor:
    """One standard normal tensor per sample, a function of the sample's index alone."""
    make = [torch.randn(shape, generator=torch.Generator().manual_seed(97 * i + salt)) for i in indices]
    return torch.stack(make)


def images(indices: Indices, size: int = 32, *, channels: int = 3) -> Tensor:
    return normal(indices, channels, size, size, salt=1).sigmoid()


def masks(indices: Indices, size: int = 32) -> Tensor:
    """The left half is kept, the right half painted."""
    return torch.cat([torch.zeros(size, size // 2), torch.ones(size, size // 2)], 1).expand(len(indices), 1, -1, -1)


def text(indices: Indices, length: int, width: int, *, pooled: int = 0, mask: bool = False) -> dict[str, Tensor]:
    """Embeddings of a prompt per sample and of one negative prompt for all."""
    result: dict[str, Tensor] = {}
    for prefix, who in (("", indices), ("negative_", [99] * len(indices))):
        result[prefix + "prompt_embeds"] = normal(who, length, width, salt=2)
        if pooled:
            result[prefix + "pooled_prompt_embeds"] = normal(who, pooled, salt=3)
        if mask:
            result[prefix + "prompt_attention_mask"] = torch.ones(len(indices), length, dtype=torch.long)
    return result


def positive(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in arguments.items() if not k.startswith("negative_")}


def vae(**changes: Any) -> d.AutoencoderKL:
    """4 latent channels, half the resolution."""
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 8),
        "norm_num_groups": 2,
        "sample_size": 32,
        "shift_factor": 0.1,
    }
    return d.AutoencoderKL(**(blocks | changes))


UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
}
UP = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
NO_TEXT: dict[str, None] = {"text_encoder": None, "tokenizer": None}
NO_TEXT_2: dict[str, None] = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None}
NO_TEXT_3: dict[str, None] = {**NO_TEXT_2, "text_encoder_3": None, "tokenizer_3": None}
LATENT: dict[str, Any] = {"output_type": "latent"}


def ddim(**changes: Any) -> d.DDIMScheduler:
    return d.DDIMScheduler(
        **({"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "leading"} | changes)
    )


def sd_betas() -> dict[str, Any]:
    return {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def flow_euler(**changes: Any) -> d.FlowMatchEulerDiscreteScheduler:
    return d.FlowMatchEulerDiscreteScheduler(**changes)


def per_mille(t: Tensor) -> Tensor:
    return t / 1000


class Stub:
    """A component of which a pipeline reads no more than these attributes."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)
