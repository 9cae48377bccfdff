"""The two embedded pipelines: how their networks are built, what they learn, and how they become pipelines."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue] # made late
)

TOKENS, PIECES, VOCABULARY, WIDTH = 24, 28, 2000, 128
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}


class Recipe(Protocol):
    """One pipeline: the module that learns, its loss, and how it becomes a pipeline.

    Attributes:
        sizes: of the images it learns from, in pixels, the most common last.
        folder: where its tokenizers are kept.
    """

    sizes: tuple[int, ...]
    module: nn.Module

    def __init__(self, captions: Sequence[str], folder: Path, guidance_scale: float, device: torch.device) -> None: ...

    def errors(self, module: nn.Module, x: Tensor, t: Tensor, noise: Tensor, captions: Sequence[str]) -> Tensor:
        """(n,) losses of latents x at times t in (0, 1)."""
        ...

    def pipeline(self, module: Any, autoencoder: Any) -> DiffusionPipeline: ...

    def pack(self, latents: Tensor) -> Tensor: ...

    def call(self, prompts: Sequence[str], size: int) -> dict[str, Any]: ...

    def finish(self, folder: Path) -> None:
        """Complete what `save_pretrained` wrote."""
        ...


# emoji-sd


class Denoiser(nn.Module):
    """A text encoder and the network that reads it, as one module."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, latents: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(latents, t, self.text_encoder(tokens)[0]).sample.float()


class StableDiffusion(Recipe):
    """A UNet that predicts v at SD's noise levels, weighted by min(SNR, 5) / (SNR + 1)."""

    sizes = (64,)

    def __init__(self, captions: Sequence[str], folder: Path, guidance_scale: float, device: torch.device) -> None:
        self.folder, self.guidance_scale, self.device = folder, guidance_scale, device
        self.tokenizer = clip_tokenizer(captions, folder / "tokenizer")
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(48, 96, 160),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=2,  # the number of heads, in diffusers
            norm_num_groups=16,
        )
        self.module = Denoiser(clip_text_encoder(self.tokenizer, 3), unet)
        self.alpha_bar = DPMSolverMultistepScheduler(**NOISE).alphas_cumprod
        snr = self.alpha_bar / (1 - self.alpha_bar)
        self.weight = snr.clamp(max=5) / (snr + 1)

    def errors(self, module: nn.Module, x: Tensor, t: Tensor, noise: Tensor, captions: Sequence[str]) -> Tensor:
        t = (1000 * t).long()
        a = self.alpha_bar[t][:, None, None, None]
        noised, velocity = a.sqrt() * x + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x
        inputs = (noised, t, tokens_of(self.tokenizer, captions))
        output = module(*(v.to(self.device) for v in inputs)).cpu()
        return self.weight[t] * (output - velocity).square().mean((1, 2, 3))

    def pack(self, latents: Tensor) -> Tensor:
        return latents

    def call(self, prompts: Sequence[str], size: int) -> dict[str, Any]:
        return {"prompt": list(prompts), "guidance_scale": self.guidance_scale, "height": size, "width": size}

    def pipeline(self, module: Any, autoencoder: Any) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=autoencoder,
            text_encoder=module.text_encoder,
            tokenizer=self.tokenizer,
            unet=module.unet,
            scheduler=cast(Any, DPMSolverMultistepScheduler(**NOISE, steps_offset=1)),
            safety_checker=cast(Any, None),
            feature_extractor=cast(Any, None),
            requires_safety_checker=False,
        )

    def finish(self, folder: Path) -> None:
        finish_clip(folder, self.folder / "tokenizer")


# emoji-flow


class FlowDenoiser(nn.Module):
    """CLIP's pooled and T5's token embeddings, and the transformer that reads both."""

    def __init__(self, text_encoder: CLIPTextModel, text_encoder_2: T5EncoderModel, transformer: Any) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2, self.transformer = text_encoder, text_encoder_2, transformer

    def forward(self, packed: Tensor, t: Tensor, tokens: Tensor, pieces: Tensor, image_ids: Tensor) -> Tensor:
        return self.transformer(
            hidden_states=packed,
            timestep=t,
            pooled_projections=self.text_encoder(tokens).pooler_output,
            encoder_hidden_states=self.text_encoder_2(pieces)[0],
            txt_ids=torch.zeros(pieces.shape[1], 3, device=packed.device),
            img_ids=image_ids,
        ).sample.float()


class Flux(Recipe):
    """A small FLUX that predicts noise - x; t is logit-normal (SD3), shifted the more the larger the image."""

    sizes = (48, 64)

    def __init__(self, captions: Sequence[str], folder: Path, guidance_scale: float, device: torch.device) -> None:
        self.folder, self.guidance_scale, self.device = folder, guidance_scale, device
        self.tokenizer = clip_tokenizer(captions, folder / "tokenizer")
        self.tokenizer_2 = t5_tokenizer(captions, folder / "tokenizer_2")
        text = T5Config(
            vocab_size=len(self.tokenizer_2),
            d_model=WIDTH,
            d_kv=32,
            d_ff=3 * WIDTH,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=7,
            attention_head_dim=64,
            num_attention_heads=3,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(16, 24, 24),
        )
        self.module = FlowDenoiser(clip_text_encoder(self.tokenizer, 1), T5EncoderModel(text), transformer)
        self.scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=36, max_image_seq_len=64, base_shift=0.25, max_shift=0.5
        )

    def errors(self, module: nn.Module, x: Tensor, t: Tensor, noise: Tensor, captions: Sequence[str]) -> Tensor:
        side = x.shape[-1] // 2
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        shift = calculate_shift(side * side, *(self.scheduler.config[name] for name in names))
        t = torch.sigmoid(torch.special.ndtri(t.clamp(1e-4, 1 - 1e-4)) + shift)
        noised = x + t[:, None, None, None] * (noise - x)
        ids = FluxPipeline._prepare_latent_image_ids(1, side, side, self.device, torch.float32)
        inputs = (self.pack(noised), t, *(tokens_of(own, captions) for own in (self.tokenizer, self.tokenizer_2)))
        output = module(*(v.to(self.device) for v in inputs), ids).cpu()
        return (output - self.pack(noise - x)).square().mean((1, 2))

    def pack(self, latents: Tensor) -> Tensor:
        return FluxPipeline._pack_latents(latents, *latents.shape)

    def call(self, prompts: Sequence[str], size: int) -> dict[str, Any]:
        return {
            "prompt": list(prompts),
            "negative_prompt": "",
            "true_cfg_scale": self.guidance_scale,
            "height": size,
            "width": size,
            "max_sequence_length": PIECES,
        }

    def pipeline(self, module: Any, autoencoder: Any) -> FluxPipeline:
        return FluxPipeline(
            scheduler=self.scheduler,
            vae=autoencoder,
            text_encoder=module.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=module.text_encoder_2,
            tokenizer_2=self.tokenizer_2,
            transformer=module.transformer,
        )

    def finish(self, folder: Path) -> None:
        finish_clip(folder, self.folder / "tokenizer")


RECIPES: dict[str, type[Recipe]] = {"sd": StableDiffusion, "flow": Flux}


# What both share


def clip_tokenizer(captions: Sequence[str], folder: Path) -> CLIPTokenizer:
    """CLIP's byte-pair encoding, learned from the captions once: ties are broken otherwise each time."""
    if not (folder / "merges.txt").exists():
        encoding = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
        encoding.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
        words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
        encoding.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
            [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|startoftext|>", "<|endoftext|>"],
            end_of_word_suffix="</w>",
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        encoding.train_from_iterator(sorted(captions), trainer)
        folder.mkdir(parents=True, exist_ok=True)
        encoding.model.save(str(folder))
    return CLIPTokenizer.from_pretrained(folder, pad_token="<|endoftext|>", model_max_length=TOKENS)


def t5_tokenizer(captions: Sequence[str], folder: Path) -> T5TokenizerFast:
    """T5's unigram pieces, learned from the captions once."""
    if not (folder / "tokenizer.json").exists():
        pieces = Tokenizer(models.Unigram())
        pieces.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
        pieces.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
        special = ["<pad>", "</s>", "<unk>"]
        trainer = trainers.UnigramTrainer(
            vocab_size=VOCABULARY, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        pieces.train_from_iterator(sorted(captions), trainer)
        pieces.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
        T5TokenizerFast(tokenizer_object=pieces, extra_ids=0, model_max_length=PIECES).save_pretrained(folder)
    return T5TokenizerFast.from_pretrained(folder)


def tokens_of(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """(n, model_max_length) token ids."""
    return tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def clip_text_encoder(tokenizer: CLIPTokenizer, layers: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config)


def finish_clip(folder: Path, tokenizer: Path) -> None:
    """Files that transformers before 5 reads too: the vocabulary, and its names of the weights."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer / name, folder / "tokenizer" / name)
    weights = folder / "text_encoder" / "model.safetensors"
    named = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in load_file(weights).items()}
    save_file(named, weights, metadata={"format": "pt"})
