"""Tiny, randomly initialised pipelines of real diffusers classes: every network a few kilobytes, no download.

``PIPELINES`` maps a row's name to its builder; ``build`` caches what it makes. Text encoders are left out wherever a
pipeline takes embeddings: a scheduler never sees them.
"""

# ruff: noqa: E731  (a row's inputs are one expression with one name)
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers as d
import torch
from torch import Tensor, nn

import dywspan

Indices = Sequence[int]


@dataclass(frozen=True, eq=False)
class Tiny:
    """A pipeline and how to call it.

    Attributes:
        inputs: call arguments of the given samples; sample i is the same whichever batch it stands in.
        exercises: what this row has that others have not.
        denoiser: the component that is asked once per step and guidance branch.
        steps: num_inference_steps.
        seen: which of ``scheduler.timesteps`` are visited (img2img skips the first).
        branches: denoiser calls per step (guidance in separate calls).
        told: from a scheduler timestep to what the network is told.
        exact: the classical solver that equals the pipeline's own scheduler.
        twin: stand-in for the own scheduler, where that one adds noise or cuts times to integers.
        raw_noise: the pipeline never multiplies its noise by ``init_noise_sigma``.
        layout: of the sample in ``step``, and channels: of its latent; see ``dywspan.core.layout``.
        tolerance: how far two float32 ways to the same result may be apart, in units of the result's largest value.
    """

    pipe: Any
    inputs: Callable[[Indices], dict[str, Any]]
    exercises: str
    denoiser: str = "transformer"
    steps: int = 3
    seen: Callable[[Tensor], Tensor] = lambda t: t
    branches: int = 1
    told: Callable[[Tensor], Tensor] = lambda t: t
    exact: dict[str, Any] = field(default_factory=lambda: {"solver": "euler"})
    twin: type | None = None
    raw_noise: bool = False
    layout: str = "image"
    channels: int = 4
    tolerance: float = 1e-4

    @property
    def flow(self) -> bool:
        config = self.pipe.scheduler.config
        return "FlowMatch" in type(self.pipe.scheduler).__name__ or bool(config.get("use_flow_sigmas"))


@dataclass(eq=False)
class Trace:
    """What one call did: the solver's inputs and outputs, what it noised, and the times the denoiser was told."""

    output: Tensor = field(default_factory=lambda: torch.empty(0))
    timesteps: Tensor = field(default_factory=lambda: torch.empty(0))
    steps: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # model_output, sample, prev_sample
    noised: list[tuple[float, Tensor, Tensor, Tensor]] = field(default_factory=list)  # timestep, clean, noise, result
    told: list[Tensor] = field(default_factory=list)


PIPELINES: dict[str, Callable[[], Tiny]] = {}


def row(name: str) -> Callable[[Callable[[], Tiny]], Callable[[], Tiny]]:
    """Register a builder under a diffusers class name, with an optional variant after a space."""

    def register(builder: Callable[[], Tiny]) -> Callable[[], Tiny]:
        PIPELINES[name] = builder
        return builder

    return register


def available(name: str) -> bool:
    """Whether the installed diffusers has the class already, and transformers what it needs."""
    try:
        return hasattr(d, name.split()[0])
    except RuntimeError:
        return False


@functools.cache
def build(name: str) -> Tiny:
    torch.manual_seed(0)
    tiny = PIPELINES[name]()
    for component in tiny.pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
    awaken(getattr(tiny.pipe, tiny.denoiser))
    tiny.pipe.set_progress_bar_config(disable=True)
    return tiny


def awaken(module: nn.Module) -> None:
    """Fill what was initialised with zeros: a network that answers 0 tests no solver."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.3)


def run(tiny: Tiny, scheduler: Any, indices: Indices, **overrides: Any) -> Trace:
    """Call the pipeline with ``scheduler`` in place of its own; sample i has a noise generator of its own."""
    pipe = tiny.pipe
    own, pipe.scheduler = pipe.scheduler, scheduler
    generators = [torch.Generator().manual_seed(1000 + i) for i in indices]
    arguments = {"num_inference_steps": tiny.steps, "generator": generators, **tiny.inputs(indices), **overrides}
    trace = Trace()
    try:
        with _listening(getattr(pipe, tiny.denoiser), scheduler, trace):
            trace.output = torch.as_tensor(pipe(**arguments)[0])
    finally:
        pipe.scheduler = own
    trace.timesteps = scheduler.timesteps
    return trace


@contextmanager
def _listening(denoiser: nn.Module, scheduler: Any, trace: Trace) -> Iterator[None]:
    solve, noise_up = scheduler.step, getattr(scheduler, "add_noise", None)

    @functools.wraps(solve)  # pipelines look at the signature of step
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = solve(model_output, timestep, sample, *args, **kwargs)
        turned = kwargs.get("per_token_timesteps") is not None
        trace.steps.append((-model_output if turned else model_output, sample, result[0]))
        return result

    def add_noise(original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        result = noise_up(original_samples, noise, timesteps)
        trace.noised.append((float(timesteps.reshape(-1)[0]), original_samples, noise, result))
        return result

    def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # UNets, HunyuanDiT and Z-Image take the time as their second positional argument.
        time = next((kwargs[k] for k in ("timestep", "timesteps", "t") if k in kwargs), args[1] if args[1:] else None)
        trace.told.append(torch.as_tensor(time).detach().reshape(-1)[-1:].double())

    scheduler.step = step
    if noise_up is not None:
        scheduler.add_noise = add_noise
    handle = denoiser.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        vars(scheduler).pop("step")
        vars(scheduler).pop("add_noise", None)


# ---------------------------------------------------------------------------------------------------------- inputs


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


# ---------------------------------------------------------------------------------------------------- shared parts


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


# ------------------------------------------------------------------------------------------------ Stable Diffusion


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


# -------------------------------------------------------------------------------------------------- flow, images


def sd3(pipeline: type) -> Any:
    transformer = d.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=16,
    )  # fmt: skip
    return pipeline(transformer=transformer, scheduler=flow_euler(shift=3.0), vae=vae(), **NO_TEXT_3)


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


def per_mille(t: Tensor) -> Tensor:
    return t / 1000


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


@row("Flux2Pipeline")
def flux2() -> Tiny:
    transformer = d.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    small = d.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, layers_per_block=1,
    )  # fmt: skip
    scheduler = flow_euler(use_dynamic_shifting=True, shift=3.0)
    pipe = d.Flux2Pipeline(scheduler=scheduler, vae=small, transformer=transformer, **NO_TEXT)
    inputs = lambda i: {"prompt_embeds": normal(i, 8, 16), **LATENT, "height": 32, "width": 32}
    exercises = "packed tokens of a patchified latent, empirical mu"
    return Tiny(pipe, inputs, exercises, told=per_mille, layout="packed")


@row("ChromaPipeline")
def chroma() -> Tiny:
    transformer = d.ChromaTransformer2DModel(
        **FLUX, in_channels=16, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1
    )
    pipe = d.ChromaPipeline(
        scheduler=flow_euler(use_dynamic_shifting=True), vae=vae(), transformer=transformer, **NO_TEXT
    )

    def inputs(i: Indices) -> dict[str, Any]:
        arguments = text(i, 8, 16, mask=True)
        floats = {k: v.float() for k, v in arguments.items()}  # its attention takes masks as numbers
        return {**floats, **LATENT, "height": 32, "width": 32}

    exercises = "Flux layout with true guidance in two calls"
    return Tiny(pipe, inputs, exercises, branches=2, told=per_mille, layout="packed")


class UncutDPMSolver(d.DPMSolverMultistepScheduler):
    """Tells a flow network 1000 * sigma; diffusers' class cuts this to an integer."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps


@row("SanaPipeline")
def sana() -> Tiny:
    transformer = d.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=8,
    )  # fmt: skip
    scheduler = d.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    pipe = d.SanaPipeline(vae=None, transformer=transformer, scheduler=scheduler, **NO_TEXT)
    inputs = lambda i: {
        **text(i, 8, 8, mask=True),
        **LATENT,
        "height": 256,
        "width": 256,
        "use_resolution_binning": False,
        "negative_prompt": None,
    }
    exact = {"solver": "dpmpp", "order": 2}
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
    exact = {"solver": "dpmpp", "order": 2}
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


# ------------------------------------------------------------------------------------------------------ flow, video


WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16,
    "out_channels": 16, "text_dim": 16, "freq_dim": 16, "ffn_dim": 16, "num_layers": 1, "rope_max_seq_len": 32,
}  # fmt: skip


@row("WanPipeline")
def wan() -> Tiny:
    transformer = d.WanTransformer3DModel(**WAN)
    pipe = d.WanPipeline(vae=None, scheduler=flow_euler(shift=5.0), transformer=transformer, **NO_TEXT)
    inputs = lambda i: {**text(i, 8, 16), **LATENT, "height": 32, "width": 32, "num_frames": 5}
    exercises = "video, reads scheduler.sigmas, guidance in two calls"
    return Tiny(pipe, inputs, exercises, branches=2, layout="video", channels=16)


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


# ------------------------------------------------------------------------------------- variance preserving, others


@row("CogVideoXPipeline")
def cogvideox() -> Tiny:
    transformer = d.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=1, sample_width=4, sample_height=4, sample_frames=5, max_text_seq_length=8,
    )  # fmt: skip
    scheduler = d.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0, timestep_spacing="trailing",
        clip_sample=False,
    )  # fmt: skip
    pipe = d.CogVideoXPipeline(vae=None, transformer=transformer, scheduler=scheduler, **NO_TEXT)
    inputs = lambda i: {
        **text(i, 8, 16),
        **LATENT,
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "max_sequence_length": 8,
    }
    # DDIM starts at an infinite sigma, a table at 2^12, the floor of diffusers' DPM-Solver.
    exercises = "v-prediction at zero terminal SNR, frames before channels"
    return Tiny(pipe, inputs, exercises, layout="video_frames_first", tolerance=1e-3)


@row("HunyuanDiTPipeline")
def hunyuan_dit() -> Tiny:
    transformer = d.HunyuanDiT2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=8, hidden_size=16, text_len=8,
        text_len_t5=8,
    )  # fmt: skip
    pipe = d.HunyuanDiTPipeline(
        vae=None, transformer=transformer, **NO_TEXT_2, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
        scheduler=ddim(beta_start=0.00085, beta_end=0.03, prediction_type="v_prediction", steps_offset=1),
    )  # fmt: skip

    def inputs(i: Indices) -> dict[str, Any]:
        one = text(i, 8, 16, mask=True)
        two = {f"{k}_2": v for k, v in text([9 + k for k in i], 8, 16, mask=True).items()}
        return {**one, **two, **LATENT, "height": 128, "width": 128, "use_resolution_binning": False}

    return Tiny(pipe, inputs, "v-prediction, learned variance cut off, times rebuilt from numbers")


def pixel_unet() -> d.UNet2DModel:
    return d.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


@row("DDPMPipeline")
def ddpm() -> Tiny:
    pipe = d.DDPMPipeline(unet=pixel_unet(), scheduler=d.DDPMScheduler(clip_sample=False))
    inputs = lambda i: {"batch_size": len(i), "output_type": "np"}
    return Tiny(
        pipe,
        inputs,
        "pixels, noise never scaled, own scheduler stochastic",
        "unet",
        twin=d.DDIMScheduler,
        raw_noise=True,
        channels=3,
    )


@row("DDIMPipeline")
def ddim_pixels() -> Tiny:
    pipe = d.DDIMPipeline(unet=pixel_unet(), scheduler=ddim())
    inputs = lambda i: {"batch_size": len(i), "output_type": "np"}
    exercises = "pixels, passes eta and use_clipped_model_output to step"
    return Tiny(pipe, inputs, exercises, "unet", raw_noise=True, channels=3)


@row("DiTPipeline")
def dit() -> Tiny:
    transformer = d.DiTTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    pipe = d.DiTPipeline(transformer=transformer, vae=vae(), scheduler=ddim())
    inputs = lambda i: {"class_labels": [3 + k for k in i], "output_type": "np"}
    return Tiny(pipe, inputs, "class labels, batch doubled for guidance throughout", raw_noise=True)
