"""Whether gradients pass through a pipeline, asked of its layers before anything is learned by them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..schedulers.calls import moves_by_groups
from .networks import denoisers, dtype_of, hooks_of, place

_WAY_OUT = "learn by optimizer='least_squares', which needs forward passes only"
_ERROR = 0.2  # of a slope, between 8-bit numbers and none


def check_gradients(pipe: Any, recompute: bool = True) -> None:
    """Gradients of what the pipeline samples are there, and right.

    Layers that are quantised, or of classes that are not PyTorch's, are tried, one of each kind: some have no backward
    pass, and leave gradients that are wrong where others go around them. Sequentially offloaded weights are copied when
    they are needed and stay until the backward pass has used them: with ``recompute``, those of one call. Weights that
    are moved, not copied, are gone by then, unless the whole network is recomputed at once. See also what
    :func:`dywspan.pipelines.rollout.rollout` raises.

    Args:
        recompute: as of :func:`dywspan.pipelines.rollout.frozen`.

    Raises:
        ValueError: they are not; says why, and what to do.
    """
    kind = type(pipe).__name__
    for name, network in denoisers(pipe).items():
        device = place(pipe, network)
        if device.type != "cpu" and moves_by_groups(network):
            raise ValueError(
                f"{kind}: the weights of its {name} are offloaded by groups, and gone when gradients are taken: "
                f"offload by enable_sequential_cpu_offload or, with recompute, enable_model_cpu_offload; or {_WAY_OUT}."
            )
        if device.type != "cpu" and not recompute and _moves_whole(network):
            raise ValueError(
                f"{kind}: its {name} is offloaded after each call, and gone when gradients are taken: set recompute, "
                f"or {_WAY_OUT}."
            )
        for path, layer in _unknown_layers(network):
            if reason := _wrong_with(layer, device, dtype_of(network)):
                raise ValueError(
                    f"{kind}: gradients do not pass through {name}.{path}, a {type(layer).__name__}: {reason}. Load "
                    f"the {name} unquantised, or {_WAY_OUT}."
                )


def _moves_whole(network: nn.Module) -> bool:
    return any(not hasattr(hook, "weights_map") for hook in hooks_of(network))


def _unknown_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """One of each kind of linear map and convolution, but for PyTorch's own of plain numbers."""
    seen = set()
    for path, layer in network.named_modules():
        weight = getattr(layer, "weight", None)
        plain = isinstance(weight, Tensor) and type(weight) in (Tensor, nn.Parameter)
        own = type(layer).__module__.startswith("torch.nn.modules.")
        kind = type(layer), type(weight), getattr(weight, "dtype", None)
        if _input_shape(layer) and not (own and plain) and kind not in seen:
            seen.add(kind)
            yield path, layer


def _input_shape(layer: Any) -> tuple[int, ...]:
    if isinstance(width := getattr(layer, "in_features", None), int):
        return 4, width
    channels, size = (getattr(layer, name, None) for name in ("in_channels", "kernel_size"))
    return (1, channels, *size) if isinstance(channels, int) and isinstance(size, tuple) else ()


def _wrong_with(layer: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Its slope at some point along some direction d, (J'Jd, d), is |Jd|^2: it is linear."""
    draw, shape = torch.Generator().manual_seed(0), _input_shape(layer)
    x, d = (torch.randn(shape, generator=draw).to(device, dtype) for _ in range(2))
    try:
        with torch.no_grad():
            change = (layer(x + d).float() - layer(x - d).float()) / 2
    except Exception:  # not to be called alone: sampling will tell
        return None
    try:
        with torch.enable_grad():
            output = layer(x.requires_grad_())
            slopes = None
            if output.requires_grad:
                (slopes,) = torch.autograd.grad((output.float() * change).sum(), x, allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        return str(error).partition("\n")[0]
    if slopes is None:
        return "what it returns has none"
    found, expected = float((slopes.float() * d.float()).sum()), float(change.square().sum())
    if abs(found - expected) > _ERROR * expected:
        return f"its slope is {found:.3g} where differences say {expected:.3g}"
    return None
