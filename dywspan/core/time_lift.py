"""TimeLift: what each layer of a network is told about the time, moved by learned offsets at each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LARGEST = 1e3  # of an offset: more would be damage


@dataclass(frozen=True, eq=False)
class TimeLift:
    """theta_i = theta + offset_i for the few parameters theta by which a network is modulated, at evaluation i.

    Source: "Three Creates All" (MTEO, arXiv 2603.22375), which learns time embeddings for each step and layer. Moving
    the parameters that such an embedding becomes (biases of modulation layers, tables, factors of norms) is the same
    and more, costs nothing in sampling, and needs no other network.

    Attributes:
        offsets: "component.path.parameter" of the pipeline: (evaluations, *shape of the parameter). Empty until loaded.
        provenance: how it was learned.
    """

    offsets: Mapping[str, Tensor] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def evaluations(self) -> int:
        """Network evaluations of a run; 0 before the offsets are loaded."""
        return next((len(offset) for offset in self.offsets.values()), 0)

    def detach(self) -> TimeLift:
        return TimeLift({name: offset.detach() for name, offset in self.offsets.items()}, self.provenance)


def check_offsets(offsets: Mapping[str, Tensor]) -> None:
    """
    Raises:
        ValueError: offsets for different numbers of evaluations, of integers, not finite, or too large.
    """
    counts = {len(offset) if offset.ndim else 0 for offset in offsets.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"its offsets are for {sorted(counts)} evaluations: they must be for one number of them")
    for name, offset in offsets.items():
        if not offset.dtype.is_floating_point:
            raise ValueError(f"{name} is {offset.dtype}: offsets are floating-point numbers")
        if not bool((offset.abs() <= LARGEST).all()):
            raise ValueError(f"{name} holds numbers that are not finite, or above {LARGEST:g}")
        if offset.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"{name} is {offset.dtype}: use float16, bfloat16 or float32")
