"""Flow networks whose pipelines make one sample a call, whatever stands beside it."""

# ruff: noqa: E731  (a row's inputs are one expression with one name)
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers as d
import numpy as np
import torch
from PIL import Image
from torch import Tensor

import dywspan

from .parts import LATENT, Stub, flow_euler, images, normal
from .registry import Indices, Tiny, row
from .video_recent import video_and_sound


class UncutUniP(d.UniPCMultistepScheduler):
    """UniPC's predictor alone, as solver 'unipc' is; and it tells times as they are, not cut to integers."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self.disable_corrector = list(range(len(self.timesteps)))


@row("Cosmos3OmniPipeline")
def cosmos3() -> Tiny:
    transformer = d.Cosmos3OmniTransformer(
        head_dim=16, hidden_size=32, intermediate_size=32, latent_channel=16, num_attention_heads=2,
        num_hidden_layers=1, num_key_value_heads=1, patch_latent_dim=64, vocab_size=16, rope_axes_dim=(4, 2, 2),
        sound_dim=4, sound_gen=True,
    )  # fmt: skip
    small = d.AutoencoderKLWan(base_dim=2, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    words = Stub(
        eos_token_id=1, convert_tokens_to_ids=lambda word: 2,
        # One token: how long the prompt is.
        apply_chat_template=lambda talk, **_: SimpleNamespace(input_ids=[3 + len(talk[-1]["content"])]),
    )  # fmt: skip
    sound = Stub(
        config=Stub(sampling_rate=40),
        _hop_size=2,
        decode=lambda latent: latent,
        parameters=lambda: iter([torch.zeros(1)]),
    )
    pipe = d.Cosmos3OmniPipeline(
        transformer=transformer, text_tokenizer=words, vae=small, scheduler=scheduler, sound_tokenizer=sound,
        enable_safety_checker=False, default_use_system_prompt=False,
    )  # fmt: skip
    inputs = lambda i: {
        "prompt": "a" * (1 + i[0]),
        **LATENT,
        "height": 64,
        "width": 32,
        "num_frames": 5,
        "enable_sound": True,
        "add_resolution_template": False,
        "add_duration_template": False,
    }
    exercises = "one sample a call, its sound by a copy of the scheduler; its own, UniPC, has a corrector besides"
    return Tiny(
        pipe, inputs, exercises, batch=1, branches=2, exact={"solver": "unipc", "solver_order": 2}, twin=UncutUniP,
        layout="video", channels=16,
        unlifted="its sample has another axis before that of the batch", unmodulated="each token is told its time",
        result=lambda output: video_and_sound([output.video, output.sound[None]]),
    )  # fmt: skip


class FirstFrame(Stub):
    """A video autoencoder that gives each colour of an image's blocks as a channel."""

    def encode(self, video: Tensor) -> Any:
        latent = torch.nn.functional.avg_pool3d(video, (1, 32, 32))
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: torch.cat([latent, latent[:, :1]], 1)))


@row("SanaWMPipeline")
def sana_wm() -> Tiny:
    transformer = d.SanaWMTransformer3DModel(
        in_channels=4, num_layers=2, hidden_size=32, num_attention_heads=2, softmax_every_n=2, linear_head_dim=16,
        caption_channels=8, chunk_plucker_post_attn_blocks=2, mlp_ratio=2.0,
    )  # fmt: skip
    frames = FirstFrame(
        spatial_compression_ratio=32, temporal_compression_ratio=8, latents_mean=torch.zeros(4),
        latents_std=torch.ones(4), dtype=torch.float32, config=SimpleNamespace(scaling_factor=1.0),
    )  # fmt: skip
    pipe = d.SanaWMPipeline(
        tokenizer=None, text_encoder=None, vae=frames, transformer=transformer, scheduler=flow_euler(shift=3.0)
    )

    def inputs(i: Indices) -> dict[str, Any]:
        poses = np.eye(4, dtype=np.float32)[None].repeat(17, 0)
        poses[:, 2, 3] = np.linspace(0, 1, 17)
        result: dict[str, Any] = {
            "image": Image.fromarray((images(i)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)),
            "prompt": "", "c2w": poses, "intrinsics": [32.0, 32.0, 16.0, 16.0], "height": 64, "width": 96,
            "num_frames": 17, **LATENT,
        }  # fmt: skip
        for sign, who in (("", i), ("negative_", [99] * len(i))):
            result[f"{sign}prompt_embeds"] = normal(who, 1, 8, 8, salt=2)
            result[f"{sign}prompt_attention_mask"] = torch.ones(len(i), 8, dtype=torch.long)
        return result

    exercises = "one sample a call: along a camera's path from a first frame, which has a time of its own"
    return Tiny(dywspan.bind(pipe), inputs, exercises, batch=1, layout="packed_video")
