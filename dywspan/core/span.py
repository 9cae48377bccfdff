"""The linear span of past derivatives: what of a step lies in it, which is all that scalar weights reach."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def project(vectors: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """Pi_V v, the part of each sample's vector in the span V of its own basis. Source: SpanLift section 3.1.

    Args:
        vectors: (B, ...).
        basis: K tensors of the same shape; they may depend on each other.

    Returns:
        (B, ...) float64.
    """
    columns = torch.stack([v.flatten(1) for v in basis], 2)
    smallest = 10 * torch.finfo(columns.dtype).eps  # of what float32 tells from 0
    left, sizes, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    left = left * (sizes > smallest * sizes[:, :1])[:, None]
    inside = left @ (left.mT @ vectors.double().flatten(1)[:, :, None])
    return inside.reshape(vectors.shape)


def norm(vectors: Tensor) -> Tensor:
    """(B,) |v| of each sample."""
    return vectors.double().flatten(1).norm(dim=1)
