"""SpanLiftScheduler: a frozen base solver and a small spatial operator that reaches outside the span of its history."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..artifact import continuous_to_json, lift_to_json, read_continuous, read_lifts
from ..core.check import shown
from ..core.continuous import ContinuousLift
from ..core.layout import LAYOUTS
from ..core.operator import Lift, Operator, conditioning, make_operator
from ..core.prediction import EDM
from ..core.step import Schedule
from .dyweight import DyWeightScheduler
from .files import find, read_weights, weights_of
from .plan import LiftPlan, Plan, numbers, place

BASE = ("tables", "continuous", "solver", "solver_order", "grid")  # settings that make the base solver what it is


def different_bases(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What keeps the bases of two configurations apart; tables for other numbers of steps do not."""
    tables, more = ours["tables"] or {}, theirs["tables"] or {}
    clash = any(tables[n] != more[n] for n in tables.keys() & more.keys())
    return ["tables"] * clash + [k for k in BASE if k != "tables" and ours[k] != theirs[k]]


def _layout(name: Any) -> None:
    if not isinstance(name, str) or name not in LAYOUTS:
        raise ValueError(f"Unknown layout {shown(name)}: use one of {sorted(LAYOUTS)}.")


def _and_those_of(base: type) -> Callable[[Any], Any]:
    """Give an ``__init__`` the parameters of ``base`` in front of its own: diffusers reads them from the signature."""

    def extend(init: Any) -> Any:
        own = inspect.signature(init).parameters.values()
        first, *rest = inspect.signature(base.__init__).parameters.values()
        more = [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in own if p.kind is p.KEYWORD_ONLY]
        init.__signature__ = inspect.Signature([first, *rest, *more])
        return init

    return extend


class SpanLiftScheduler(DyWeightScheduler):
    """x_{i+1} = x_i + alpha_i * (base step) + h_i * beta_i * R_phi(x_i, d_i, ..., d_{i-K+1}; xi_i).

        pipe.scheduler = SpanLiftScheduler.from_pretrained("org/solvers-for-my-model")

    Source: SpanLift (arXiv 2606.08672) eqs. (14)-(15). The base is a DyWeight table or a classical solver; times stay
    the base's. The operator's weights are one safetensors file beside the configuration, which holds all the rest.

    Publish it in a repository or folder of its own: weights in the ``scheduler`` folder of a pipeline on the Hub would
    keep diffusers from downloading the pipeline.

    Args:
        num_train_timesteps, ..., dywspan_version: as in :class:`DyWeightScheduler`; ``tables``, ``solver`` and
            ``solver_order`` make the base.
        layout: how the latent is laid out, one of ``LAYOUTS``.
        operator: kind and size of R_phi, see :func:`dywspan.core.operator.make_operator`.
        lifts: ``{num_inference_steps: {"alpha": [...], "beta": [...], "operator": name}}``.
        continuous_lift: that of every other number of steps, see :class:`dywspan.core.continuous.ContinuousLift`.
        weights_sha256: of the weights file, written when saving: they only mean something together.

    Raises:
        ValueError: as the base, an unknown layout, an operator that cannot be built, or a damaged entry.
    """

    _READ: ClassVar[Mapping[str, Callable[[Any], Any]]] = {
        **DyWeightScheduler._READ,
        "lifts": read_lifts,
        "continuous_lift": partial(read_continuous, kind=ContinuousLift),
    }
    _CHECK: ClassVar[Mapping[str, Callable[[Any], Any]]] = {**DyWeightScheduler._CHECK, "layout": _layout}

    weights_name = "spanlift.safetensors"
    lifts: dict[int, Lift]
    continuous_lift: ContinuousLift | None

    @register_to_config
    @_and_those_of(DyWeightScheduler)
    def __init__(
        self,
        *args: Any,
        layout: str = "image",
        operator: dict[str, Any] | None = None,
        lifts: dict[str, Any] | None = None,
        continuous_lift: dict[str, Any] | None = None,
        weights_sha256: str | None = None,
        **base: Any,
    ) -> None:
        DyWeightScheduler.__init__.__wrapped__(self, *args, **base)  # type: ignore[attr-defined]
        if self._learned and not operator:
            raise ValueError("A SpanLift configuration with lifts needs its operator's size: operator={...}.")
        self.operators: dict[str, Operator] = {}

    # ------------------------------------------------------------------ operators

    @property
    def _learned(self) -> list[Lift | ContinuousLift]:
        return [*self.lifts.values(), *([] if self.continuous_lift is None else [self.continuous_lift])]

    def initialize(self) -> SpanLiftScheduler:
        """Make untrained operators: their heads are zero, so the solver is its base until they learn."""
        names, size = {lift.operator for lift in self._learned}, self.config["operator"]
        try:
            self.operators = {name: make_operator(size) for name in sorted(names)}
        except ValueError as error:
            text = f"operator={shown(size)} does not describe a ResidualOperator: {error}"
            raise ValueError(text) from None
        return self

    def load_operator(self, file: str | os.PathLike[str]) -> SpanLiftScheduler:
        """Read the operators' weights; nothing but tensors is ever read.

        Raises:
            ValueError: damaged, or made for other channels, another size or other step counts.
        """
        with torch.device("meta"):  # a damaged size costs no memory
            self.initialize()
        read_weights(file, self.operators, self.config["weights_sha256"])
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """The weights of all operators, as their file holds them."""
        return weights_of(self.operators)

    def _with(self, **settings: Any) -> Any:
        """A copy with other settings, and all that an operator is."""
        other = super()._with(**settings)
        for name in ("operators", "lifts", "continuous_lift", "latent_size"):
            setattr(other, name, copy.deepcopy(getattr(self, name)))
        return other

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
        # What was learned on one solver does not fit another.
        replaced = lambda n: n in theirs.lifts or (theirs.continuous_lift is not None and n not in merged.lifts)  # noqa: E731
        merged.time_lifts = {n: v for n, v in merged.time_lifts.items() if not replaced(n)} | theirs.time_lifts
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

    def _load_weights(
        self, source: Any, subfolder: str | None, commit: str | None, download: Mapping[str, Any]
    ) -> None:
        super()._load_weights(source, subfolder, commit, download)
        if self._learned:
            self.load_operator(find(self.weights_name, source, subfolder, commit, download))

    def _weights(self) -> dict[str, tuple[str, Mapping[str, Tensor]]]:
        weights = super()._weights()
        if self._learned and not self.operators:
            raise ValueError(
                "This solver's operator was never loaded, so there is only half of it to save: load it with "
                "from_pretrained, or set lifts=None, continuous_lift=None."
            )
        if self.operators:
            own = {name: value.float() for name, value in self.state_dict().items()}
            weights[self.weights_name] = ("weights_sha256", own)
        return weights

    def _record(self, **settings: Any) -> None:
        function = None if self.continuous_lift is None else continuous_to_json(self.continuous_lift)
        lifts = {str(n): lift_to_json(lift) for n, lift in sorted(self.lifts.items())} or None
        super()._record(lifts=lifts, continuous_lift=function, **settings)

    # ------------------------------------------------------------------ sampling

    def _plan(self, begin: int, device: str | torch.device | None) -> Plan:
        """The base's plan, and all the operator needs.

        Raises:
            ValueError: no operator for this number of steps, or one whose weights were never loaded.
        """
        plan, request = super()._plan(begin, device), self.request
        assert request is not None
        n, schedule = request.steps, plan.schedule
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
        prediction = request.host.prediction
        queries, levels = schedule.queries.detach(), schedule.levels[:-1].detach()
        times = prediction.timestep(queries)
        times = times if isinstance(prediction, EDM) else times / self.config["num_train_timesteps"]
        # A level that time shifting takes past flow's sigma = 1 holds no signal either.
        log_snr = prediction.signal(levels).clamp(min=0).log() - levels.log()
        operator = self.operators[lift.operator]
        lifted = LiftPlan(
            operator=operator,
            layout=self.config["layout"],
            lift=lift,
            alpha=numbers(lift.alpha),
            beta=numbers(lift.beta),
            sizes=schedule.sizes.detach().tolist(),
            conditions=conditioning(times, log_snr, schedule.sizes.detach()).float(),
        )
        return replace(plan, lift=lifted.to(place(operator) if device is None else device))

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["lifts"] = {n: lift.detach() for n, lift in self.lifts.items()}
        if (function := self.continuous_lift) is not None:
            state["continuous_lift"] = replace(function, coefficients=function.coefficients.detach())
        return state


SpanLiftScheduler.__module__ = "dywspan"  # see DyWeightScheduler
