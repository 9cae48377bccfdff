"""Random ODEs whose solutions are polynomials (DyWeight eqs. (A.16)-(A.17))."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

D = 50


@dataclass(frozen=True)
class Problems:
    """P couplings A, each with G polynomials of different degrees.

    The coordinates are the real and the imaginary parts of A's modes: there A is two elementwise products, ten times
    as fast as a matrix.

    Attributes:
        growth, turn: (P, M, 1), A z = growth * z + turn * (z with its halves exchanged).
        enter, leave: (P, M, D) and (P, D, M) into the coordinates and out of them.
        polynomials: (P, D, G, highest degree + 1) C.
    """

    growth: Tensor
    turn: Tensor
    enter: Tensor
    leave: Tensor
    polynomials: Tensor

    @classmethod
    def random(cls, degrees: Sequence[int], count: int, seed: int) -> Problems:
        """The paper's. Of two conjugate modes one is kept, with twice its part."""
        generator, k = torch.Generator().manual_seed(seed), torch.arange(max(degrees) + 1)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        values, vectors = torch.linalg.eig(0.1 / D**0.5 * draw(count, D, D) - 0.5 * torch.eye(D, dtype=torch.float64))
        polynomials = 2 * draw(count, D, len(degrees), len(k)) * (k <= torch.tensor(degrees)[:, None])
        kept = values.imag.argsort(descending=True)[:, : int((values.imag >= 0).sum(1).max())]
        enter = torch.linalg.inv(vectors).take_along_dim(kept[:, :, None], 1)
        values = values.take_along_dim(kept, 1)
        leave = vectors.take_along_dim(kept[:, None], 2) * (1 + values.imag.sign())[:, None]
        growth = torch.cat([values.real, values.real], 1)[:, :, None]
        turn = torch.cat([-values.imag, values.imag], 1)[:, :, None]
        enter, leave = torch.cat([enter.real, enter.imag], 1), torch.cat([leave.real, -leave.imag], 2)
        return cls(growth, turn, enter, leave, polynomials)

    def solution(self, steps: int) -> tuple[Tensor, Tensor]:
        """(steps + 1, P, D, G) y* and y*' on equal steps."""
        k = torch.arange(self.polynomials.shape[-1], dtype=torch.float64)
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:, None]
        exact, rates = torch.einsum(
            "pdgk,bsk->bspdg", self.polynomials, torch.stack([t**k, k * t ** (k - 1).clamp(min=0)])
        )
        return exact, rates
