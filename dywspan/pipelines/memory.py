"""How much memory a computation needs: what decides which pipelines can be trained on which machine."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


def peak_bytes(run: Callable[[], T], device: torch.device | str = "cpu") -> tuple[T, int]:
    """Run and measure: peak = max_t (bytes of tensors alive at t) - (bytes alive before).

    What autograd saves and what a checkpoint recomputes in ``backward`` counts; weights that were there do not.

    On the CPU the storages that operators return are counted, byte for byte; what an operator uses inside itself and
    what ``resize_`` adds is not seen. Elsewhere the allocator's own statistics are read, in its blocks.

    Args:
        run: called once, without arguments.
        device: where the tensors live.

    Returns:
        What ``run`` returned, and the peak in bytes.

    Raises:
        ValueError: the device's allocator keeps no peak.
    """
    if torch.device(device).type == "cpu":
        with _Storages() as storages:
            return run(), storages.peak
    allocator: Any = torch.get_device_module(device)
    if not hasattr(allocator, "reset_peak_memory_stats"):
        raise ValueError(f"device={str(device)!r} keeps no statistics of its memory: measure on cpu, cuda or xpu.")
    allocator.reset_peak_memory_stats(device)
    before = allocator.memory_allocated(device)
    result = run()
    return result, allocator.max_memory_allocated(device) - before


class _Storages(TorchDispatchMode):
    """Counts each storage from the operator that made it until it is freed, by whoever held it last.

    Modes are per thread; the CPU's backward pass runs in the thread that asked for it, so that it is seen too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = _by_id((args, kwargs))  # a view or an in-place result is no new storage
        for key, storage in _by_id(result).items():
            if key not in known:
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes()).atexit = False
        return result

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


def _by_id(tree: Any) -> dict[int, torch.UntypedStorage]:
    storages = (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {storage._cdata: storage for storage in storages}
