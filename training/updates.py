"""Updates of one network, for the scripts that train a pipeline from nothing: they resume, and say how it goes."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm


class Training:
    """Updates of one module: the schedule, resuming, checkpoints, a moving average, and a record of it all.

    `settings` are what else its numbers depend on: a checkpoint of others is not resumed.
    """

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        accelerator: Accelerator,
        module: nn.Module,
        lr: float,
        **settings: int | str,
    ) -> None:
        self.settings = {"seed": args.seed, "lr": lr, **settings}
        self.args, self.accelerator, self.lr, self.folder = args, accelerator, lr, args.output / name
        self.folder.mkdir(parents=True, exist_ok=True)
        optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        if args.compile:
            module.compile(dynamic=False)
        self.module, self.optimizer = accelerator.prepare(module, optimizer)
        self.average = EMAModel(self.raw.parameters(), decay=0.9995, use_ema_warmup=True, power=3 / 4)
        self.average.to(accelerator.device)
        self.seconds, self.update = 0.0, 0

    @property
    def raw(self) -> Any:
        return self.accelerator.unwrap_model(self.module)

    def run(
        self,
        updates: int,
        cooldown: float,
        loss: Callable[[nn.Module, torch.Generator], Tensor],
        look: Callable[[], dict[str, float]],
    ) -> None:
        """Train up to `updates`; the learning rate falls to zero over the last `cooldown` of them. `look` measures."""
        self.settings["updates"] = updates
        self._resume()
        bar = tqdm(
            total=updates,
            initial=self.update,
            desc=self.folder.name,
            mininterval=5,
            disable=not self.accelerator.is_main_process,
        )
        mean, first, started = 0.0, self.update, time.monotonic()
        while self.update < updates:
            rest = (updates - self.update) / (cooldown * updates)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * min(1.0, (self.update + 1) / 200, rest)
            with self._attention():
                value = loss(self.module, torch.Generator().manual_seed((self.args.seed << 32) + self.update))
            self.accelerator.backward(value)
            self.accelerator.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.step(self.raw.parameters())
            self.update += 1
            mean += (value.item() - mean) * max(0.01, 1 / (self.update - first))
            bar.update()
            bar.set_postfix(loss=f"{mean:.4f}")
            if self.update % self.args.checkpoint_every == 0 or self.update == updates:
                self.seconds, started = self.seconds + time.monotonic() - started, time.monotonic()
                self._save()
                if self.update % self.args.pictures_every == 0 or self.update == updates:
                    if self.accelerator.is_main_process:
                        self._record(loss=mean, **self.with_average(look))
                    started = time.monotonic()
        bar.close()

    def _attention(self) -> AbstractContextManager[Any]:
        """Compiled for a CPU, plain products of matrices: its fused attention's backward is several times slower."""
        on_cpu = self.accelerator.device.type == "cpu"
        return sdpa_kernel(SDPBackend.MATH) if self.args.compile and on_cpu else nullcontext()

    def with_average(self, work: Callable[[], Any]) -> Any:
        """`work()` with the moving average in place of the weights."""
        self.average.store(self.raw.parameters())
        self.average.copy_to(self.raw.parameters())
        self.raw.eval()
        try:
            with torch.no_grad():
                return work()
        finally:
            self.raw.train()
            self.average.restore(self.raw.parameters())

    def _record(self, **values: float) -> None:
        entry = {"update": self.update, "seconds": round(self.seconds), **values}
        with (self.folder / "progress.jsonl").open("a") as file:
            file.write(json.dumps({k: round(v, 5) for k, v in entry.items()}) + "\n")

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {
            "module": self.raw.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "update": self.update,
            "seconds": self.seconds,
            "settings": self.settings,
        }
        partial = self.folder / "checkpoint.partial"
        torch.save(state, partial)
        os.replace(partial, self.folder / "checkpoint.pt")

    def _resume(self) -> None:
        if not (self.folder / "checkpoint.pt").exists():
            return
        state = torch.load(self.folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        if (begun := state.get("settings", self.settings)) != self.settings:
            raise ValueError(f"{self.folder} was begun with {begun}, not {self.settings}: choose another --output.")
        self.raw.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        self.average.to(self.accelerator.device)
        self.update, self.seconds = state["update"], state["seconds"]


def share(accelerator: Accelerator) -> slice:
    """This process's part of a batch that every process draws: the same batches on any number of them."""
    return slice(accelerator.process_index, None, accelerator.num_processes)


def draw(images: Tensor, columns: int, path: Path) -> None:
    """A grid of images (n, 3, h, w) in [-1, 1]."""
    pixels = images.float().clamp(-1, 1).add(1).mul(127.5).round().byte().cpu()
    rows = [torch.cat(list(row), dim=2) for row in pixels.split(columns)]
    Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).numpy()).save(path)
