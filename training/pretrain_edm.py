"""Train a small EDM network from scratch, on emoji of 32 x 32 pixels: ``python training/pretrain_edm.py``.

DDPM++ with few channels, EDM's loss, no classes and no augmentation. The pipeline ends up in OUTPUT/edm-emoji.
Re-run the command to resume. Every update draws its batch from (seed, update), so a resumed run is
the same run.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import EDMEulerScheduler
from emoji64 import load, split
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from updates import Training, draw, share

from dywspan import DyWeightScheduler
from dywspan.edm import EDMPipeline, EDMUNet

SIGMA_DATA = 0.5


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/emoji64"), help="data set; built if it is missing")
    parser.add_argument(
        "--output", type=Path, default=Path("build/edm"), help="directory of checkpoints, pictures and the pipeline"
    )
    parser.add_argument(
        "--channels", type=int, default=16, help="channels of the first level; the next ones have 2 and 4 times as many"
    )
    parser.add_argument("--blocks", type=int, default=1, help="blocks in each level")
    parser.add_argument("--updates", type=int, default=1600)
    parser.add_argument("--batch-size", type=int, default=32, help="images in an update, over all processes")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--checkpoint-every", type=int, default=50, help="updates between checkpoints")
    parser.add_argument(
        "--pictures-every", type=int, default=400, help="updates between pictures, a multiple of --checkpoint-every"
    )
    parser.add_argument("--pictures", type=int, default=40, help="pictures to draw")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.compile = False
    return args


def errors(network: nn.Module, images: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """(B,) lambda(sigma) |D(y + n; sigma) - y|^2 = |F - (y - c_skip (y + n)) / c_out|^2, a mean over pixels.

    Source: EDM (Karras et al. 2022), eq. (8) and table 1.
    """
    x, variance = images + sigma * noise, sigma**2 + SIGMA_DATA**2
    skip, out = SIGMA_DATA**2 / variance, sigma * SIGMA_DATA / variance.sqrt()
    output = network(x / variance.sqrt(), sigma.flatten().log() / 4, return_dict=False)[0]
    return (output - (images - skip * x) / out).square().mean((1, 2, 3))


def draws(count: int, shape: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Levels, ln sigma ~ N(-1.2, 1.2^2), and noise. Source: EDM, table 1."""
    sigma = (1.2 * torch.randn(count, 1, 1, 1, generator=generator) - 1.2).exp()
    return sigma, torch.randn(count, *shape, generator=generator)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    accelerator = Accelerator()
    with accelerator.main_process_first():
        images, captions = load(args.data)
    images = avg_pool2d(images, 2).contiguous(memory_format=torch.channels_last)
    learn, out = map(torch.tensor, split(captions))
    device, part = accelerator.device, share(accelerator)
    set_seed(args.seed)
    sizes: dict[str, Any] = {"sample_size": 32, "model_channels": args.channels, "channel_mult": (1, 2, 4)}
    network: Any = EDMUNet("ddpm++", **sizes, layers_per_block=args.blocks, attention_resolutions=(8,))
    training = Training(
        "edm", args, accelerator, network.to(memory_format=torch.channels_last), args.lr,
        batch_size=args.batch_size, channels=args.channels, blocks=args.blocks,
    )  # fmt: skip

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        rows = learn[torch.randint(len(learn), (args.batch_size,), generator=generator)]
        given = (images[rows], *draws(args.batch_size, images.shape[1:], generator))
        return errors(module, *(v[part].to(device) for v in given)).mean()

    def look() -> dict[str, float]:
        rows, generator = out.repeat(2), torch.Generator().manual_seed(args.seed)
        given = (images[rows], *draws(len(rows), images.shape[1:], generator))
        pipe: Any = pipeline(training.raw)
        pipe.scheduler = DyWeightScheduler.from_config(pipe.scheduler, solver="dpmpp", solver_order=2)
        noise = torch.randn(args.pictures, *images.shape[1:], generator=generator)
        draw(pipe(latents=noise, output_type="latent").images, 10, training.folder / f"{training.update:06d}.png")
        return {"held_out": float(errors(training.raw, *(v.to(device) for v in given)).mean())}

    training.run(args.updates, 0.4, loss, look)
    training.average.copy_to(training.raw.parameters())
    if accelerator.is_main_process:
        unfinished, folder = args.output / "edm-emoji.partial", args.output / "edm-emoji"
        shutil.rmtree(unfinished, ignore_errors=True)
        pipeline(training.raw.eval()).save_pretrained(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)


def pipeline(network: nn.Module) -> EDMPipeline:
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=SIGMA_DATA, rho=7.0)
    pipe = EDMPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


if __name__ == "__main__":
    main()
