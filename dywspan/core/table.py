"""SolverTable: the learned numbers of one solver for one number of steps, which validate themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .bases import BASES, multistep
from .check import MAX_STEPS, shown, whole
from .grid import make_grid
from .prediction import PREDICTIONS, Epsilon, Prediction
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
        convention: what its levels mean ("vp", "edm" or "flow", see :class:`Prediction`); None: not written down, as in
            files before 0.2.

    Raises:
        ValueError: wrong shapes, no such convention, weights on derivatives that do not exist, no such grid.
        InvalidSolverError: non-finite numbers, or s is not positive.
    """

    weights: Tensor
    time_scale: Tensor
    grid: Mapping[str, Any]
    afs: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)
    time_shifting: bool = True
    convention: str | None = None

    def __post_init__(self) -> None:
        check_name(self.convention)
        if self.weights.ndim != 2 or 0 in self.weights.shape:
            raise ValueError(f"weights must be an N x K table; got shape {tuple(self.weights.shape)}.")
        n = whole("number of steps N", len(self.weights), 1, MAX_STEPS)
        if self.time_scale.shape != (n,):
            raise ValueError(f"time_scale needs one entry per step ({n}); got shape {tuple(self.time_scale.shape)}.")
        for name, values in (("weights", self.weights), ("time_scale", self.time_scale)):
            if not bool(values.detach().isfinite().all()):
                raise InvalidSolverError(f"{name} must be finite; got {shown(values.tolist())}.")
        if not bool((self.time_scale.detach() > 0).all()):
            raise InvalidSolverError(f"time_scale must be positive; got {shown(self.time_scale.tolist())}.")
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
        ones, kind = torch.ones(n, dtype=torch.float64), prediction.convention
        return cls(weights, ones, dict(grid), afs, time_shifting=time_shifting, convention=kind)

    def nominal(self, prediction: Prediction, mu: float | None = None) -> Tensor:
        """(N+1,) the levels of its grid; a table whose levels are being learned gives them with their graph."""
        return make_grid(self.grid, len(self.weights), prediction, mu)

    def check_convention(self, prediction: Prediction) -> None:
        """Learned numbers mean something to networks of one convention only.

        Raises:
            ValueError: this network is of another.
        """
        check_convention(self.convention, self.grid, prediction, f"The table for {self.num_inference_steps} steps")

    def schedule(self, prediction: Prediction, mu: float | None = None) -> Schedule:
        """The table on its grid.

        Raises:
            ValueError: the network is of another convention than the table.
            InvalidSolverError: the learned numbers lead to a level at which a network cannot be asked.
        """
        self.check_convention(prediction)
        sigmas = self.nominal(prediction, mu)
        numbers = self.weights.double(), self.time_scale.double()
        schedule = Schedule.from_weights(sigmas, *numbers, self.afs, self.time_shifting)
        queries = schedule.queries.detach()
        if not bool((schedule.levels.detach().abs() <= _LARGEST).all() and (queries <= _LARGEST).all()):
            raise InvalidSolverError(
                f"The table for num_inference_steps={self.num_inference_steps} leads to noise levels above "
                f"{_LARGEST:g}: {schedule.levels.tolist()}."
            )
        if not bool((queries > 0).all()):
            raise InvalidSolverError(
                f"The table for num_inference_steps={self.num_inference_steps} asks the network at noise levels "
                f"{queries.tolist()}; all must be positive. "
                "Check that the weights belong to this grid."
            )
        times = prediction.timestep(queries)
        if prediction.steps is not None and not bool((times.abs() < _FAR * prediction.steps).all()):
            raise InvalidSolverError(
                f"The table for num_inference_steps={self.num_inference_steps} tells the network the times "
                f"{times.tolist()}, and it knows those from 0 to {prediction.steps}. Is it of another network?"
            )
        return schedule


_LARGEST = 1e9  # of a level: far beyond any network's, and far below what float32 holds
_FAR = 1.5  # a learned time may lie a little beyond the last that the network was trained on


def check_name(convention: Any) -> None:
    """Raises ValueError: it is no convention's name."""
    known = sorted({p.convention for p in PREDICTIONS.values()})
    if convention is not None and convention not in known:
        raise ValueError(f"convention={shown(convention)} is not one of {known}.")


def check_convention(convention: str | None, grid: Mapping[str, Any], prediction: Prediction, what: str) -> None:
    """Learned numbers on a network; where their convention is not written down, their grid tells flow from the rest.

    Raises:
        ValueError: they are of another convention.
    """
    if convention is None:
        sigmas = grid.get("sigmas")
        flow = grid.get("name") == "flow" or (sigmas is not None and sigmas[0] == 1)
        convention = "flow" if flow else None
    if convention is not None and convention != prediction.convention:
        raise ValueError(
            f"{what} was learned for networks of convention {convention!r}, and this one is of "
            f"{prediction.convention!r}: its levels and times mean something else there. Load a solver of this model."
        )


def base_weights(base: str, sigmas: Tensor, prediction: Prediction, order: int) -> Tensor:
    """(N, K) rows of a base solver with K = ``order``.

    Raises:
        ValueError: no such base.
    """
    if base not in multistep():
        raise ValueError(f"Unknown base solver {base!r}: use one of {sorted(multistep())}.")
    rows = BASES[base](sigmas, prediction.signal(sigmas), min(order, BASES[base].highest))
    columns = min(order, rows.shape[1])
    # A base that looks back further than K: the rest goes to the oldest derivative, so that rows keep their sum.
    oldest = rows[:, columns - 1 :].sum(1, keepdim=True)
    return pad(torch.cat([rows[:, : columns - 1], oldest], 1), (0, order - columns))
