"""DyWeightScheduler: a learned weight table, or any classical multistep solver, behind diffusers' interface."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import logging
from torch import Tensor

from ..artifact import (
    continuous_to_json,
    read_continuous,
    read_tables,
    read_time_lifts,
    table_to_json,
    time_lifts_to_json,
    warn_if_newer,
    write_atomically,
)
from ..core.bases import BASES
from ..core.check import shown, whole
from ..core.continuous import HIGHEST_ORDER, ContinuousTable, check_guidance_scale
from ..core.grid import make_grid
from ..core.table import SOME_NETWORK, SolverTable
from ..core.time_lift import TimeLift, check_offsets
from ..version import __version__
from .base import SolverScheduler
from .files import DOWNLOAD, check_digest, find, read_tensors, write_tensors
from .hosts import solvers
from .plan import Plan
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
        time_lifts: ``{num_inference_steps: {"provenance": ...}}`` of the numbers of steps that have a TimeLift, see
            :class:`dywspan.core.time_lift.TimeLift`. Its offsets are a safetensors file beside the configuration.
        timelift_sha256: of that file, written when saving: they only mean something together.

    Raises:
        ValueError: a damaged table, an unknown solver, order or prediction type.
    """

    # What a setting becomes: an attribute of the same name, or nothing but checked.
    _READ: ClassVar[Mapping[str, Callable[[Any], Any]]] = {
        "tables": read_tables,
        "continuous": read_continuous,
        "time_lifts": read_time_lifts,
    }
    _CHECK: ClassVar[Mapping[str, Callable[[Any], Any]]] = {
        "solver": _solver,
        "grid": _grid,
        "dywspan_version": warn_if_newer,
        "num_train_timesteps": lambda n: whole("num_train_timesteps", n, 1, 100_000),
    }

    tables: dict[int, SolverTable]
    continuous: ContinuousTable | None
    time_lifts: dict[int, TimeLift]
    time_lifts_name = "timelift.safetensors"
    lifting: Any = False
    """Whether a pipeline samples whose networks are told what the time lift says."""
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
        time_lifts: dict[str, Any] | None = None,
        timelift_sha256: str | None = None,
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
        if self.time_lifts:
            self.load_time_lifts(find(self.time_lifts_name, source, subfolder, commit, download))

    def load_time_lifts(self, file: str | os.PathLike[str]) -> DyWeightScheduler:
        """Read the offsets of all time lifts; nothing but tensors is ever read.

        Raises:
            ValueError: damaged, or of other numbers of steps than the configuration's.
        """
        check_digest(file, self.config["timelift_sha256"], "timelift_sha256")
        found: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, offset in read_tensors(file).items():
            steps, _, parameter = name.partition(".")
            found[steps][parameter] = offset
        if found.keys() != {str(n) for n in self.time_lifts}:
            raise ValueError(
                f"{file} holds time lifts for {shown(sorted(found))} steps, and its configuration names those for "
                f"{sorted(self.time_lifts)}. Configuration and offsets must come from the same save."
            )
        for n, lift in self.time_lifts.items():
            try:
                check_offsets(found[str(n)])
            except ValueError as error:
                raise ValueError(f"Damaged {file}, {n} steps: {error}. Download or distil it again.") from None
            self.time_lifts[n] = replace(lift, offsets=found[str(n)])
        return self

    def _weights(self) -> dict[str, tuple[str, Mapping[str, Tensor]]]:
        """What is saved beside the configuration, by file: the setting that has its SHA-256, and the tensors.

        Raises:
            ValueError: they were never loaded.
        """
        if unloaded := [n for n, lift in self.time_lifts.items() if not lift.offsets]:
            raise ValueError(
                f"The time lifts for {unloaded} steps were never loaded, so there is only half of them to save: load "
                "the solver with from_pretrained, or set time_lifts=None."
            )
        offsets = {f"{n}.{k}": v for n, lift in sorted(self.time_lifts.items()) for k, v in lift.offsets.items()}
        return {self.time_lifts_name: ("timelift_sha256", offsets)} if offsets else {}

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the configuration and, where there are some, weights (and upload them, with ``push_to_hub``)."""
        folder, weights = Path(save_directory), self._weights()
        if folder.name == "scheduler" and weights:
            logger.warning(
                "A solver with weights inside a pipeline's folder works from a local directory only: uploaded to the "
                "Hub there, it keeps diffusers from downloading the pipeline. Push it to a repository of its own: "
                "pipe.scheduler.push_to_hub(...)."
            )
        folder.mkdir(parents=True, exist_ok=True)
        digests: dict[str, Any] = {"timelift_sha256": None}
        digests |= {setting: write_tensors(folder / file, tensors) for file, (setting, tensors) in weights.items()}
        self._record(dywspan_version=__version__, **digests)
        if self.remote_code:
            write_atomically(folder / "dywspan.py", _REMOTE_CODE)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _record(self, **settings: Any) -> None:
        """Put into the configuration what was learned since this object was made, without reading it again."""
        super().register_to_config(time_lifts=time_lifts_to_json(self.time_lifts), **settings)

    def push_to_hub(self, repo_id: str, *args: Any, subfolder: str | None = None, **kwargs: Any) -> str:
        """Upload to a repository of its own.

        Raises:
            ValueError: weights into a folder called "scheduler", where they would break the pipeline it belongs to.
        """
        if subfolder is not None and Path(subfolder).name == "scheduler" and self._weights():
            raise ValueError(
                f"subfolder={subfolder!r}: weights in a pipeline's scheduler folder keep diffusers from downloading "
                "the pipeline. Use another folder, such as 'solver', or a repository of its own."
            )
        return super().push_to_hub(repo_id, *args, subfolder=subfolder, **kwargs)

    def with_tables(self, tables: Sequence[SolverTable]) -> DyWeightScheduler:
        """A copy that holds ``tables`` besides its own (same step count: replaced)."""
        merged = {t.num_inference_steps: t for t in [*self.tables.values(), *tables]}
        for table in tables:
            table.check_convention(self.host.prediction)
        other = self._with(tables={str(n): table_to_json(merged[n]) for n in sorted(merged)})
        for table in tables:  # what was learned on another table does not fit this one
            n = table.num_inference_steps
            if n in self.time_lifts and (n not in self.tables or not same_numbers(table, self.tables[n])):
                del other.time_lifts[n]
        return other

    def with_continuous(self, table: ContinuousTable) -> DyWeightScheduler:
        """A copy that takes from ``table`` what its own tables do not have."""
        other = self._with(continuous=continuous_to_json(table))
        if self.continuous is None or continuous_to_json(table) != continuous_to_json(self.continuous):
            other.time_lifts = {n: lift for n, lift in self.time_lifts.items() if n in self.tables}
        return other

    def with_time_lifts(self, lifts: Mapping[int, TimeLift]) -> Any:
        """A copy that tells a network what these say besides its own (same step count: replaced)."""
        other = self._with()
        other.time_lifts |= lifts
        return other

    def _with(self, **settings: Any) -> Any:
        """A copy with other settings, and all time lifts."""
        other = type(self).from_config(self.config, dywspan_version=__version__, **settings)
        other.time_lifts = dict(self.time_lifts)
        return other

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

    def _plan(self, begin: int, device: str | torch.device | None) -> Plan:
        """The plan, if the network can be told what a time lift says.

        Raises:
            ValueError: it cannot.
        """
        plan, request, source = super()._plan(begin, device), self.request, self.source
        assert request is not None and source is not None
        lift, n = self.time_lifts.get(request.steps), request.steps
        if lift is None:
            return plan
        if not lift.offsets:
            raise ValueError(
                f"The TimeLift for {n} steps is not part of a configuration: load this solver with from_pretrained, "
                "copy it with copy.deepcopy, or set time_lifts=None."
            )
        if lift.evaluations != len(plan.times):
            raise ValueError(f"TimeLift for {n} steps has {lift.evaluations} rows; its solver takes {len(plan.times)}.")
        if begin and source.written_for:
            raise ValueError(
                f"This solver's TimeLift for {n} steps is for whole runs, and a late start of a continuous solver is "
                "another run: begin at step 0, or set time_lifts=None."
            )
        if not self.lifting:
            raise ValueError(
                f"This solver's TimeLift for {n} steps changes what the network is told, and nothing has told this "
                "scheduler which network: put it in by dywspan.apply(pipe, solver), or call dywspan.bind(pipe)."
            )
        return plan

    def _starting(self, i: int) -> Plan:
        if self.request is not None and self.request.steps in self.time_lifts and i != (self.state.expected or 0):
            raise ValueError(
                f"The network was told the time of step {self.state.expected or 0}, and this is step {i}: TimeLift "
                "needs set_begin_index before a run that begins late."
            )
        return super()._starting(i)

    def __getstate__(self) -> dict[str, Any]:
        leaf = lambda v: v if v.is_leaf else v.detach()  # noqa: E731
        tables = {
            n: replace(table, weights=leaf(table.weights), time_scale=leaf(table.time_scale))
            for n, table in self.tables.items()
        }
        lifts = {n: lift.detach() for n, lift in self.time_lifts.items()}
        return super().__getstate__() | {"tables": tables, "time_lifts": lifts}


def same_numbers(one: SolverTable, other: SolverTable) -> bool:
    """Whether two tables make the same steps, wherever they come from."""
    return table_to_json(replace(one, provenance={})) == table_to_json(replace(other, provenance={}))


_REMOTE_CODE = b"from dywspan import DyWeightScheduler, SchedulerMixin, SpanLiftScheduler  # noqa: F401\n"

# What diffusers writes into a saved pipeline and imports on reload: must outlive any move of this file.
DyWeightScheduler.__module__ = "dywspan"
