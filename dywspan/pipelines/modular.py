"""Modular pipelines: what their call takes, and gradients through it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..schedulers.bind import is_modular


@contextmanager
def differentiable(pipe: Any) -> Iterator[None]:
    """Within, the blocks of a modular pipeline compute with gradients, if they are enabled where this is entered.

    Its call and each block's switch them off. Blocks get a class of their own for the time, whose call is the
    undecorated one with gradients on.
    """
    if not is_modular(pipe) or not torch.is_grad_enabled():
        yield
        return
    kinds = [(block, type(block)) for block in blocks_of(pipe)]
    for block, kind in kinds:
        block.__class__ = _with_gradients(kind)
    try:
        yield
    finally:
        for block, kind in kinds:
            block.__class__ = kind


def undecorated(call: Any) -> Any:
    """A function without the ``torch.no_grad()`` around it; other decorators stay."""
    while getattr(getattr(call, "__code__", None), "co_name", "") == "decorate_context":
        call = call.__wrapped__
    return call


def blocks_of(pipe: Any) -> list[Any]:
    """The blocks of a modular pipeline, and those that they consist of; none of another one."""
    found: dict[int, Any] = {}
    left = [pipe._blocks] if is_modular(pipe) else []
    while left:
        block = left.pop()
        if id(block) not in found:
            found[id(block)] = block
            left += getattr(block, "sub_blocks", {}).values()
    return [*found.values()]


@functools.cache
def _with_gradients(kind: type) -> type:
    inner = undecorated(kind.__call__)

    @functools.wraps(inner)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            return inner(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, "__doc__": kind.__doc__})
