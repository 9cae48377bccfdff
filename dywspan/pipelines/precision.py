"""The precision that a pipeline computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from .networks import place

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(pipe: Any, precision: str | None) -> AbstractContextManager[Any]:
    """The pipeline computes in this precision within: "no", "bf16" or "fp16"."""
    dtype = PRECISIONS[precision or "no"]
    return torch.autocast(place(pipe).type, dtype or torch.bfloat16, enabled=dtype is not None)


@contextmanager
def fast_and_safe() -> Iterator[None]:
    """On CUDA: TF32 in float32 products, and no attention by cuDNN, whose backward pass fails on FLUX's layout.

    It ends in "mha_graph.execute(...).is_good()" or an illegal memory access with torch 2.11 and cuDNN 9.19.
    """
    products, attention = torch.backends.cuda.matmul, torch.backends.cuda
    before = products.allow_tf32, attention.cudnn_sdp_enabled()
    products.allow_tf32 = True
    attention.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        products.allow_tf32 = before[0]
        attention.enable_cudnn_sdp(before[1])
