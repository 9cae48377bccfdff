"""Flow networks that make images: those of 2025 and 2026, and guided ways of calling older ones."""

# ruff: noqa: E731  (a row's inputs are one expression with one name)
from __future__ import annotations

from typing import Any
from unittest.mock import patch

import diffusers as d
import torch

from .flow_images import CHROMA, chroma_inputs, chroma_parts, flux, flux2_parts, flux_inputs, sd3
from .parts import LATENT, NO_TEXT, Stub, flow_euler, images, masks, normal, per_mille, text, vae
from .registry import Indices, Tiny, awaken, row


@row("StableDiffusion3InpaintPipeline")
def sd3_inpaint() -> Tiny:
    inputs = lambda i: {
        **text(i, 8, 16, pooled=16),
        **LATENT,
        "height": 32,
        "width": 32,
        "image": images(i),
        "mask_image": masks(i),
        "strength": 0.5,
    }
    pipe = sd3(d.StableDiffusion3InpaintPipeline, channels=16)
    return Tiny(pipe, inputs, "known region noised again by scale_noise", steps=4, seen=lambda t: t[2:], channels=16)


@row("FluxInpaintPipeline")
def flux_inpaint() -> Tiny:
    inputs = lambda i: {**flux_inputs(i), "image": images(i), "mask_image": masks(i), "strength": 0.5}
    exercises = "packed inpainting from the middle of the table"
    pipe = flux(d.FluxInpaintPipeline)
    return Tiny(pipe, inputs, exercises, steps=4, seen=lambda t: t[2:], told=per_mille, layout="packed")


@row("Flux2KleinPipeline")
def flux2_klein() -> Tiny:
    pipe = d.Flux2KleinPipeline(**flux2_parts(guidance_embeds=False))
    inputs = lambda i: {
        "prompt_embeds": normal(i, 8, 16),
        "negative_prompt_embeds": normal([99] * len(i), 8, 16),
        **LATENT,
        "height": 32,
        "width": 32,
    }
    exercises = "Flux2 with true guidance in two calls"
    return Tiny(pipe, inputs, exercises, branches=2, told=per_mille, layout="packed")


def masked(i: Indices, *shape: int, length: int = 8) -> dict[str, Any]:
    """Embeddings with a mask that says all tokens are there."""
    ones = {f"{sign}prompt_embeds_mask": torch.ones(len(i), length, dtype=torch.bool) for sign in ("", "negative_")}
    return {"prompt_embeds": normal(i, *shape), "negative_prompt_embeds": normal([99] * len(i), *shape), **ones}


@row("Krea2Pipeline")
def krea2() -> Tiny:
    transformer = d.Krea2Transformer2DModel(
        in_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    scheduler = flow_euler(use_dynamic_shifting=True)
    pipe = d.Krea2Pipeline(scheduler=scheduler, vae=None, transformer=transformer, **NO_TEXT)
    inputs = lambda i: {**masked(i, 8, 2, 16), **LATENT, "height": 64, "width": 64}
    exercises = "packed tokens, embeddings of several text layers"
    return Tiny(pipe, inputs, exercises, branches=2, told=per_mille, layout="packed")


@row("QwenImage21Pipeline")
def qwen21() -> Tiny:
    transformer = d.QwenImage21Transformer2DModel(
        in_channels=16, out_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2, context_in_dim=16,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = flow_euler(use_dynamic_shifting=True)
    # It asks how many tokens its instruction has.
    processor = Stub(apply_chat_template=lambda *args, **kwargs: [[0]], tokenizer=Stub(encode=lambda text: [0]))
    pipe = d.QwenImage21Pipeline(
        scheduler=scheduler, vae=None, transformer=transformer, text_encoder=None, processor=processor
    )
    inputs = lambda i: {**masked(i, 8, 16), **LATENT, "height": 64, "width": 64, "true_cfg_scale": 3.0}
    exercises = "tokens of single latent pixels, keys and values of the first step kept"
    return Tiny(pipe, inputs, exercises, branches=2, told=per_mille, layout="packed")


@row("BriaFibo2Pipeline")
def bria_fibo2() -> Tiny:
    transformer = d.BriaFibo2Transformer2DModel(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, cap_feat_dim=16, injection_layer_ids=(0,),
        perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=4, gist_min_text_len=4,
        gist_max_text_len=16, axes_dims=(4, 2, 2), axes_lens=(64, 32, 32),
    )  # fmt: skip

    pipe = d.BriaFibo2Pipeline(
        transformer=transformer, scheduler=flow_euler(use_dynamic_shifting=True), vae=None, text_encoder=None,
        processor=None,
    )  # fmt: skip
    inputs = lambda i: {**masked(i, 2, 8, 16), **LATENT, "height": 64, "width": 64}
    return Tiny(pipe, inputs, "reads the shift's settings as attributes of the config", branches=2, told=per_mille)


@row("ChromaImg2ImgPipeline")
def chroma_img2img() -> Tiny:
    pipe = d.ChromaImg2ImgPipeline(**chroma_parts())
    inputs = lambda i: {**chroma_inputs(i), "image": images(i), "strength": 0.5}
    exercises = "packed img2img with true guidance"
    return Tiny(
        pipe,
        inputs,
        exercises,
        steps=4,
        seen=lambda t: t[2:],
        branches=2,
        told=per_mille,
        layout="packed",
        unmodulated=CHROMA,
    )


@row("HiDreamImagePipeline")
def hidream() -> Tiny:
    transformer = d.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_channels=[16, 16], text_emb_dim=16, num_routed_experts=2,
        num_activated_experts=1, axes_dims_rope=(4, 2, 2), max_resolution=(16, 16), llama_layers=[0, 1],
    )  # fmt: skip
    extra = {f"{part}_{k}": None for part in ("text_encoder", "tokenizer") for k in (2, 3, 4)}
    pipe = d.HiDreamImagePipeline(
        scheduler=flow_euler(shift=3.0), vae=vae(), transformer=transformer, **NO_TEXT, **extra
    )

    pipe.default_sample_size = 16  # the area that it scales every size to

    def inputs(i: Indices) -> dict[str, Any]:
        result: dict[str, Any] = {**LATENT, "height": 32, "width": 32}
        for sign, who in (("", i), ("negative_", [99] * len(i))):
            result[f"{sign}prompt_embeds_t5"] = normal(who, 8, 16)
            result[f"{sign}prompt_embeds_llama3"] = normal(who, 2, 8, 16, salt=1).transpose(0, 1)
            result[f"{sign}pooled_prompt_embeds"] = normal(who, 16, salt=3)
        return result

    return Tiny(pipe, inputs, "the pipeline names a scheduler class, output negated by it")


@row("Ideogram4Pipeline")
def ideogram4() -> Tiny:
    shape: dict[str, Any] = {
        "in_channels": 16, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "intermediate_size": 32,
        "adaln_dim": 16, "llm_features_dim": 16, "mrope_section": (4, 2, 2),
    }  # fmt: skip
    pipe = d.Ideogram4Pipeline(
        scheduler=flow_euler(), vae=None, **NO_TEXT, transformer=d.Ideogram4Transformer2DModel(**shape),
        unconditional_transformer=d.Ideogram4Transformer2DModel(**shape),
    )  # fmt: skip
    awaken(pipe.unconditional_transformer)

    def encode_prompt(prompt: list[str], grid_h: int, grid_w: int, max_sequence_length: int, device: Any) -> Any:
        """Its own takes no embeddings."""
        i, tokens = [int(p) for p in prompt], grid_h * grid_w
        features = torch.cat([normal(i, max_sequence_length, 16), torch.zeros(len(i), tokens, 16)], 1)
        return features, *pipe._prepare_ids([max_sequence_length] * len(i), grid_h, grid_w, max_sequence_length, device)

    pipe.encode_prompt = encode_prompt
    inputs = lambda i: {
        "prompt": [str(k) for k in i],
        **LATENT,
        "height": 64,
        "width": 64,
        "max_sequence_length": 4,
        "guidance_scale": 3.0,
        "guidance_schedule": None,
    }
    exercises = "a second network for the negative half, logit-normal levels, time runs the other way"
    return Tiny(pipe, inputs, exercises, told=lambda t: 1 - t / 1000, layout="packed")


class Words(Stub):
    """A tokenizer of one token a text: how often the letter a stands in it."""

    model_max_length = 8

    def __call__(self, text: str) -> Stub:
        return Stub(input_ids=[text.count("a")])


@row("OmniGenPipeline")
def omnigen() -> Tiny:
    from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen

    class TextProcessor(processor_omnigen.OmniGenMultiModalProcessor):
        """Without what prepares images, which needs torchvision."""

        def __init__(self, text_tokenizer: Any, max_image_size: int) -> None:
            self.text_tokenizer, self.max_image_size = text_tokenizer, max_image_size
            self.collator = processor_omnigen.OmniGenCollator()

    transformer = d.OmniGenTransformer2DModel(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, num_layers=1,
        pad_token_id=0, vocab_size=128, pos_embed_max_size=16, time_step_dim=16,
        rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
    )  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.5)  # else it answers so little that a solver hardly counts
    scheduler = flow_euler(invert_sigmas=True, num_train_timesteps=1)
    with patch.object(pipeline_omnigen, "OmniGenMultiModalProcessor", TextProcessor, create=True):
        pipe = d.OmniGenPipeline(transformer=transformer, scheduler=scheduler, vae=vae(), tokenizer=Words())
    # A token stands for 16 x 16 pixels to the pipeline: 8 to a latent pixel, and 2 x 2 of these.
    pipe.vae_scale_factor = 8
    inputs = lambda i: {"prompt": ["a" * k for k in i], **LATENT, "height": 64, "width": 64}
    exercises = "inverted flow told in times from 0 to 1, one network for texts and images"
    return Tiny(pipe, inputs, exercises)
