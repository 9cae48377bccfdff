"""SpanLiftScheduler: a frozen base solver and a small spatial operator that reaches outside the span of its history."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..artifact import continuous_to_json, lift_to_json, read_continuous, read_lifts, write_atomically
from ..core.continuous import ContinuousLift
from ..core.layout import LAYOUTS, Size
from ..core.operator import Lift, Operator, conditioning, make_operator, residual
from ..core.prediction import EDM
from ..core.step import Schedule, step
from ..version import __version__
from .base import broken_downloads_named, scalars
from .dyweight import DyWeightScheduler

logger = logging.get_logger(__name__)

_DOWNLOAD = ("cache_dir", "token", "revision", "local_files_only", "force_download")
BASE = ("tables", "continuous", "solver", "order", "grid")  # settings that make the base solver what it is
_NOT_THE_BASE = ("self", "__class__", "layout", "operator", "lifts", "continuous_lift", "weights_sha256")


def different_bases(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What keeps the bases of two configurations apart; tables for other numbers of steps do not."""
    tables, more = ours["tables"] or {}, theirs["tables"] or {}
    clash = any(tables[n] != more[n] for n in tables.keys() & more.keys())
    return ["tables"] * clash + [k for k in BASE if k != "tables" and ours[k] != theirs[k]]


class SpanLiftScheduler(DyWeightScheduler):
    """x_{i+1} = x_i + alpha_i * (base step) + h_i * beta_i * R_phi(x_i, d_i, ..., d_{i-K+1}; xi_i).

        pipe.scheduler = SpanLiftScheduler.from_pretrained("org/solvers-for-my-model")

    Source: SpanLift (arXiv 2606.08672) eqs. (14)-(15). The base is a DyWeight table or a classical solver; times stay
    the base's. The operator's weights are one safetensors file beside the configuration, which holds all the rest.

    Publish it in a repository or folder of its own: weights in the ``scheduler`` folder of a pipeline on the Hub would
    keep diffusers from downloading the pipeline.

    Args:
        num_train_timesteps, ..., dywspan_version: as in :class:`DyWeightScheduler`; ``tables``, ``solver`` and
            ``order`` make the base.
        layout: how the latent is laid out, one of ``LAYOUTS``.
        operator: kind and size of R_phi, see :func:`dywspan.core.operator.make_operator`.
        lifts: ``{num_inference_steps: {"alpha": [...], "beta": [...], "operator": name}}``.
        continuous_lift: that of every other number of steps, see :class:`dywspan.core.continuous.ContinuousLift`.
        weights_sha256: of the weights file, written when saving: they only mean something together.

    Raises:
        ValueError: as the base, an unknown layout, an operator that cannot be built, or a damaged entry.
    """

    weights_name = "spanlift.safetensors"

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
        layout: str = "image",
        operator: dict[str, Any] | None = None,
        lifts: dict[str, Any] | None = None,
        continuous_lift: dict[str, Any] | None = None,
        weights_sha256: str | None = None,
        dywspan_version: str = __version__,
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"Unknown layout {layout!r}: use one of {sorted(LAYOUTS)}.")
        base = {k: v for k, v in locals().items() if k not in _NOT_THE_BASE}
        DyWeightScheduler.__init__.__wrapped__(self, **base)  # type: ignore[attr-defined]
        self.lifts: dict[int, Lift] = read_lifts(lifts)
        self.continuous_lift: ContinuousLift | None = read_continuous(continuous_lift, ContinuousLift)
        if self._learned and not operator:
            raise ValueError("A SpanLift configuration with lifts needs its operator's size: operator={...}.")
        self.operators: dict[str, Operator] = {}
        self.latent_size: Size | None = None

    # ------------------------------------------------------------------ operators

    @property
    def _learned(self) -> list[Lift | ContinuousLift]:
        return [*self.lifts.values(), *([] if self.continuous_lift is None else [self.continuous_lift])]

    def initialize(self) -> SpanLiftScheduler:
        """Make untrained operators: their heads are zero, so the solver is its base until they learn."""
        names = {lift.operator for lift in self._learned}
        try:
            self.operators = {name: make_operator(self.config["operator"]) for name in sorted(names)}
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"operator={self.config['operator']} does not describe a ResidualOperator: {error}."
            ) from None
        return self

    def load_operator(self, file: str | os.PathLike[str]) -> SpanLiftScheduler:
        """Read the operators' weights; nothing but tensors is ever read.

        Raises:
            ValueError: damaged, or made for other channels, another size or other step counts.
        """
        with torch.device("meta"):  # a damaged size costs no memory
            expected = self.initialize()._state()
        try:
            # Copied: what is read from a file is a view of it, and would change with it.
            state = {name: value.clone() for name, value in load_file(file).items()}
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): download it again.") from error
        if state.keys() != expected.keys():
            missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
            raise ValueError(
                f"{file} does not hold the operator this configuration describes: missing {missing[:3]}, unexpected "
                f"{extra[:3]}. Configuration and weights must come from the same save."
            )
        for name, value in state.items():
            if value.shape != expected[name].shape or value.dtype != torch.float32:
                raise ValueError(
                    f"{file}: {name} is {value.dtype} {tuple(value.shape)}; operator={dict(self.config['operator'])} "
                    f"needs torch.float32 {tuple(expected[name].shape)}. Was it made for another model?"
                )
            if not bool(value.isfinite().all()):
                raise ValueError(f"{file}: {name} holds numbers that are not finite. Download or distil it again.")
        expected_digest = self.config["weights_sha256"]
        if expected_digest is not None and expected_digest != _sha256(file):
            raise ValueError(
                f"{file} is not the file this configuration was saved with (weights_sha256 differs): it is damaged, or "
                "from another save. Download or copy both again."
            )
        for name, operator in self.operators.items():
            operator.load_state_dict(
                {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}, assign=True
            )
            operator.requires_grad_(False)
        return self

    def _state(self) -> dict[str, Tensor]:
        return {f"{n}.{k}": v for n, operator in self.operators.items() for k, v in operator.state_dict().items()}

    def with_lifts(self, other: SpanLiftScheduler) -> SpanLiftScheduler:
        """A copy that holds the lifts and operators of ``other`` besides its own (same step count: replaced).

        So does a continuous lift replace another; and it holds the tables of both bases. An operator of a name that
        another one has, which is still used, gets a name of its own.

        Raises:
            ValueError: their bases, layouts or operator sizes differ, or weights of one were never loaded.
        """
        for scheduler in (self, other):
            if missing := {lift.operator for lift in scheduler._learned} - scheduler.operators.keys():
                raise ValueError(f"The weights of {sorted(missing)} were never loaded: load both with from_pretrained.")
        different = [k for k in ("layout", "operator") if self.config[k] != other.config[k]]
        if different := different_bases(self.config, other.config) + different:
            raise ValueError(f"These SpanLift solvers differ in {different}: they cannot share one artefact.")
        merged, theirs = copy.deepcopy(self), copy.deepcopy(other)
        if theirs.tables:
            merged.tables |= theirs.tables
            merged.register_to_config(tables={**(merged.config["tables"] or {}), **theirs.config["tables"]})
        merged.lifts = {n: lift for n, lift in merged.lifts.items() if n not in theirs.lifts}
        if theirs.continuous_lift is not None:
            merged.continuous_lift = None
        kept = {lift.operator for lift in merged._learned}
        merged.operators = {name: network for name, network in merged.operators.items() if name in kept}
        names = {name: merged._add(name, network) for name, network in theirs.operators.items()}
        renamed = lambda lift: replace(lift, operator=names[lift.operator])  # noqa: E731
        merged.lifts |= {n: renamed(lift) for n, lift in theirs.lifts.items()}
        if theirs.continuous_lift is not None:
            merged.continuous_lift = renamed(theirs.continuous_lift)
        return merged

    def _add(self, name: str, network: Operator) -> str:
        """Take an operator in; its name, or the next one that is free or of the same weights: "shared-2"."""

        def same(other: Operator) -> bool:
            weights = network.state_dict()
            return all(torch.equal(v.cpu(), weights[k].cpu()) for k, v in other.state_dict().items())

        own, count = name, 1
        while not same(self.operators.setdefault(own, network)):
            own, count = f"{name}-{count + 1}", count + 1
        return own

    def lift(self, num_inference_steps: int, schedule: Schedule, begin: int = 0) -> Lift | None:
        """The lift of its base's schedule: that of the number of steps, or what the continuous one gives.

        Args:
            schedule: the base's, for this number of steps.
            begin: the step that a continuous one is to begin at.
        """
        if num_inference_steps in self.lifts or self.continuous_lift is None:
            return self.lifts.get(num_inference_steps)
        levels, call = schedule.levels[begin:].detach(), (self.host.prediction, self.guidance_scale)
        lift = self.continuous_lift.lift(levels, *call, whole=len(schedule))
        none = lift.alpha.new_zeros(begin)
        return replace(lift, alpha=torch.cat([none + 1, lift.alpha]), beta=torch.cat([none, lift.beta]))

    def set_latent_size(self, height: int, width: int) -> None:
        """Say what packed tokens are: height and width of the unpacked latent. Not needed for square ones."""
        self.latent_size = (int(height), int(width))

    # ------------------------------------------------------------------ files

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any = None,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load configuration and operator, the second from the very commit of the first.

        Args:
            pretrained_model_name_or_path: a directory or a Hub id.
            kwargs: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``, and configuration
                values to override.

        Raises:
            OSError: no such repository, revision or file, or no connection.
            ValueError: a damaged configuration or operator.
        """
        download = {k: v for k, v in kwargs.items() if k in _DOWNLOAD}
        config, overrides, commit = cls.load_config(
            pretrained_model_name_or_path,
            subfolder=subfolder,
            return_unused_kwargs=True,
            return_commit_hash=True,
            **kwargs,
        )
        scheduler, unused = cls.from_config(config, return_unused_kwargs=True, **overrides)
        if scheduler._learned:
            scheduler.load_operator(cls._find_operator(pretrained_model_name_or_path, subfolder, commit, download))
        return (scheduler, unused) if return_unused_kwargs else scheduler

    @classmethod
    def _find_operator(
        cls, source: Any, subfolder: str | None, commit: str | None, download: dict[str, Any]
    ) -> str | os.PathLike[str]:
        if (folder := Path(source)).is_dir():
            file = folder / (subfolder or "") / cls.weights_name
            if not file.is_file():
                raise OSError(f"{file} is not there: a SpanLift solver is a configuration and this file, copy both.")
            return file
        try:
            with broken_downloads_named(source):
                return hf_hub_download(
                    str(source),
                    cls.weights_name,
                    subfolder=subfolder,
                    **{**download, "revision": commit or download.get("revision")},
                )
        except EntryNotFoundError as error:
            raise OSError(
                f"{source} has a SpanLift configuration but no {cls.weights_name} beside it "
                "(or it is not in the cache and the network may not be used)."
            ) from error

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the operator's weights, then the configuration (and upload both, with ``push_to_hub``)."""
        folder = Path(save_directory)
        if self._learned and not self.operators:
            raise ValueError(
                "This solver's operator was never loaded, so there is only half of it to save: load it with "
                "from_pretrained, or set lifts=None, continuous_lift=None."
            )
        if folder.name == "scheduler" and self.operators:
            logger.warning(
                "A SpanLift solver inside a pipeline's folder works from a local directory only: uploaded to the Hub "
                "there, it keeps diffusers from downloading the pipeline. Push it to a repository of its own: "
                "pipe.scheduler.push_to_hub(...)."
            )
        folder.mkdir(parents=True, exist_ok=True)
        if self.operators:
            # Through bytes: safetensors' own save_file leaves a file that only its owner can read.
            data = save({k: v.detach().float().cpu().contiguous() for k, v in self._state().items()})
            write_atomically(folder / self.weights_name, data)
            self.register_to_config(weights_sha256=hashlib.sha256(data).hexdigest())
        # What was learned since this object was made belongs to its configuration.
        function = None if self.continuous_lift is None else continuous_to_json(self.continuous_lift)
        lifts = {str(n): lift_to_json(lift) for n, lift in sorted(self.lifts.items())} or None
        self.register_to_config(lifts=lifts, continuous_lift=function)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def push_to_hub(self, repo_id: str, *args: Any, subfolder: str | None = None, **kwargs: Any) -> str:
        """Upload to a repository of its own.

        Raises:
            ValueError: into a folder called "scheduler", where it would break the pipeline it belongs to.
        """
        if subfolder is not None and Path(subfolder).name == "scheduler":
            raise ValueError(
                f"subfolder={subfolder!r}: weights in a pipeline's scheduler folder keep diffusers from downloading "
                "the pipeline. Use another folder, such as 'spanlift', or a repository of its own."
            )
        return super().push_to_hub(repo_id, *args, subfolder=subfolder, **kwargs)

    # ------------------------------------------------------------------ sampling

    def _publish(self, schedule: Schedule, device: str | torch.device | None, begin: int = 0) -> None:
        """And all the operator needs.

        Raises:
            ValueError: no operator for this number of steps, or one whose weights were never loaded.
        """
        super()._publish(schedule, device, begin)
        n = self.num_inference_steps
        assert n is not None
        lift = self.lift(n, schedule, begin)
        if lift is None:
            raise ValueError(
                f"No SpanLift for num_inference_steps={n}: it was learned for {sorted(self.lifts)} steps. "
                "Use one of these, or DyWeightScheduler.from_config(scheduler.config) for the base alone."
            )
        if lift.operator not in self.operators:
            raise ValueError(
                "The operator's weights are not part of a configuration: load this solver with from_pretrained, or "
                "copy it with copy.deepcopy."
            )
        if len(lift.alpha) != len(schedule):
            raise ValueError(f"SpanLift for {n} steps has {len(lift.alpha)} entries; its base takes {len(schedule)}.")
        prediction = self.host.prediction
        queries, levels = schedule.queries.detach(), schedule.levels[:-1].detach()
        times = prediction.timestep(queries)
        times = times if isinstance(prediction, EDM) else times / self.config["num_train_timesteps"]
        # A level that time shifting takes past flow's sigma = 1 holds no signal either.
        log_snr = prediction.signal(levels).clamp(min=0).log() - levels.log()
        self._conditions = conditioning(times, log_snr, schedule.sizes.detach()).float()
        self._sizes = schedule.sizes.detach().tolist()
        self._lift, self._alpha, self._beta = lift, scalars(lift.alpha), scalars(lift.beta)
        if device is not None:
            self._move(lift.operator, torch.device(device))

    def _move(self, name: str, device: torch.device) -> None:
        self._conditions = self._conditions.to(device)
        self.operators[name].to(device=device)

    def _advance(self, row: int, x: Tensor, d: Tensor) -> Tensor:
        """Source: SpanLift eq. (15), with alpha_i on the base step."""
        operator, layout = self.operators[self._lift.operator], LAYOUTS[self.config["layout"]]
        if self._conditions.device != x.device:
            self._move(self._lift.operator, x.device)
        # The operator may look further back than the base: keep what it wants, at no weight.
        coefficients = [self._alpha[row] * c for c in self._rows[row]]
        coefficients += [0.0] * (operator.order - len(coefficients))
        moved, self._history = step(coefficients, x, d, self._history, *self._scales[row : row + 2])
        images = [layout.to_grid(v, self.latent_size) for v in (x, *self._history[: operator.order])]
        if images[0].shape[1] != operator.channels:
            raise ValueError(
                f"The operator was made for {operator.channels} channels; layout {self.config['layout']!r} finds "
                f"{images[0].shape[1]} in a sample of shape {tuple(x.shape)}."
            )
        lift = residual(operator, images[0], images[1:], self._conditions[row].to(operator.dtype))
        size = self._beta[row] * self._sizes[row] * self._scales[row + 1]
        return moved + size * layout.from_grid(lift, x, self.latent_size)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["lifts"] = {n: lift.detach() for n, lift in self.lifts.items()}
        if (function := self.continuous_lift) is not None:
            state["continuous_lift"] = replace(function, coefficients=function.coefficients.detach())
        if "_lift" in state:
            lift = self._lift.detach()
            state.update(_lift=lift, _alpha=lift.alpha.tolist(), _beta=lift.beta.tolist())
        return state


def _sha256(file: str | os.PathLike[str]) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


SpanLiftScheduler.__module__ = "dywspan"  # see DyWeightScheduler
