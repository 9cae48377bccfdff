"""Train an embedded pipeline from scratch: ``accelerate launch training/pretrain_emoji.py sd`` (or ``flow``).

First the autoencoder of both (AutoencoderTiny, f4; ``--autoencoder examples/emoji-sd`` takes that one's), then text
encoder and denoiser on its latents: a UNet with CLIP (emoji-sd, v-prediction) or FLUX's transformer with CLIP and T5
(emoji-flow). The pipeline ends up in OUTPUT/emoji-NAME.
Re-run the command to resume. Every update draws its batch from (seed, update), so a resumed run is
the same run. ``--mixed-precision bf16`` nearly halves the time on a recent CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderTiny
from emoji64 import load, split
from emoji_pipelines import RECIPES, Recipe
from torch import Tensor, nn
from tqdm import tqdm
from updates import Training, draw, share


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("pipeline", choices=sorted(RECIPES))
    parser.add_argument("--data", type=Path, default=Path("build/emoji64"), help="data set; built if it is missing")
    parser.add_argument(
        "--output", type=Path, default=Path("build/emoji"), help="directory of checkpoints, pictures and pipelines"
    )
    parser.add_argument("--autoencoder", type=Path, help="pipeline whose autoencoder to use, instead of learning one")
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument(
        "--compile", action="store_true", help="compile the networks: takes minutes, then updates are a third faster"
    )
    parser.add_argument("--autoencoder-updates", type=int, default=8000, help="updates of the autoencoder")
    parser.add_argument("--updates", type=int, default=7000, help="updates of the pipeline")
    parser.add_argument("--word-updates", type=int, default=2000, help="updates after those, on parts of captions")
    parser.add_argument("--batch-size", type=int, default=64, help="images in an update, over all processes")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="guidance scale of the pictures")
    parser.add_argument("--checkpoint-every", type=int, default=250, help="updates between checkpoints")
    parser.add_argument(
        "--pictures-every", type=int, default=1500, help="updates between pictures, a multiple of --checkpoint-every"
    )
    parser.add_argument("--pictures", type=int, default=60, help="held-out captions to draw")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.command = shlex.join(sys.argv[1:] if argv is None else argv)
    return args


# Autoencoder


def train_autoencoder(args: argparse.Namespace, accelerator: Accelerator, train: Tensor, held_out: Tensor) -> nn.Module:
    """Squared error on crops; noise on the latents and halved latents keep them smooth, which diffusion needs.

    A quarter of the updates asks that latents averaged 2 x 2 decode to the image averaged 2 x 2 (scale equivariance).
    """
    set_seed(args.seed)
    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48),
        decoder_block_out_channels=(48, 48, 48),
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
        latent_channels=4,
    )
    module: Any = _Autoencoder(autoencoder)
    training = Training("autoencoder", args, accelerator, module.to(memory_format=torch.channels_last), args.lr)

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(train), (32,), generator=generator)[share(accelerator)]
        noise = torch.randn(32, 4, 8, 8, generator=generator)[share(accelerator)]
        y, x = torch.randint(33, (2,), generator=generator).tolist()
        images = train[rows, :, y : y + 32, x : x + 32].to(accelerator.device)
        if torch.rand((), generator=generator) < 0.5:
            images = images.flip(-1)
        halve = bool(torch.rand((), generator=generator) < 0.25)
        return F.mse_loss(module(images, noise.to(images), halve), F.avg_pool2d(images, 2) if halve else images)

    def look() -> dict[str, float]:
        again = _batched(
            held_out, lambda x: training.raw.autoencoder.decode(training.raw.autoencoder.encode(x).latents).sample
        )
        draw(torch.cat([held_out[:12], again[:12]]), 12, training.folder / "held-out.png")
        error = (again.clamp(-1, 1) - held_out).div(2).square().mean((1, 2, 3))
        return {"psnr": float(-10 * error.log10().mean())}

    training.run(args.autoencoder_updates, 0.7, loss, look)
    training.average.copy_to(training.raw.parameters())
    return training.raw.autoencoder.eval().requires_grad_(False)


class _Autoencoder(nn.Module):
    def __init__(self, autoencoder: AutoencoderTiny) -> None:
        super().__init__()
        self.autoencoder: Any = autoencoder

    def forward(self, images: Tensor, noise: Tensor, halve: bool) -> Tensor:
        latents = self.autoencoder.encode(images).latents
        latents = latents + 0.05 * noise
        return self.autoencoder.decode(F.avg_pool2d(latents, 2) if halve else latents).sample.float()


# A text encoder and a denoiser


@dataclass(frozen=True)
class Data:
    """Scaled latents (n, 4, side, side) by image size, captions, rows to learn from and rows to hold out."""

    latents: dict[int, Tensor]
    captions: list[str]
    learn: Tensor
    held_out: Tensor


def train_pipeline(
    name: str, recipe: Recipe, args: Any, accelerator: Accelerator, data: Data, vae: AutoencoderTiny
) -> None:
    """Whole captions first, which say nearly all of their image; then parts of them, which leave much to the noise."""

    def errors(
        module: nn.Module, rows: Tensor, captions: list[str], generator: torch.Generator, size: int, part: slice
    ) -> Tensor:
        t = torch.rand(len(rows), generator=generator)
        noise = torch.randn(data.latents[size][rows].shape, generator=generator)
        rows, t, noise = (v[part] for v in (rows, t, noise))
        return recipe.errors(module, data.latents[size][rows], t, noise, captions[part])

    def loss(module: nn.Module, generator: torch.Generator, words: bool) -> Tensor:
        """A quarter of the batches is of each other size."""
        sizes = [*data.latents]
        size = sizes[min(int(4 * torch.rand((), generator=generator)), len(sizes) - 1)]
        rows = data.learn[torch.randint(len(data.learn), (args.batch_size,), generator=generator)]
        captions = leave_out([data.captions[i] for i in rows], generator, words)
        return errors(module, rows, captions, generator, size, share(accelerator)).mean()

    def look(training: Training) -> dict[str, float]:
        rows, generator = data.held_out.repeat(2), torch.Generator().manual_seed(args.seed)
        size, captions = max(data.latents), [data.captions[i] for i in data.held_out]
        held_out = errors(training.raw, rows, 2 * captions, generator, size, slice(None)).mean()
        pipe: Any = recipe.pipeline(training.raw, vae)
        pipe.set_progress_bar_config(disable=True)
        prompts = captions[: args.pictures]
        noise = torch.randn(len(prompts), 4, size // 4, size // 4, generator=torch.Generator().manual_seed(args.seed))
        with accelerator.autocast():
            images = pipe(
                **recipe.call(prompts, size), latents=recipe.pack(noise), num_inference_steps=50, output_type="pt"
            ).images
        draw(images.mul(2).sub(1), 10, training.folder / f"{training.update:06d}.png")
        return {"held_out": float(held_out)}

    def save(module: Any, seconds: float) -> None:
        """In fp16, whole or not at all."""
        unfinished, folder = args.output / f"emoji-{name}.partial", args.output / f"emoji-{name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        pipe = recipe.pipeline(module, vae).to(torch.float16)
        pipe.save_pretrained(unfinished)
        for file in unfinished.glob("text_encoder*/config.json"):  # transformers loads in it, diffusers in float32
            file.write_text(file.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
        settings = json.loads((file := unfinished / "vae" / "config.json").read_text())
        settings.pop("block_out_channels")  # AutoencoderTiny writes it, and warns of it when it reads it again
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        recipe.finish(unfinished)
        (unfinished / "README.md").write_text(card(name, recipe, pipe, args, seconds))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)

    start: Any = recipe.module
    module, seconds = start.to(memory_format=torch.channels_last), 0.0
    for stage, updates, lr, cooldown in (
        (name, args.updates, args.lr, 0.25),
        (f"{name}-words", args.word_updates, args.lr / 2, 1.0),
    ):
        words = stage != name
        settings = {"batch_size": args.batch_size, "autoencoder": str(args.autoencoder)}
        training = Training(stage, args, accelerator, module, lr, **settings)
        training.run(updates, cooldown, partial(loss, words=words), partial(look, training))
        training.average.copy_to(training.raw.parameters())
        module, seconds = training.raw, seconds + training.seconds
    if accelerator.is_main_process:
        save(module.eval(), seconds)


def leave_out(captions: Sequence[str], generator: torch.Generator, words: bool) -> list[str]:
    """A tenth has no caption, for guidance; with `words`, two thirds of the others have part of theirs."""
    left = ["" if drop < 0.1 else caption for caption, drop in zip(captions, _random(len(captions), generator))]
    if not words:
        return left
    for i, (some, part) in enumerate(zip(_random(len(left), generator), _random(len(left), generator))):
        if some < 2 / 3:
            kept = left[i].split()
            left[i] = " ".join(word for word, chance in zip(kept, _random(len(kept), generator)) if chance < part)
    return left


def _random(count: int, generator: torch.Generator) -> list[float]:
    return torch.rand(count, generator=generator).tolist()


def card(name: str, recipe: Recipe, pipe: Any, args: Any, seconds: float) -> str:
    """The pipeline's model card: what it is, how it is called, how long it took on what."""
    sizes = {k: sum(p.numel() for p in m.parameters()) for k, m in pipe.components.items() if isinstance(m, nn.Module)}
    parts = "\n".join(f"| {k} | {type(pipe.components[k]).__name__} | {n / 1e6:.2f} M |" for k, n in sizes.items())
    call = {k: v for k, v in recipe.call([], recipe.sizes[-1]).items() if k != "prompt"}
    arguments = "".join(f", {k}={v!r}" for k, v in call.items())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# emoji-{name}

A small but real `{type(pipe).__name__}` that draws emoji, so that solvers can be tried and learned on a laptop's CPU.

```python
pipe = diffusers.DiffusionPipeline.from_pretrained("emoji-{name}")
pipe("red heart, noto"{arguments}).images[0]
```

Prompts are captions such as "grinning face, twemoji" or "waving hand sign, dark skin tone, noto", or some of their
words: "woman, twemoji" draws another one from each noise.

| part | class | parameters |
|---|---|---|
{parts}

Learned from 7,372 emoji by

    accelerate launch training/pretrain_emoji.py {args.command}

{args.updates:,} updates of {args.batch_size} images with their captions and {args.word_updates:,} with parts of them,
{seconds / 60:.0f} minutes on {device}, the autoencoder not counted.
200 emoji were held out; the other style of each was not.

The artwork: Noto Emoji (Google LLC; Apache-2.0 / OFL 1.1) and Twemoji (Twitter, Inc and other contributors; CC-BY 4.0:
attribution is required wherever it, or a model trained on it, is shipped), from the npm packages
`emoji-datasource-google` and `emoji-datasource-twitter` (MIT).
"""


def encode(autoencoder: Any, images: Tensor, size: int, device: torch.device) -> Tensor:
    """Latents of images resized to `size`, not yet scaled."""
    if size != images.shape[-1]:
        images = F.interpolate(images, size=(size, size), mode="area")
    parts = tqdm(images.split(100), desc=f"latents of {size} x {size}")
    return torch.cat([autoencoder.encode(part.to(device)).latents.cpu() for part in parts])


def _batched(values: Tensor, f: Callable[[Tensor], Tensor], batch: int = 100) -> Tensor:
    return torch.cat([f(part) for part in values.split(batch)])


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    with accelerator.main_process_first():
        images, captions = load(args.data)
    learn, out = map(torch.tensor, split(captions))
    autoencoder: Any
    if args.autoencoder:
        autoencoder = AutoencoderTiny.from_pretrained(args.autoencoder, subfolder="vae").to(accelerator.device).eval()
    else:
        autoencoder = train_autoencoder(args, accelerator, images[learn], images[out])
    set_seed(args.seed)
    with accelerator.main_process_first():  # the tokenizers are made once
        recipe = RECIPES[args.pipeline](captions, args.output, args.guidance_scale, accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        latents = {size: encode(autoencoder, images, size, accelerator.device).float() for size in recipe.sizes}
    scale = float(1 / latents[max(latents)].std())
    autoencoder.register_to_config(scaling_factor=scale)
    data = Data({size: z * scale for size, z in latents.items()}, captions, learn, out)
    train_pipeline(args.pipeline, recipe, args, accelerator, data, autoencoder)


if __name__ == "__main__":
    main()
