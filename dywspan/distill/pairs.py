"""Teacher pairs: prompts and seeds with the endpoints a slow, accurate solver reaches from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from ..artifact import write_atomically
from .rollout import sample


@dataclass(frozen=True)
class Teacher:
    """A scheduler and its number of steps: what students are compared with.

    Attributes:
        scheduler: any diffusers or dywspan scheduler that integrates the ODE.
        num_inference_steps: M, much more than any student's.
    """

    scheduler: Any
    num_inference_steps: int

    def summary(self) -> dict[str, Any]:
        """What a reader wants to know of it."""
        known = {k: self.scheduler.config[k] for k in ("solver", "order", "grid") if k in self.scheduler.config}
        return {"scheduler": type(self.scheduler).__name__, "steps": self.num_inference_steps, **known}

    def describe(self) -> dict[str, Any]:
        """All that determines its endpoints."""
        config = {k: v for k, v in self.scheduler.config.items() if not k.startswith("_")}
        return {"class": type(self.scheduler).__name__, "steps": self.num_inference_steps, "config": config}


@dataclass(frozen=True)
class Pairs:
    """P samples: a prompt, the seed of its noise, and the teacher's endpoint, (P, ...) float32."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    endpoints: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def choose(self, indices: Sequence[int]) -> Pairs:
        """These pairs, in this order."""
        return Pairs(
            [self.prompts[i] for i in indices], [self.seeds[i] for i in indices], self.endpoints[list(indices)]
        )

    def __getitem__(self, index: slice) -> Pairs:
        return Pairs(self.prompts[index], self.seeds[index], self.endpoints[index])


@torch.no_grad()
def make_pairs(
    pipe: Any,
    teacher: Teacher,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    call: Mapping[str, Any],
    batch_size: int = 16,
    cache: str | os.PathLike[str] | None = None,
) -> Pairs:
    """The teacher's endpoints, from ``cache`` if the same were made before.

    The file's name is a hash of all that matters: model, call arguments, teacher, prompts and seeds.

    Args:
        call: arguments of the pipeline's call (guidance_scale, height, width, ...), the same for teacher and student.
    """
    key = {
        "model": str(getattr(pipe, "name_or_path", "") or pipe.config.get("_name_or_path")),
        "pipeline": type(pipe).__name__,
        "teacher": teacher.describe(),
        "call": dict(call),
        "prompts": list(prompts),
        "seeds": list(seeds),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    path = Path(cache) / f"pairs-{digest[:16]}.safetensors" if cache is not None else None
    if path is not None and path.exists():
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") == digest:
                return Pairs(prompts, seeds, file.get_tensor("endpoints"))
    batches = []
    for start in tqdm(range(0, len(prompts), batch_size), desc=f"teacher, {teacher.num_inference_steps} steps"):
        part = slice(start, start + batch_size)
        endpoint, _ = sample(pipe, teacher.scheduler, teacher.num_inference_steps, prompts[part], seeds[part], call)
        batches.append(endpoint.float().cpu())
    endpoints = torch.cat(batches)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({"endpoints": endpoints}, metadata={"key": digest}))
    return Pairs(prompts, seeds, endpoints)
