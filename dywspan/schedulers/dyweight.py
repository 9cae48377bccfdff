"""DyWeightScheduler: a learned weight table, or any classical multistep solver, behind diffusers' interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import logging
from torch import Tensor

from ..artifact import continuous_to_json, read_continuous, read_tables, table_to_json, warn_if_newer
from ..core.bases import BASES, MAX_ORDER
from ..core.continuous import ContinuousTable, check_guidance_scale
from ..core.grid import make_grid
from ..core.step import TWO_STAGE, Schedule
from ..core.table import SolverTable
from ..version import __version__
from .base import SolverScheduler

logger = logging.get_logger(__name__)


class DyWeightScheduler(SolverScheduler):
    """Multistep solver from a table: learned (DyWeight) where a table exists for the number of steps, else classical.

        pipe.scheduler = DyWeightScheduler.from_pretrained("org/solvers-for-my-model")
        pipe.scheduler = DyWeightScheduler.from_config(pipe.scheduler.config, solver="ipndm", order=3)

    Source: DyWeight (arXiv 2603.11607). Between steps the sample is kept scaled as the network wants it, so pipelines
    that never call ``scale_model_input`` work. The levels told to the network, time shifting and scaling included,
    depend on the table alone: they are published as ``timesteps``.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, timestep_spacing, steps_offset: as in
            diffusers. All other keys of the pipeline's own scheduler are kept when made by :meth:`from_config`.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction".
        base_image_seq_len, max_image_seq_len, base_shift, max_shift: read by pipelines whose shift depends on size.
        host_scheduler: diffusers class that knows the noise schedule and default grid (set by :meth:`from_config`).
        solver: classical solver for step counts without a table: one of ``BASES`` or ``TWO_STAGE`` ("heun", "dpm2").
            Without it, other step counts are an error; with no tables either, it is "ipndm".
        order: of the classical solver.
        lower_order_final: lower the order of its last steps, as diffusers does (dpmpp, deis, unipc).
        grid: its grid (see :func:`dywspan.core.grid.make_grid`); the pipeline's own by default.
        tables: ``{num_inference_steps: table}``, see :mod:`dywspan.artifact`.
        continuous: the table of every other number of steps, see :class:`dywspan.core.continuous.ContinuousTable`.
        dywspan_version: version that wrote the file.

    Raises:
        ValueError: a damaged table, an unknown solver, order or prediction type.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 1,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        host_scheduler: str | None = None,
        solver: str | None = None,
        order: int = 2,
        lower_order_final: bool = True,
        grid: dict[str, Any] | None = None,
        tables: dict[str, Any] | None = None,
        continuous: dict[str, Any] | None = None,
        dywspan_version: str = __version__,
    ) -> None:
        if solver is not None and solver not in BASES and solver not in TWO_STAGE:
            raise ValueError(f"Unknown solver {solver!r}: use one of {sorted([*BASES, *TWO_STAGE])}.")
        if type(order) is not int:
            raise ValueError(f"order={order!r} must be a whole number.")
        if solver in MAX_ORDER and not 1 <= order <= max(MAX_ORDER[solver], 2):
            raise ValueError(f"order={order} is out of range for {solver!r}: 1 to {MAX_ORDER[solver]}.")
        warn_if_newer(dywspan_version)
        self.tables: dict[int, SolverTable] = read_tables(tables)
        self.continuous: ContinuousTable | None = read_continuous(continuous)
        self.nominal: Tensor | None = None  # the grid that the continuous one wrote its last table for
        self.guidance_scale: float | None = None
        self.whole: int | None = None  # steps of the whole way, if its continuous one is to write the end of it only
        self._prepare(num_train_timesteps)

    # ------------------------------------------------------------------ configuration

    def with_tables(self, tables: Sequence[SolverTable]) -> DyWeightScheduler:
        """A copy that holds ``tables`` besides its own (same step count: replaced)."""
        merged = {t.num_inference_steps: t for t in [*self.tables.values(), *tables]}
        data = {str(n): table_to_json(merged[n]) for n in sorted(merged)}
        return type(self).from_config(self.config, tables=data, dywspan_version=__version__)

    def with_continuous(self, table: ContinuousTable) -> DyWeightScheduler:
        """A copy that takes from ``table`` what its own tables do not have."""
        return type(self).from_config(self.config, continuous=continuous_to_json(table), dywspan_version=__version__)

    # ------------------------------------------------------------------ the schedule

    def set_guidance_scale(self, guidance_scale: float | None) -> None:
        """Say what the pipeline guides by, for continuous solvers that depend on it.

        It counts from the next ``set_timesteps`` on; kept by copies, not saved. :func:`dywspan.bind` makes the pipeline
        say it at every call.

        Args:
            guidance_scale: g, 1 without guidance; None: that it was learned around.

        Raises:
            ValueError: it is not positive.
        """
        check_guidance_scale(guidance_scale)
        self.guidance_scale = guidance_scale

    @property
    def order(self) -> int:
        """Evaluations per step: 1, or 2 for "heun" and "dpm2". Not the numerical order."""
        learned = self.continuous is not None or self.num_inference_steps in self.tables
        return 2 if self._solver in TWO_STAGE and not learned else 1

    @property
    def _solver(self) -> str | None:
        return self.config["solver"] or (None if self.tables or self.continuous else "ipndm")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the number of steps; clears all run state.

        Args:
            num_inference_steps: network evaluations (steps, for two-stage solvers).
            device: where ``timesteps`` lives.
            timesteps, sigmas: a custom grid. A learned table has its own: only their number counts then.
            mu: the pipeline's resolution-dependent shift.

        Raises:
            ValueError: no table for this number of steps and no classical solver to fall back on, or ``timesteps`` and
                ``sigmas`` given together.
        """
        if timesteps is not None and sigmas is not None:
            raise ValueError(
                "Times apart from levels (timesteps and sigmas given together, as CogView4 and GLM-Image do) are not "
                "supported: the network's time must follow from its noise level. Give one of them."
            )
        custom = sigmas if sigmas is not None else timesteps
        n = int(num_inference_steps) if num_inference_steps is not None else len(custom) if custom is not None else 0
        if n < 1:
            raise ValueError(f"num_inference_steps must be at least 1; got {num_inference_steps}.")
        self.num_inference_steps = n
        table = self.tables.get(n)
        if table is not None and custom is not None:
            logger.info("The table for %d steps has its own grid: the given values are not used.", n)
        if table is None and self.continuous is not None:
            if custom is None or self.whole is not None:
                levels = make_grid(self.continuous.grid, self.whole or n, self.host.prediction, mu)
                self.nominal = levels[-n - 1 :]
            else:
                self.nominal = self.host.grid(num_inference_steps, sigmas, timesteps, mu)
            self._grid, schedule = None, self._written(0)
        elif table is not None:
            self._grid, schedule = None, table.schedule(self.host.prediction, mu)
        elif self._solver is not None:
            spec = self.config["grid"]
            if spec is None or custom is not None:
                self._grid = self.host.grid(num_inference_steps, sigmas, timesteps, mu)
            else:
                self._grid = make_grid(spec, n, self.host.prediction, mu)
            schedule = self._classical(self._grid)
        else:
            raise ValueError(
                f"No table for num_inference_steps={n}: this solver was learned for {sorted(self.tables)} steps. "
                "Use one of these, or from_config(scheduler.config, solver='ipndm') for any number of steps."
            )
        self._publish(schedule, device)

    def _written(self, begin: int) -> Schedule:
        """What the continuous table writes for the levels from ``begin`` on; steps before it take nobody anywhere."""
        assert self.continuous is not None and self.nominal is not None
        # diffusers' Euler takes sigmas with the last one, of no step: not their number counts then.
        whole, rest = self.whole or len(self.nominal) - 1, self.nominal[begin:]
        call: dict[str, Any] = {"guidance_scale": self.guidance_scale, "whole": whole}
        table = self.continuous.table(len(rest) - 1, self.host.prediction, sigmas=rest, **call)
        schedule = table.schedule(self.host.prediction)
        before, none = self.nominal[:begin], schedule.increments.new_zeros(begin, schedule.increments.shape[1])
        return Schedule(
            levels=torch.cat([before, schedule.levels]),
            queries=torch.cat([before, schedule.queries]),
            increments=torch.cat([none, schedule.increments]),
            sizes=torch.cat([none[:, 0], schedule.sizes]),
        )

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start here. A continuous table is written anew, for the levels that are left.

        The pipeline has its part of ``timesteps`` by then: they change in place.
        """
        written = self._schedule is not None and self._grid is None and self.num_inference_steps not in self.tables
        if written and begin_index != self._rows_begin and 0 <= begin_index < len(self.timesteps):
            taken = self.timesteps
            self._publish(self._written(begin_index), taken.device, begin_index)
            with torch.no_grad():
                taken.copy_(self.timesteps)
            self.timesteps = self._clock = taken
        super().set_begin_index(begin_index)

    def _classical(self, sigmas: Tensor) -> Schedule:
        if self._solver in TWO_STAGE:
            return TWO_STAGE[self._solver](sigmas)
        assert self._solver is not None
        options, alphas = {}, self.host.prediction.signal(sigmas)
        if self._solver in _LOWERS_ORDER_BELOW:
            steps = self.num_inference_steps or len(sigmas) - 1
            options["lower_order_final"] = (
                self.config["lower_order_final"] and steps < _LOWERS_ORDER_BELOW[self._solver]
            )
        try:
            weights = BASES[self._solver](sigmas, alphas, self.config["order"], **options)
        except (ZeroDivisionError, torch.linalg.LinAlgError):
            weights = sigmas.new_full((1,), torch.nan)
        if not bool(weights.isfinite().all()):
            raise ValueError(
                f"Solver {self._solver!r} cannot take a step of size 0 on the grid {sigmas.tolist()}: "
                "pass another one, grid={'name': ..., ...}."
            )
        return Schedule.from_weights(sigmas, weights)

    def __getstate__(self) -> dict[str, Any]:
        leaf = lambda v: v if v.is_leaf else v.detach()  # noqa: E731
        tables = {
            n: replace(table, weights=leaf(table.weights), time_scale=leaf(table.time_scale))
            for n, table in self.tables.items()
        }
        return super().__getstate__() | {"tables": tables}

    def _start_at(self, i: int) -> None:
        """Forget the past. A classical solver builds its orders up from where it starts, as diffusers' do."""
        self._history = ()
        if self._grid is not None and self._solver not in TWO_STAGE and i != self._rows_begin:
            self._rows = [[]] * i + self._classical(self._grid[i:]).increments.tolist()
            self._rows_begin = i


# diffusers lowers the last orders of short runs only, except in UniPC.
_LOWERS_ORDER_BELOW = {"dpmpp": 15, "deis": 15, "unipc": float("inf")}

# What diffusers writes into a saved pipeline and imports on reload: must outlive any move of this file.
DyWeightScheduler.__module__ = "dywspan"
