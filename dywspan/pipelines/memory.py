"""How much memory a computation needs: what decides which pipelines can be trained on which machine."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .processes import count, is_main
from .rollout import denoisers

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


class Parts:
    """Computes many samples in parts that fit into memory: after an out-of-memory error in smaller ones.

    Processes that each hold the whole network may end at different sizes. Those that share a sharded one must make the
    same number of calls, so that no process continues in smaller parts by itself.

    Attributes:
        size: samples in a part at most; None: all. What was too many once is not tried again.
    """

    def __init__(self, size: int | None, what: str, setting: str, *, sharded: bool = False) -> None:
        """
        Args:
            what: is computed: "teacher samples".
            setting: that limits the size, named in messages: "teacher_batch_size".
            sharded: the network is shared by all processes, see :func:`is_sharded`.
        """
        self.size, self.what, self.setting = size, what, setting
        self.together = sharded and count() > 1

    def run(self, samples: int | Sequence[int], compute: Callable[[Sequence[int]], T]) -> list[T]:
        """``compute`` of consecutive parts, in order.

        Args:
            samples: how many, or their numbers.
            compute: gets the numbers of a part; called again with fewer when memory does not suffice.

        Raises:
            torch.OutOfMemoryError: one sample alone is too many, or the size must be that of all processes.
        """
        rest: Sequence[int] = range(samples) if isinstance(samples, int) else samples
        results: list[T] = []
        failed: list[int] = []
        while rest:
            part = rest[: self.size or len(rest)]
            try:
                results.append(compute(part))
            except torch.OutOfMemoryError as error:
                if len(part) == 1 or self.together:
                    raise torch.OutOfMemoryError(self._way_out(len(part), error)) from error
                failed.append(len(part))
            if failed and failed[-1] == len(part):
                self.size = -(-len(part) // 2)
                _empty_cache()  # not before the error is gone: it holds what was computed so far
                continue
            if failed and is_main():
                print(
                    f"Out of memory with {failed[0]} {self.what} at a time: going on with {self.size}. "
                    f"{self.setting}={self.size} does so from the start."
                )
            rest, failed = rest[len(part) :], []
        return results

    def _way_out(self, size: int, error: Exception) -> str:
        said = str(error).partition("\n")[0][:300].rstrip(". ")
        lower = f"{self.setting} cannot be lower" if size == 1 else f"lower {self.setting}, for all processes alike"
        return (
            f"Out of memory with {size} {self.what} at a time ({said}): {lower}. A lower resolution (height, width), "
            "dtype bfloat16, release_text_encoders, or from Python an offloaded pipeline need less."
        )


def is_sharded(pipe: Any) -> bool:
    """Whether a denoiser's weights lie on several processes, as FSDP lays them."""
    return any(hasattr(module, "unshard") for model in denoisers(pipe).values() for module in model.modules())


def _empty_cache() -> None:
    gc.collect()
    if torch.accelerator.is_available() and (place := torch.accelerator.current_accelerator()) is not None:
        getattr(torch.get_device_module(place), "empty_cache", lambda: None)()
