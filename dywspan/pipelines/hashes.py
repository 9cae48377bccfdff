"""Short hashes of what results depend on: folders and files of a cache are named by them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .networks import stored


def fingerprint(pipe: Any, left_out: Mapping[str, bytes] | None = None) -> str:
    """A hash of the pipeline's networks: names, shapes, types and the first numbers of every tensor.

    Unlike a path or a name it changes when the weights do, and only then: not with where they are, nor when a network
    is compiled. Quantised weights count by what they hold. A LoRA's counts too, and how strongly it acts.

    Args:
        left_out: :func:`extracts` of networks that the pipeline was loaded without.
    """
    found = {**extracts(pipe), **(left_out or {})}
    return hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest()[:16]


def extracts(pipe: Any, without: Collection[str] = ()) -> dict[str, bytes]:
    """By name, what of each network the hash is made of, but for those named in ``without``."""
    return {
        name: b"".join(_extract(name, getattr(module, "_orig_mod", module)))
        for name, module in pipe.components.items()
        if isinstance(module, nn.Module) and name not in without
    }


def _extract(name: str, module: nn.Module) -> Iterator[bytes]:
    for key, value in module.state_dict().items():
        yield from _parts(f"{name}.{key}", stored(module, key, value))
    for key, strengths in _adapters(module):
        yield f"{name}.{key} {strengths}".encode()


def _parts(name: str, value: Any) -> Iterator[bytes]:
    """What a tensor holds; of one that is made of others, those."""
    if isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            yield from _parts(f"{name}.{i}", part)
    elif not isinstance(value, Tensor):
        yield f"{name} {value}".encode()
    elif is_traceable_wrapper_subclass(value):
        yield f"{name} {type(value).__name__} {tuple(value.shape)} {value.dtype}".encode()
        for part in value.__tensor_flatten__()[0]:
            yield from _parts(f"{name}.{part}", getattr(value, part))
    else:
        if value.is_quantized:
            value = value.dequantize()
        if type(value) not in (Tensor, nn.Parameter):  # packed numbers, that would say other shapes and operators
            yield f"{getattr(value, 'quant_type', '')}".encode()
            value = value.detach().as_subclass(Tensor)
        yield f"{name} {tuple(value.shape)} {value.dtype}".encode()
        if value.device.type != "meta" and value.numel():
            yield value.detach().flatten()[:8].cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _adapters(module: nn.Module) -> Iterator[tuple[str, list[Any]]]:
    """Of every layer with LoRAs, how strongly each acts, where that is not as each was made."""
    for key, layer in module.named_modules():
        scaling, active = getattr(layer, "scaling", None), getattr(layer, "active_adapters", None)
        if isinstance(scaling, dict) and active is not None and hasattr(layer, "lora_alpha"):
            alphas: Any = layer.lora_alpha
            ranks: Any = layer.r
            made = {name: alphas[name] / ranks[name] for name in scaling}
            off = getattr(layer, "disable_adapters", False)
            acting = {name: 0.0 if off or name not in active else scaling[name] for name in scaling}
            if acting != made:
                yield key, sorted(acting.items())


def digest(key: Any) -> str:
    """A short hash of anything JSON can hold, and of tensors, whose text leaves most of their numbers out."""

    def text(value: Any) -> str:
        return f"{value.dtype} {tuple(value.shape)} {checksum(value)}" if isinstance(value, Tensor) else str(value)

    return hashlib.sha256(json.dumps(key, sort_keys=True, default=text).encode()).hexdigest()[:16]


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
