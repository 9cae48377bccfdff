"""A pipeline's networks: which are asked at every step, where and in what they compute, what stands around a call.

A pipeline may be quantised, compiled, offloaded or modular, and its networks may be of anybody's classes.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

_TIME = re.compile(r"(^|_)(t|r|sigmas?|time|times|timesteps?)(_|$)")  # names of the argument that is the time


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """What a pipeline asks at every step, by name.

    These are the networks that are told the time: an argument of their ``forward`` is named so, or its arguments have
    no names of their own. If there is none, those count that diffusers does not know, whatever they call their
    arguments. Autoencoders, which have ``decode``, and the networks of transformers (text and image encoders, safety
    checkers) are asked before or after the steps.
    """
    found = {k: m for k, m in pipe.components.items() if isinstance(m, nn.Module) and not _decodes_or_encodes(m)}
    told = {k: m for k, m in found.items() if _is_told_the_time(m)}
    return told or {k: m for k, m in found.items() if not _comes_from(core(m), "diffusers")}


def core(module: nn.Module) -> nn.Module:
    """What it is a wrapper of, as ``torch.compile``, PEFT and data parallelism make them; else itself."""
    while not (_comes_from(module, "diffusers") or _comes_from(module, "transformers")):
        children = [*module.children()]
        if len(children) != 1 or any(True for _ in module.parameters(recurse=False)):
            break
        if not _is_nameless(module):
            break
        (module,) = children
    return module


def _decodes_or_encodes(module: nn.Module) -> bool:
    inner = core(module)
    return hasattr(inner, "decode") or any(kind.__module__.startswith("transformers.") for kind in type(inner).__mro__)


def _comes_from(module: nn.Module, package: str) -> bool:
    return type(module).__module__.startswith(f"{package}.")


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    try:  # of the class: an instance's may be a hook's
        return [*inspect.signature(type(module).forward).parameters.values()][1:]
    except (AttributeError, TypeError, ValueError):  # scripted
        return []


def _is_nameless(module: nn.Module) -> bool:
    """Whether it takes whatever comes and hands it on."""
    return all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in _parameters(module))


def _is_told_the_time(module: nn.Module) -> bool:
    inner = core(module)
    if _is_nameless(inner):
        return not _comes_from(inner, "diffusers")
    # A switch, such as a vocoder's ``time_last``, is no time.
    return any(_TIME.search(p.name) and not isinstance(p.default, bool) for p in _parameters(inner))


# ------------------------------------------------------------------------------------------------------ around a call


@contextmanager
def wrapped(
    modules: Iterable[nn.Module], wrap: Callable[[Callable[..., Any]], Callable[..., Any]], inside: bool = False
) -> Iterator[None]:
    """``module(...)`` is ``wrap`` of what it was within, and as it was afterwards; nests.

    The call is wrapped and not ``forward``, which accelerate's hooks put back when they are taken off, as model
    offloading does after each of a pipeline's calls, and which a compiled module may never look up again. ``__call__``
    asks the instance for ``_compiled_call_impl`` first. What is not of a module itself, ``OptimizedModule`` writes
    into the one it compiled: hence ``vars``.

    Args:
        inside: wrap ``forward``, within all hooks: those that gather a sharded block's weights must not run twice.
    """
    name, usual = ("forward", "forward") if inside else ("_compiled_call_impl", "_call_impl")
    before = [(module, vars(module).get(name)) for module in modules]
    for module, former in before:
        vars(module)[name] = wrap(former or getattr(module, usual))
    try:
        yield
    finally:
        for module, former in before:
            if former is None:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = former


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
