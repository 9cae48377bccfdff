"""The precision that a pipeline computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from .networks import place

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(pipe: Any, precision: str | None) -> AbstractContextManager[Any]:
    """The pipeline computes in this precision within: "no", "bf16" or "fp16"."""
    dtype = PRECISIONS[precision or "no"]
    return torch.autocast(place(pipe).type, dtype or torch.bfloat16, enabled=dtype is not None)
