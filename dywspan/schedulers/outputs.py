"""What schedulers hand to pipelines: numbers that tell when they are used, and outputs made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor


class Factor(float):
    """A number that tells when something is multiplied by it; to look at it, print or compare it tells nothing.

    ``__torch_function__`` is called by torch for every operation that the factor takes part in.
    """

    __array_ufunc__ = None  # numpy leaves the product to __rmul__
    value: float | Tensor
    told: Callable[[], None]

    @classmethod
    def of(cls, value: float | Tensor, told: Callable[[], None]) -> Factor:
        """``value``, a 0-dim tensor where a gradient is wanted, and what is called when it is used."""
        factor = cls(value.detach() if isinstance(value, Tensor) else value)
        factor.value, factor.told = value, told
        return factor

    def __mul__(self, other: Any) -> Any:
        self.told()
        return other * self.value

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            if isinstance(value, Factor):
                value.told()
                return value.value
            return value

        return func(*map(plain, args), **{k: plain(v) for k, v in (kwargs or {}).items()})

    def __reduce__(self) -> Any:
        return float, (float(self),)


@dataclass
class SolverOutput(SchedulerOutput):
    """What ``step`` returns.

    Attributes:
        prev_sample: the next sample.
        estimate: makes ``pred_original_sample``, the network's estimate of x0, of the sample's shape and dtype.
    """

    prev_sample: Tensor

    def __init__(self, prev_sample: Tensor, estimate: Callable[[], Tensor]) -> None:
        self.prev_sample = prev_sample
        self.__post_init__()
        object.__setattr__(self, "_estimate", estimate)

    @property
    def pred_original_sample(self) -> Tensor:
        return self._estimate()  # type: ignore[attr-defined]


class SolverTuple(tuple):
    """(prev_sample, pred_original_sample) of ``step(..., return_dict=False)``; the second is made when asked for."""

    def __new__(cls, prev_sample: Tensor, estimate: Callable[[], Tensor]) -> SolverTuple:
        made = super().__new__(cls, (prev_sample, None))
        made.estimate = estimate  # type: ignore[attr-defined]
        return made

    def __getitem__(self, index: Any) -> Any:
        if index in (0, -2):
            return super().__getitem__(0)
        return tuple(self)[index]

    def __iter__(self) -> Iterator[Tensor]:
        yield super().__getitem__(0)
        yield self.estimate()  # type: ignore[attr-defined]


def answer(
    prev_sample: Tensor, estimate: Callable[[], Tensor], return_dict: bool
) -> SchedulerOutput | tuple[Tensor, Tensor]:
    """What ``step`` returns."""
    if torch.compiler.is_compiling():  # a graph cannot hold what is made when asked for
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample, estimate())
    return SolverOutput(prev_sample, estimate) if return_dict else SolverTuple(prev_sample, estimate)
