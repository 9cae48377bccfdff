"""DyWeightScheduler: a learned weight table, or any classical multistep solver, behind diffusers' interface."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from diffusers.configuration_utils import register_to_config
from diffusers.utils import logging

from ..artifact import continuous_to_json, read_continuous, read_tables, table_to_json, warn_if_newer, write_atomically
from ..core.bases import BASES
from ..core.check import shown, whole
from ..core.continuous import HIGHEST_ORDER, ContinuousTable, check_guidance_scale
from ..core.grid import make_grid
from ..core.table import SOME_NETWORK, SolverTable
from ..version import __version__
from .base import SolverScheduler
from .files import DOWNLOAD
from .hosts import solvers
from .sources import ClassicalSource, ContinuousSource, Source, TableSource

logger = logging.get_logger(__name__)


def _solver(name: str | None) -> str | None:
    if name is not None and (not isinstance(name, str) or name not in BASES):
        raise ValueError(f"Unknown solver {shown(name)}: use one of {sorted(BASES)}.")
    return name


def _grid(grid: Any) -> None:
    if grid is not None and not (isinstance(grid, Mapping) and "sigmas" in grid):  # how many those are is told later
        make_grid(grid, 2, SOME_NETWORK)


class DyWeightScheduler(SolverScheduler):
    """Multistep solver from a table: learned (DyWeight) where a table exists for the number of steps, else classical.

        pipe.scheduler = DyWeightScheduler.from_pretrained("org/solvers-for-my-model")
        pipe.scheduler = DyWeightScheduler.from_config(pipe.scheduler.config, solver="ipndm", solver_order=3)

    Source: DyWeight (arXiv 2603.11607). Between steps the sample is kept scaled as the network wants it, so pipelines
    that never call ``scale_model_input`` work. The levels told to the network, time shifting and scaling included,
    depend on the table alone: they are published as ``timesteps``.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, timestep_spacing, steps_offset: as in
            diffusers. All other keys of the pipeline's own scheduler are kept when made by :meth:`from_config`.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction".
        base_image_seq_len, max_image_seq_len, base_shift, max_shift: read by pipelines whose shift depends on size.
        host_scheduler: diffusers class that knows the noise schedule and default grid (set by :meth:`from_config`).
        solver: classical solver for step counts without a table: one of ``BASES``.
            Without it, other step counts are an error; with no tables either, it is "ipndm".
        solver_order: of the classical solver, if it has a choice.
        lower_order_final: lower the order of its last steps, as diffusers does (dpmpp, deis, unipc).
        grid: its grid (see :func:`dywspan.core.grid.make_grid`); the pipeline's own by default.
        tables: ``{num_inference_steps: table}``, see :mod:`dywspan.artifact`.
        continuous: the table of every other number of steps, see :class:`dywspan.core.continuous.ContinuousTable`.
        dywspan_version: version that wrote the file.

    Raises:
        ValueError: a damaged table, an unknown solver, order or prediction type.
    """

    # What a setting becomes: an attribute of the same name, or nothing but checked.
    _READ: ClassVar[Mapping[str, Callable[[Any], Any]]] = {"tables": read_tables, "continuous": read_continuous}
    _CHECK: ClassVar[Mapping[str, Callable[[Any], Any]]] = {
        "solver": _solver,
        "grid": _grid,
        "dywspan_version": warn_if_newer,
        "num_train_timesteps": lambda n: whole("num_train_timesteps", n, 1, 100_000),
    }

    tables: dict[int, SolverTable]
    continuous: ContinuousTable | None
    remote_code = False
    """Whether saving writes a one-line module beside the configuration. A pipeline saved with it can be loaded by
    ``trust_remote_code=True`` without ``import dywspan``, which must be installed all the same."""

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
        solver_order: int = 2,
        lower_order_final: bool = True,
        grid: dict[str, Any] | None = None,
        tables: dict[str, Any] | None = None,
        continuous: dict[str, Any] | None = None,
        dywspan_version: str = __version__,
    ) -> None:
        self._check_order()
        self._prepare()

    # ------------------------------------------------------------------ configuration

    def register_to_config(self, **kwargs: Any) -> None:
        """As diffusers', and what was learned is read again where it is among the settings."""
        for name, check in self._CHECK.items():
            if name in kwargs:
                check(kwargs[name])
        for name, read in self._READ.items():
            if name in kwargs:
                setattr(self, name, read(kwargs[name]))
        super().register_to_config(**kwargs)
        if "state" in vars(self):
            self._check_order()

    def _check_order(self) -> None:
        order, solver = self.config["solver_order"], self._solver
        if type(order) is not int:
            raise ValueError(f"solver_order={shown(order)} must be a whole number.")
        # Where there is no solver yet, or no choice of its order: whatever another one can have.
        highest = BASES[solver].highest if solver is not None and BASES[solver].highest > 1 else HIGHEST_ORDER
        if not 1 <= order <= highest:
            raise ValueError(f"solver_order={order} is out of range for {solver or 'any solver'!r}: 1 to {highest}.")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any = None,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a solver; other files than its configuration come from the very commit of that.

        Args:
            pretrained_model_name_or_path: a folder, the path of a ``scheduler_config.json``, or a Hub id.
            kwargs: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``, and configuration
                values to override.

        Raises:
            OSError: no such repository, revision or file, or no connection.
            ValueError: damaged, or a solver of another class.
        """
        source, download = pretrained_model_name_or_path, {k: v for k, v in kwargs.items() if k in DOWNLOAD}
        how: dict[str, Any] = {"return_unused_kwargs": True, "return_commit_hash": True}
        config, overrides, commit = cls.load_config(source, subfolder=subfolder, **how, **kwargs)
        name = config.get("_class_name")
        if name != cls.__name__ and any(name == c.__name__ for c in solvers(cls)):
            raise ValueError(f"{source} holds a {name}: load it with that class, or with dywspan.load.")
        scheduler, unused = cls.from_config(config, return_unused_kwargs=True, **overrides)
        scheduler._load_weights(source, subfolder, commit, download)
        return (scheduler, unused) if return_unused_kwargs else scheduler

    def _load_weights(
        self, source: Any, subfolder: str | None, commit: str | None, download: Mapping[str, Any]
    ) -> None:
        """Load what is not in the configuration."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the configuration, which holds all that was learned (and upload it, with ``push_to_hub``)."""
        self.register_to_config(dywspan_version=__version__)
        if self.remote_code:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            write_atomically(Path(save_directory) / "dywspan.py", _REMOTE_CODE)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def with_tables(self, tables: Sequence[SolverTable]) -> DyWeightScheduler:
        """A copy that holds ``tables`` besides its own (same step count: replaced)."""
        merged = {t.num_inference_steps: t for t in [*self.tables.values(), *tables]}
        for table in tables:
            table.check_convention(self.host.prediction)
        return self._with(tables={str(n): table_to_json(merged[n]) for n in sorted(merged)})

    def with_continuous(self, table: ContinuousTable) -> DyWeightScheduler:
        """A copy that takes from ``table`` what its own tables do not have."""
        return self._with(continuous=continuous_to_json(table))

    def _with(self, **settings: Any) -> Any:
        """A copy with other settings."""
        return type(self).from_config(self.config, dywspan_version=__version__, **settings)

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
        """Evaluations per step: 1, or 2 for "heun" and "dpm2". Not the numerical order, which is ``solver_order``."""
        learned = self.continuous is not None or self.num_inference_steps in self.tables
        return 1 if learned or self._solver is None else BASES[self._solver].evaluations

    @property
    def _solver(self) -> str | None:
        return self.config["solver"] or (None if self.tables or self.continuous else "ipndm")

    def _sources(self, steps: int) -> Iterable[Source]:
        """Its table, its function, its classical solver: the first of these that there is."""
        if (table := self.tables.get(steps)) is not None:
            return [TableSource(table)]
        if self.continuous is not None:
            return [ContinuousSource(self.continuous)]
        if (solver := self._solver) is not None:
            order = min(self.config["solver_order"], BASES[solver].highest)
            return [ClassicalSource(solver, order, self.config["lower_order_final"], self.config["grid"])]
        raise ValueError(
            f"No table for num_inference_steps={steps}: this solver was learned for {sorted(self.tables)} steps. "
            "Use one of these, or from_config(scheduler.config, solver='ipndm') for any number of steps."
        )

    def __getstate__(self) -> dict[str, Any]:
        leaf = lambda v: v if v.is_leaf else v.detach()  # noqa: E731
        tables = {
            n: replace(table, weights=leaf(table.weights), time_scale=leaf(table.time_scale))
            for n, table in self.tables.items()
        }
        return super().__getstate__() | {"tables": tables}


_REMOTE_CODE = b"from dywspan import DyWeightScheduler, SchedulerMixin, SpanLiftScheduler  # noqa: F401\n"

# What diffusers writes into a saved pipeline and imports on reload: must outlive any move of this file.
DyWeightScheduler.__module__ = "dywspan"
