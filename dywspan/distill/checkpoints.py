"""The state of learning, in files that hold tensors and JSON and nothing that could be executed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..artifact import write_atomically
from ..pipelines.processes import is_main, wait


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: the numbers of a run, and its tensors by name."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    @torch.no_grad()
    def restore(self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
        """Put parameters and optimiser back where they were; returns the best parameters so far."""
        state: dict[int, dict[str, Tensor]] = {}
        best = [p.detach().clone() for p in parameters]
        for name, value in self.tensors.items():
            kind, index, *rest = name.split(".")
            if kind == "optimizer":
                state.setdefault(int(index), {})[rest[0]] = value
            else:
                ({"parameter": parameters, "best": best}[kind])[int(index)].copy_(value)
        if optimizer is not None:
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return best


@dataclass(frozen=True)
class Checkpoints:
    """A folder with the last few states of one run.

    Attributes:
        folder: of this run alone.
        every: updates between two.
        keep: how many stay.
    """

    folder: Path
    every: int = 25
    keep: int = 2

    def save(
        self,
        parameters: Sequence[Tensor],
        best: Sequence[Tensor],
        optimizer: torch.optim.Optimizer | None,
        facts: dict[str, Any],
    ) -> None:
        """Write atomically, then remove the oldest. The main process writes, the others hold the same."""
        if not is_main():
            return
        tensors = {f"parameter.{i}": p for i, p in enumerate(parameters)} | {f"best.{i}": p for i, p in enumerate(best)}
        for index, state in (optimizer.state_dict()["state"] if optimizer else {}).items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        # Step counts are keys of these mappings: JSON would make them texts.
        text = json.dumps({k: list(v.items()) if isinstance(v, dict) else v for k, v in facts.items()})
        data = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata={"facts": text})
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / f"update-{facts['update']:07d}.safetensors", data)
        for old in self._files()[: -self.keep]:
            old.unlink()

    def latest(self) -> Saved | None:
        """The newest state that can be read; says so where one cannot."""
        wait()
        for file in reversed(self._files()):
            try:
                with safe_open(file, "pt") as opened:
                    facts = json.loads((opened.metadata() or {})["facts"])
                    tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            except (SafetensorError, KeyError, ValueError) as error:
                if is_main():
                    print(f"{file} is damaged ({error}): going on from the one before.")
                continue
            return Saved({k: dict(v) if isinstance(v, list) else v for k, v in facts.items()}, tensors)
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("update-*.safetensors"))
