"""Pipelines whose learning is measured: of real size with random weights, and the small ones that ship.

Time and memory do not depend on what the weights are, nor on whose prompts the embeddings are. So nothing is
downloaded: networks are made from their published configurations, without text encoders and autoencoders.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..pipelines.rollout import Inputs, load_pipeline

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@dataclass(frozen=True, kw_only=True)
class Network(ABC):
    """A pipeline to measure, and how it is called.

    Attributes:
        parameters: of its network, about.
        call: arguments of the pipeline's call, the same for all samples.
        size: height and width of what is sampled, in pixels.
        dtype: of the weights on an accelerator; float32 on CPUs.
        layout: of the latents, for SpanLift.
    """

    parameters: float
    call: Mapping[str, Any]
    size: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16
    layout: str = "image"

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """Of the weights there."""
        return torch.float32 if device.type == "cpu" else self.dtype

    @abstractmethod
    def build(self, device: torch.device) -> Any:
        """The pipeline, on the device."""

    @abstractmethod
    def inputs(self, pipe: Any, count: int) -> Inputs:
        """Each sample's own arguments of the call."""


@dataclass(frozen=True, kw_only=True)
class Saved(Network):
    """A pipeline that was saved.

    Attributes:
        folder: where it lies.
        prompt: of all samples.
    """

    folder: Path
    prompt: str

    def build(self, device: torch.device) -> Any:
        if not self.folder.exists():
            raise FileNotFoundError(f"{self.folder} is not here: run in a clone of the repository.")
        return load_pipeline(str(self.folder), self.dtype_on(device), device)

    def inputs(self, pipe: Any, count: int) -> Inputs:
        return [{"prompt": self.prompt} for _ in range(count)]


@dataclass(frozen=True, kw_only=True)
class Random(Network):
    """A published network with random weights, in a pipeline that has no other parts.

    Attributes:
        pipeline, network, scheduler: names of diffusers' classes, the latter two with their configurations.
        options: further arguments of the pipeline's class.
        embeddings: shapes of what stands for one prompt, by argument; a mask is of ones.
        guided: negative embeddings are given too.
    """

    pipeline: str
    network: tuple[str, Mapping[str, Any]]
    scheduler: tuple[str, Mapping[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    embeddings: Mapping[str, tuple[int, ...]]
    guided: bool = True

    def weights(self, device: torch.device) -> Any:
        """The network alone; on "meta" it takes no memory.

        Each layer draws its own weights where and as they stay. Layers do so by their number of inputs, which keeps
        what passes through them finite.
        """
        name, config = self.network
        dtype = self.dtype_on(device)
        with torch.device(device), _default_dtype(dtype):
            made = getattr(diffusers, name)(**config)
        # As in a pipeline that was loaded in this dtype.
        kept = {*(type(made)._keep_in_fp32_modules or ())} if dtype == self.dtype else set()
        for path, parameter in made.named_parameters():
            if kept.intersection(path.split(".")):
                parameter.data = parameter.data.float()
        return made.eval()

    def build(self, device: torch.device) -> Any:
        kind, (name, config) = getattr(diffusers, self.pipeline), self.scheduler
        parts = {"scheduler": getattr(diffusers, name)(**config), **self.options}
        made = self.weights(device)
        parts["unet" if "UNet" in self.network[0] else "transformer"] = made
        known = inspect.signature(kind.__init__).parameters.values()
        absent = {p.name for p in known if p.default is p.empty and p.name != "self"} - parts.keys()
        pipe = kind(**parts, **dict.fromkeys(absent))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def inputs(self, pipe: Any, count: int) -> Inputs:
        made = next(m for m in (getattr(pipe, "unet", None), getattr(pipe, "transformer", None)) if m is not None)
        place = {"device": made.device, "dtype": self.dtype_on(made.device)}

        def of_one() -> dict[str, Any]:
            names = [prefix + name for prefix in ("", "negative_")[: 1 + self.guided] for name in self.embeddings]
            shapes = {name: (1, *self.embeddings[name.removeprefix("negative_")]) for name in names}
            return {
                name: torch.ones(shape, device=made.device, dtype=torch.long)
                if name.endswith("mask")
                else torch.randn(shape, **place)
                for name, shape in shapes.items()
            }

        return [of_one() for _ in range(count)]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
_AT_512: dict[str, Any] = {"height": 512, "width": 512}


def _sana(parameters: float, layers: int, heads: int, cross_heads: int, cross_head_dim: int) -> Random:
    config = {"num_layers": layers, "num_attention_heads": heads, "sample_size": 16}  # the 512 x 512 models
    config |= {"num_cross_attention_heads": cross_heads, "cross_attention_head_dim": cross_head_dim}
    return Random(
        pipeline="SanaPipeline",
        network=("SanaTransformer2DModel", config | {"cross_attention_dim": cross_heads * cross_head_dim}),
        scheduler=("DPMSolverMultistepScheduler", _FLOW),
        embeddings={"prompt_embeds": (300, 2304), "prompt_attention_mask": (300,)},
        call={**_AT_512, "guidance_scale": 4.5, "negative_prompt": None, "use_resolution_binning": False},
        size=(512, 512),
        parameters=parameters,
    )


NETWORKS: dict[str, Network] = {
    "emoji-sd": Saved(
        folder=EXAMPLES / "emoji-sd",
        prompt="red heart",
        call={"guidance_scale": 4.0},
        size=(64, 64),
        dtype=torch.float32,
        parameters=7.1e6,
    ),
    "emoji-flow": Saved(
        folder=EXAMPLES / "emoji-flow",
        prompt="red heart",
        call={"height": 64, "width": 64, "max_sequence_length": 28},
        size=(64, 64),
        dtype=torch.float32,
        layout="packed",
        parameters=6.8e6,
    ),
    "sd15": Random(
        pipeline="StableDiffusionPipeline",
        network=("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}),
        scheduler=(
            "PNDMScheduler",
            {**_BETAS, "skip_prk_steps": True, "set_alpha_to_one": False},
        ),
        options={"requires_safety_checker": False},
        embeddings={"prompt_embeds": (77, 768)},
        call={**_AT_512, "guidance_scale": 7.5},
        size=(512, 512),
        dtype=torch.float16,
        parameters=0.86e9,
    ),
    "sdxl": Random(
        pipeline="StableDiffusionXLPipeline",
        network=(
            "UNet2DConditionModel",
            {
                "sample_size": 128,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "block_out_channels": (320, 640, 1280),
                "transformer_layers_per_block": (1, 2, 10),
                "attention_head_dim": (5, 10, 20),
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
        ),
        scheduler=("EulerDiscreteScheduler", {**_BETAS, "timestep_spacing": "leading"}),
        options={"add_watermarker": False},
        embeddings={"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,)},
        call={**_AT_512, "guidance_scale": 5.0},
        size=(512, 512),
        dtype=torch.float16,
        parameters=2.57e9,
    ),
    "sana-0.6b": _sana(0.59e9, layers=28, heads=36, cross_heads=16, cross_head_dim=72),
    "sana-1.6b": _sana(1.60e9, layers=20, heads=70, cross_heads=20, cross_head_dim=112),
    "wan-1.3b": Random(
        pipeline="WanPipeline",
        network=("WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
        scheduler=("UniPCMultistepScheduler", _FLOW),
        embeddings={"prompt_embeds": (512, 4096)},
        call={**_AT_512, "num_frames": 1, "guidance_scale": 5.0},
        size=(512, 512),
        layout="video",
        parameters=1.42e9,
    ),
    "flux-dev": Random(
        pipeline="FluxPipeline",
        network=("FluxTransformer2DModel", {"guidance_embeds": True}),
        scheduler=(
            "FlowMatchEulerDiscreteScheduler",
            {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
        ),
        embeddings={"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)},
        guided=False,  # by a number that the network is told
        call={**_AT_512, "guidance_scale": 3.5},
        size=(512, 512),
        layout="packed",
        parameters=11.9e9,
    ),
}
EMBEDDED = tuple(name for name, network in NETWORKS.items() if isinstance(network, Saved))
REAL = tuple(name for name in NETWORKS if name not in EMBEDDED)
