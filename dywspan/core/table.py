"""SolverTable: the learned numbers of one solver for one number of steps, which validate themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .bases import BASES, MAX_ORDER
from .grid import make_grid
from .prediction import Epsilon, Prediction
from .step import Schedule

# Grid "discrete" needs a network: this one serves to check its name and parameters before the real one is known.
SOME_NETWORK = Epsilon(torch.linspace(0.999, 0.001, 1000, dtype=torch.float64))


class InvalidSolverError(ValueError):
    """Learned numbers that no network can be sampled with: not finite, or levels below zero or out of order."""


@dataclass(frozen=True, eq=False)
class SolverTable:
    """A DyWeight table (W, s) and the grid it belongs to.

    Attributes:
        weights: (N, K) w_ij, column j multiplies the j-th newest derivative; entries with j > i are zero.
        time_scale: (N,) s_i > 0; with AFS the first entry is never used.
        grid: the nominal grid, see :func:`dywspan.core.grid.make_grid`.
        afs: the first step needs no network call, so N steps cost N - 1 evaluations.
        provenance: where it comes from (base model, guidance scale, teacher, loss, errors, version): free JSON.
        time_shifting: levels follow the weights' sums, DyWeight eq. (9); without it they are the nominal grid's.

    Raises:
        ValueError: wrong shapes, weights on derivatives that do not exist, no such grid.
        InvalidSolverError: non-finite numbers, or s is not positive.
    """

    weights: Tensor
    time_scale: Tensor
    grid: Mapping[str, Any]
    afs: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)
    time_shifting: bool = True

    def __post_init__(self) -> None:
        if self.weights.ndim != 2 or 0 in self.weights.shape:
            raise ValueError(f"weights must be an N x K table; got shape {tuple(self.weights.shape)}.")
        n, _ = self.weights.shape
        if self.time_scale.shape != (n,):
            raise ValueError(f"time_scale needs one entry per step ({n}); got shape {tuple(self.time_scale.shape)}.")
        for name, values in (("weights", self.weights), ("time_scale", self.time_scale)):
            if not bool(values.detach().isfinite().all()):
                raise InvalidSolverError(f"{name} must be finite; got {values.tolist()}.")
        if not bool((self.time_scale.detach() > 0).all()):
            raise InvalidSolverError(f"time_scale must be positive; got {self.time_scale.tolist()}.")
        if bool(self.weights.detach().triu(1)[: self.weights.shape[1]].any()):
            raise ValueError("weights on derivatives that do not exist yet (j > i) must be zero.")
        if self.afs and n < 2:
            raise ValueError("An AFS table needs at least two steps: the first one costs no evaluation.")
        make_grid(self.grid, n, SOME_NETWORK)

    @property
    def num_inference_steps(self) -> int:
        """Network evaluations: what a pipeline calls ``num_inference_steps``."""
        return len(self.weights) - self.afs

    @classmethod
    def initial(
        cls,
        num_inference_steps: int,
        order: int,
        grid: Mapping[str, Any],
        prediction: Prediction,
        *,
        base: str = "ipndm",
        afs: bool = False,
        time_shifting: bool = True,
        mu: float | None = None,
    ) -> SolverTable:
        """An untrained table: the base solver's weights on the grid, s = 1."""
        n = num_inference_steps + afs
        sigmas = make_grid(grid, n, prediction, mu)
        weights = base_weights(base, sigmas, prediction, order)
        return cls(weights, torch.ones(n, dtype=torch.float64), dict(grid), afs, time_shifting=time_shifting)

    def schedule(self, prediction: Prediction, mu: float | None = None) -> Schedule:
        """The table on its grid.

        Raises:
            InvalidSolverError: the learned numbers lead to a level at which a network cannot be asked.
        """
        sigmas = make_grid(self.grid, len(self.weights), prediction, mu)
        numbers = self.weights.double(), self.time_scale.double()
        schedule = Schedule.from_weights(sigmas, *numbers, self.afs, self.time_shifting)
        if not bool((schedule.queries.detach() > 0).all()):
            raise InvalidSolverError(
                f"The table for num_inference_steps={self.num_inference_steps} asks the network at noise levels "
                f"{schedule.queries.tolist()}; all must be positive. "
                "Check that the weights belong to this grid."
            )
        return schedule


def base_weights(base: str, sigmas: Tensor, prediction: Prediction, order: int) -> Tensor:
    """(N, K) rows of a base solver with K = ``order``.

    Raises:
        ValueError: no such base.
    """
    if base not in BASES:
        raise ValueError(f"Unknown base solver {base!r}: use one of {sorted(BASES)}.")
    rows = BASES[base](sigmas, prediction.signal(sigmas), min(order, MAX_ORDER[base]))
    columns = min(order, rows.shape[1])
    # A base that looks back further than K: the rest goes to the oldest derivative, so that rows keep their sum.
    oldest = rows[:, columns - 1 :].sum(1, keepdim=True)
    return pad(torch.cat([rows[:, : columns - 1], oldest], 1), (0, order - columns))
