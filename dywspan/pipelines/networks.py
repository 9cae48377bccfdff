"""A pipeline's networks: which are asked at every step, where and in what they compute, what stands around a call.

A pipeline may be quantised, compiled, offloaded or modular, and its networks may be of anybody's classes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..schedulers.calls import call_parameters, comes_from, core, is_nameless, wrapped

TIME = re.compile(r"(^|_)(t|r|sigmas?|time|times|timesteps?)(_|$)")  # names of the argument that is the time


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """What a pipeline asks at every step, by name.

    These are the networks that are told the time: an argument of their ``forward`` is named so, or its arguments have
    no names of their own. If there is none, those count that diffusers does not know, whatever they call their
    arguments. Autoencoders, which have ``decode``, and the networks of transformers (text and image encoders, safety
    checkers) are asked before or after the steps.
    """
    found = {k: m for k, m in pipe.components.items() if isinstance(m, nn.Module) and not _decodes_or_encodes(m)}
    told = {k: m for k, m in found.items() if _is_told_the_time(m)}
    return told or {k: m for k, m in found.items() if not comes_from(core(m), "diffusers")}


def _decodes_or_encodes(module: nn.Module) -> bool:
    inner = core(module)
    return hasattr(inner, "decode") or any(kind.__module__.startswith("transformers.") for kind in type(inner).__mro__)


def _is_told_the_time(module: nn.Module) -> bool:
    inner = core(module)
    if is_nameless(inner):
        return not comes_from(inner, "diffusers")
    # A switch, such as a vocoder's ``time_last``, is no time.
    return any(TIME.search(p.name) and not isinstance(p.default, bool) for p in call_parameters(inner))


# ------------------------------------------------------------------------------------------------------ around a call


class Left(BaseException):
    """Not an error: how a pipeline's call is left. No ``Exception``, which modular pipelines report when one passes."""


@contextmanager
def left_at_first_call(pipe: Any, look: Callable[[Any], None] = lambda given: None) -> Iterator[None]:
    """What runs within is left when a denoiser is asked; ``look`` gets what it is given."""

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def leave(*args: Any, **kwargs: Any) -> Any:
            look((args, kwargs))
            raise Left

        return leave

    with wrapped(denoisers(pipe).values(), wrap), suppress(Left):
        yield


# --------------------------------------------------------------------------------------------- where, and in what


def place(pipe: Any, module: nn.Module | None = None) -> torch.device:
    """Where a pipeline computes, or one of its networks: not where weights wait to be moved there.

    That is what pipelines make their latents on, ``_execution_device``; for a network what its hooks say, or where its
    weights are.
    """
    if module is not None:
        for hook in hooks_of(*module.modules()):
            if (device := getattr(hook, "execution_device", None)) is not None:
                return torch.device(device)
        with suppress(ImportError, ValueError):
            from diffusers.hooks.group_offloading import _get_group_onload_device

            return torch.device(_get_group_onload_device(module))
        tensors = (t for own in (module.parameters(), module.buffers()) for t in own)
        if (first := next((t for t in tensors if not t.is_meta), None)) is not None:
            return first.device
    device = torch.device(getattr(pipe, "_execution_device", None) or pipe.device)
    if device.type != "meta" or module is not None:
        return device
    return next((place(pipe, m) for m in denoisers(pipe).values()), device)


def dtype_of(module: nn.Module) -> torch.dtype:
    """What a network computes in: of its weights, those that are no integers or 8 bits, which are widened first."""
    own = getattr(module, "dtype", None)
    known = [own] if isinstance(own, torch.dtype) else []
    known += [t.dtype for t in module.parameters()] + [t.dtype for t in module.buffers()]
    return next((d for d in known if d.is_floating_point and d.itemsize > 1), torch.float32)


def hooks_of(*modules: nn.Module) -> Iterator[Any]:
    """Accelerate's hooks on them, by which weights are moved."""
    for module in modules:
        if (hook := getattr(module, "_hf_hook", None)) is not None:
            yield from getattr(hook, "hooks", [hook])


def stored(module: nn.Module, key: str, value: Any = None) -> Any:
    """A tensor of ``state_dict``; of one that is offloaded, what its hook keeps of it.

    Args:
        value: that of ``state_dict``.
    """
    path = key.split(".")
    if value is None:
        value = functools.reduce(getattr, path, module)
    if not (isinstance(value, Tensor) and value.is_meta):
        return value
    for depth in reversed(range(len(path))):
        owner = functools.reduce(getattr, path[:depth], module)
        for hook in hooks_of(owner):
            if (kept := getattr(hook, "weights_map", None)) is not None:
                with suppress(KeyError):
                    return kept[".".join(path[depth:])]
    return value
