"""One process or many, with the same results: who computes what, and how sums come together.

All processes make the same number of network calls, as a network that is sharded over them needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def _state() -> Any:
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Unlike an Accelerator it does not read this itself, and processes on CPUs would not find each other.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def device() -> str:
    """This process's."""
    return str(_state().device)


def is_main() -> bool:
    """Whether this process prints and writes."""
    return _state().is_main_process


def is_local_main() -> bool:
    """Whether this process does what a machine need do only once."""
    return _state().is_local_main_process


def count() -> int:
    """How many there are."""
    return _state().num_processes


def wait() -> None:
    """Until all processes are here."""
    _state().wait_for_everyone()


def agreed(found: T) -> T:
    """What the main process found, for all: others may see another process's files come and go at another time."""
    from accelerate.utils import broadcast_object_list

    if _state().num_processes == 1:
        return found
    (result,) = broadcast_object_list([found])
    return result


def in_turn(count: int) -> list[tuple[int, bool]]:
    """This process's share of ``count`` tasks, every P-th of them: (task, whether its result counts).

    Where they do not divide, some processes repeat a task whose result another one keeps.
    """
    rank, processes = _state().process_index, _state().num_processes
    return [(task % count, task < count) for task in range(rank, -(-count // processes) * processes, processes)]


def share(samples: Sequence[int]) -> Sequence[int]:
    """This process's part of a batch, as large as every other's.

    Raises:
        ValueError: the batch does not divide by the number of processes.
    """
    rank, processes = _state().process_index, _state().num_processes
    if len(samples) % processes:
        raise ValueError(f"batch_size={len(samples)} must be a multiple of the number of processes, {processes}.")
    return samples[rank::processes]


def total(value: Tensor) -> Tensor:
    """The sum over processes, where ``value`` is: a solver's numbers are on the CPU, and NCCL sums on GPUs only."""
    from accelerate.utils import reduce

    if _state().num_processes == 1:
        return value
    result = reduce(value.to(_state().device), reduction="sum")
    assert isinstance(result, torch.Tensor)
    return result.to(value.device)
