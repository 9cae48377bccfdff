"""Train a latent diffusion model of rain from scratch, on simulated fields: ``python training/pretrain_rain.py``.

First the autoencoder of single frames (AutoencoderTiny, f4), then the network that forecasts six frames' latents from
four. Every update draws its batch from (seed, update), so a resumed run is the same run. The pipeline ends up in
OUTPUT/rain. Re-run the command to resume.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from tqdm import tqdm
from updates import Training, draw, share

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "nowcasting"))
from forecast import CHANNELS, FACTOR, ForecastNetwork, NowcastPipeline, autoencoder, scheduler
from rain import KNOWN, SIZE, sequences

HELD_OUT = 10**9  # seed of sequences that nothing is learned from, far from all others


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("build/rain"), help="directory of checkpoints, pictures and the pipeline"
    )
    parser.add_argument("--autoencoder-updates", type=int, default=1500, help="updates of the autoencoder")
    parser.add_argument("--updates", type=int, default=6000, help="updates of the network")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences in an update, over all processes")
    parser.add_argument("--sequences", type=int, default=4000, help="to learn the network from")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--checkpoint-every", type=int, default=250, help="updates between checkpoints")
    parser.add_argument(
        "--pictures-every", type=int, default=1500, help="updates between pictures, a multiple of --checkpoint-every"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.compile = False
    return args


class _Autoencoder(nn.Module):
    """Images of single frames again, from latents with a little noise, which keeps them smooth."""

    def __init__(self) -> None:
        super().__init__()
        self.autoencoder = autoencoder()

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        latents = cast(Any, self.autoencoder.encode(images)).latents
        return cast(Any, self.autoencoder.decode(latents + 0.05 * noise)).sample


def train_autoencoder(args: argparse.Namespace, accelerator: Accelerator) -> Any:
    """Squared error of single frames."""
    set_seed(args.seed)
    training, device = Training("autoencoder", args, accelerator, _Autoencoder(), args.lr), accelerator.device
    side, own = SIZE // FACTOR, share(accelerator)

    def frames(generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(HELD_OUT, (), generator=generator))
        return 2 * sequences(args.batch_size, seed, frames=1)[own].to(device) - 1

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        images = frames(generator)
        noise = torch.randn(len(images), CHANNELS, side, side, generator=generator)
        return mse_loss(module(images, noise.to(device)), images)

    def look() -> dict[str, float]:
        images = 2 * sequences(64, HELD_OUT, frames=1).to(device) - 1
        again = training.raw(images, torch.zeros(len(images), CHANNELS, side, side, device=device))
        shown = torch.cat([images[:12], again[:12]]).expand(-1, 3, -1, -1)
        draw(shown, 12, training.folder / "held-out.png")
        return {"held_out": float(mse_loss(again, images))}

    training.run(args.autoencoder_updates, 0.7, loss, look)
    training.average.copy_to(training.raw.parameters())
    return training.raw.autoencoder.eval().requires_grad_(False)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    accelerator = Accelerator()
    device, own = accelerator.device, share(accelerator)
    vae = train_autoencoder(args, accelerator)
    frames = 2 * sequences(64, HELD_OUT + 1, frames=1).to(device) - 1
    vae.register_to_config(scaling_factor=float(1 / vae.encode(frames).latents.std()))
    set_seed(args.seed)
    network = ForecastNetwork()
    training = Training("network", args, accelerator, network, args.lr, batch_size=args.batch_size)
    alphas = scheduler().alphas_cumprod.to(device)

    def pipeline() -> NowcastPipeline:
        pipe = NowcastPipeline(vae, training.raw, scheduler())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @torch.no_grad()
    def encoded(count: int, first: int) -> Tensor:
        """(count, T, H, W, C) of simulated sequences, a hundred at a time."""
        parts = range(0, count, 100)
        made = [pipeline().encode(sequences(min(100, count - i), first + i).to(device)).cpu() for i in tqdm(parts)]
        return torch.cat(made)

    def errors(module: nn.Module, latents: Tensor, generator: torch.Generator, part: slice = slice(None)) -> Tensor:
        """(B,) squared error of v = alpha e - sigma z, of this process's sequences."""
        t = torch.randint(len(alphas), (len(latents),), generator=generator)
        e = torch.randn(latents[:, KNOWN:].shape, generator=generator)
        t, e, z = (x[part].to(device) for x in (t, e, latents))
        known, future = z[:, :KNOWN], z[:, KNOWN:]
        alpha, sigma = (v.sqrt().reshape(-1, 1, 1, 1, 1) for v in (alphas[t], 1 - alphas[t]))
        v = module(alpha * future + sigma * e, t, known, return_dict=False)[0]
        return (v - (alpha * e - sigma * future)).square().flatten(1).mean(1)

    latents, held_out = encoded(args.sequences, 0), encoded(128, HELD_OUT + 3)

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (args.batch_size,), generator=generator)
        return errors(module, latents[rows], generator, own).mean()

    def look() -> dict[str, float]:
        whole, generator = sequences(6, HELD_OUT + 2), torch.Generator().manual_seed(args.seed)
        made = cast(Any, pipeline()(whole[:, :KNOWN].to(device), 50, generator)).frames.cpu()
        rows = torch.cat([whole, torch.cat([whole[:, :KNOWN], made], 1)], 1).flatten(0, 1)[:, None]
        draw((2 * rows - 1).expand(-1, 3, -1, -1), whole.shape[1], training.folder / f"{training.update:06d}.png")
        return {"held_out": float(errors(training.raw, held_out, generator).mean())}

    training.run(args.updates, 0.4, loss, look)
    training.average.copy_to(training.raw.parameters())
    if accelerator.is_main_process:
        unfinished, folder = args.output / "rain.partial", args.output / "rain"
        shutil.rmtree(unfinished, ignore_errors=True)
        training.raw.eval()
        pipeline().save_pretrained(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)


if __name__ == "__main__":
    main()
