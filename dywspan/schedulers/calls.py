"""A network behind its wrappers, and what stands around its calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


def core(module: nn.Module) -> nn.Module:
    """What it is a wrapper of, as ``torch.compile``, PEFT and data parallelism make them; else itself."""
    while not (comes_from(module, "diffusers") or comes_from(module, "transformers")):
        children = [*module.children()]
        if len(children) != 1 or any(True for _ in module.parameters(recurse=False)):
            break
        if not is_nameless(module):
            break
        (module,) = children
    return module


def comes_from(module: nn.Module, package: str) -> bool:
    """Whether its class is of a package."""
    return type(module).__module__.startswith(f"{package}.")


def call_parameters(module: nn.Module) -> list[inspect.Parameter]:
    """Those of its ``forward``."""
    try:  # of the class: an instance's may be a hook's
        return [*inspect.signature(type(module).forward).parameters.values()][1:]
    except (AttributeError, TypeError, ValueError):  # scripted
        return []


def is_nameless(module: nn.Module) -> bool:
    """Whether it takes whatever comes and hands it on."""
    return all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in call_parameters(module))


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


def moves_by_groups(network: nn.Module) -> bool:
    """Whether diffusers' group offloading copies its weights to the device when they are needed."""
    try:
        from diffusers.hooks.group_offloading import _is_group_offload_enabled
    except ImportError:
        return False
    return _is_group_offload_enabled(network)


@dataclass(frozen=True, eq=False)
class Told:
    """What a network computes with in a call besides its arguments and its own weights.

    Attributes:
        values: the tensors.
        within: a context in which the call can be repeated.
    """

    values: Sequence[Tensor]
    within: Callable[[], AbstractContextManager[Any]]


TOLD: ContextVar[Told | None] = ContextVar("TOLD", default=None)  # of the call that is going on
