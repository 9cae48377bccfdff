"""Short hashes of what results depend on: folders and files of a cache are named by them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(pipe: Any) -> str:
    """A hash of the pipeline's networks: names, shapes, types and the first numbers of every tensor.

    Unlike a path or a name it changes when the weights do, and only then.
    """
    digest = hashlib.sha256()
    for name, module in sorted(pipe.components.items()):
        for key, value in module.state_dict().items() if isinstance(module, nn.Module) else ():
            digest.update(f"{name}.{key} {tuple(value.shape)} {value.dtype}".encode())
            if value.device.type != "meta" and value.numel():
                digest.update(value.detach().flatten()[:8].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def digest(key: Any) -> str:
    """A short hash of anything JSON can hold, and of tensors, whose text leaves most of their numbers out."""

    def text(value: Any) -> str:
        return f"{value.dtype} {tuple(value.shape)} {checksum(value)}" if isinstance(value, Tensor) else str(value)

    return hashlib.sha256(json.dumps(key, sort_keys=True, default=text).encode()).hexdigest()[:16]


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
