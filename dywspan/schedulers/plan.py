"""A run as data: a frozen :class:`Plan` of all the numbers its steps need, and a :class:`State` that each replaces.

Numbers are Python floats, or 0-dim tensors on the CPU where a gradient is wanted: no step ever reads from the device.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.layout import LAYOUTS, Size, to_grids
from ..core.operator import Lift, Operator, residual
from ..core.prediction import Flow, Prediction, VariancePreserving
from ..core.step import History, Schedule, analytical_derivative, combine, step

Number = Any  # float, or a differentiable 0-dim Tensor
Pair = tuple[Number, Number]


def place(operator: Operator) -> torch.device:
    """The device of an operator's weights."""
    return next((p.device for p in operator.parameters()), torch.device("cpu"))


@dataclass(frozen=True, eq=False)
class LiftPlan:
    """SpanLift's part of a plan.

    Attributes:
        operator: R_phi, on the device of the run.
        layout: of the latent, one of ``LAYOUTS``.
        lift: alpha and beta, with their graph; ``alpha`` and ``beta`` are their numbers.
        sizes: h_i.
        conditions: (N, 3) float32 xi_i, on the device of the run.
    """

    operator: Operator
    layout: str
    lift: Lift
    alpha: Sequence[Number]
    beta: Sequence[Number]
    sizes: Sequence[float]
    conditions: Tensor

    def to(self, device: torch.device | str) -> LiftPlan:
        """The same on another device. An operator that is learned moves; of any other a copy is taken there."""
        operator = self.operator
        if place(operator) != torch.empty(0, device=device).device:
            learned = any(p.requires_grad for p in operator.parameters())
            operator = (operator if learned else copy.deepcopy(operator)).to(device)
        return replace(self, operator=operator, conditions=self.conditions.to(device))

    def detach(self) -> LiftPlan:
        lift = self.lift.detach()
        return replace(self, lift=lift, alpha=lift.alpha.tolist(), beta=lift.beta.tolist())


@dataclass(frozen=True, eq=False)
class Plan:
    """All the numbers of a run, known before it starts.

    Attributes:
        schedule: the solver on its grid.
        rows, carries: N rows of coefficients, and what each step leaves of the state; see ``core.step.step``.
        scales: N + 1 factors from the solver's frame to that of the network's input.
        values: N pairs (p, q): what is remembered of an evaluation is p x + q output, x as the network sees it.
        estimates: N pairs that make the estimate of x0 the same way.
        start: what unit noise is multiplied by to become the first sample: start level, input scale and AFS in one.
        analytic: what the first sample is multiplied by to become AFS's d_0; None without AFS.
        clip: what is done to an estimate of x0; None: nothing.
        begin: the step that the rows are made to begin at.
        timesteps: what the network is told, on the device of the run; ``times`` are their values.
        lift: SpanLift's part.
    """

    schedule: Schedule
    rows: Sequence[Any]
    carries: Sequence[float]
    scales: Sequence[Number]
    values: Sequence[Pair]
    estimates: Sequence[Pair]
    start: Number
    analytic: Number | None
    clip: Callable[[Tensor], Tensor] | None
    begin: int
    timesteps: Tensor
    times: Sequence[float]
    lift: LiftPlan | None = None

    @property
    def remembers_data(self) -> bool:
        """Whether its history is of data predictions, not derivatives."""
        return self.schedule.carries is not None

    @property
    def skipped(self) -> int:
        """Rows before the first evaluation: 1 with AFS."""
        return int(self.schedule.afs)

    def state_after(self, i: int, prev_sample: Tensor) -> Tensor:
        """x_{i+1} in the solver's frame, of what step ``i`` returned."""
        return prev_sample / self.scales[i + self.skipped + 1]

    def on(self, device: torch.device) -> Plan:
        """The same with SpanLift's part on another device."""
        if self.lift is None or self.lift.conditions.device == device:
            return self
        return replace(self, lift=self.lift.to(device))

    def detach(self) -> Plan:
        """The same numbers, without their graph."""
        return replace(
            self,
            schedule=self.schedule.detach(),
            rows=[[_number(c) for c in row] for row in self.rows],
            scales=[_number(v) for v in self.scales],
            values=[(_number(p), _number(q)) for p, q in self.values],
            estimates=[(_number(p), _number(q)) for p, q in self.estimates],
            start=_number(self.start),
            analytic=None if self.analytic is None else _number(self.analytic),
            timesteps=self.timesteps.detach(),
            lift=None if self.lift is None else self.lift.detach(),
        )

    def index(self, timestep: Any, expected: int | None) -> int:
        """Which step a timestep is of; not read from the device where it is a view of ``timesteps``.

        Args:
            timestep: an element of ``timesteps``, a copy of one, or its value, as rounded as half precision makes it.
            expected: the step that comes next, if a run is on: of several that match it is preferred.

        Raises:
            ValueError: it is none of them, or an integer.
        """
        dtype = torch.float32
        if isinstance(timestep, Tensor):
            if torch.compiler.is_compiling():  # neither storages nor values can be compared there
                if expected is None:
                    raise ValueError("A compiled step cannot look for its place: call set_begin_index(0) first.")
                return expected
            if timestep.untyped_storage()._cdata == self.timesteps.untyped_storage()._cdata:
                return int(timestep.storage_offset() - self.timesteps.storage_offset())
            if timestep.is_meta and expected is not None:
                return expected
            dtype, timestep = timestep.dtype, timestep.detach().reshape(-1)[0].item()
        if isinstance(timestep, Integral) or not dtype.is_floating_point:
            raise ValueError(
                f"timestep={timestep} is an integer, and those of `timesteps` are not: pass its elements, not their "
                "positions."
            )
        value = float(timestep)
        exact = [i for i, t in enumerate(self.times) if math.isclose(value, t, rel_tol=1e-6, abs_tol=1e-6)]
        rounded = exact if dtype.itemsize > 2 else []
        for half in (torch.bfloat16, torch.float16):
            near = torch.tensor(self.times).to(half).tolist() if not rounded else []
            rounded += [i for i, t in enumerate(near) if t == value]
        if not rounded:
            raise ValueError(
                f"timestep={value} is not in the schedule {list(self.times)}: pass elements of `timesteps`."
            )
        if expected in rounded:
            return expected
        # Of a solver with two stages a time stands twice: as the end of a step, and as the start of the next.
        return exact[-1] if exact else min(rounded, key=lambda i: abs(value - self.times[i]))


class State(NamedTuple):
    """Where a run is.

    Attributes:
        history: what earlier evaluations left, newest first.
        derivatives: for an operator, where ``history`` is of data predictions.
        step: the one that comes next; None before the first.
        begin: the step that the pipeline said it would begin at.
        scaled: the noise was multiplied by ``init_noise_sigma``, or added by ``add_noise``.
    """

    history: History = ()
    derivatives: History = ()
    step: int | None = None
    begin: int | None = None
    scaled: bool = False

    @property
    def expected(self) -> int | None:
        """The step that comes next, as far as is known."""
        return self.begin if self.step is None else self.step

    def remember(self, history: History, derivatives: History, step: int | None) -> State:
        """The same run, at another step."""
        return State(history, derivatives, step, self.begin, self.scaled)

    def detach(self) -> State:
        history, derivatives = (tuple(v.detach() for v in values) for values in (self.history, self.derivatives))
        return self.remember(history, derivatives, self.step)


def make_plan(
    schedule: Schedule,
    prediction: Prediction,
    *,
    as_diffusers: bool,
    clip: Callable[[Tensor], Tensor] | None = None,
    begin: int = 0,
    device: str | torch.device | None = None,
) -> Plan:
    """The plan of a schedule.

    Args:
        as_diffusers: start from noise of unit variance, and end in the network's frame, which matters on a grid that
            ends above 0. A learned solver starts from sigma_0 * noise, as in the paper, and ends at its estimate of x0.
        clip, begin, device: see :class:`Plan`.

    Raises:
        ValueError: AFS on a flow model.
    """
    levels, queries, skipped = schedule.levels, schedule.queries, int(schedule.afs)
    vp, flow, end = isinstance(prediction, VariancePreserving), isinstance(prediction, Flow), levels[-1:]
    last = prediction.input_scale(end) if as_diffusers and vp else torch.ones_like(end)
    scales = torch.cat([prediction.input_scale(queries), last])
    start = 1 / prediction.input_scale(levels[0]) if as_diffusers or flow else levels[0]
    analytic = None
    if schedule.afs:
        if flow:
            raise ValueError("AFS is defined for VE and VP models only: distil this flow table without it.")
        # x_1 = x_0 * (1 + c_00 / sqrt(1 + sigma_0^2)): linear in x_0, so the noise is scaled and the call skipped.
        factor = analytical_derivative(schedule.increments[0, 0], levels[0]) + 1
        start = start * factor
        analytic = analytical_derivative(1 / (scales[1] * factor), levels[0])
    start = start * scales[skipped]
    s, sigma = numbers(scales), numbers(levels)
    slopes = [prediction.slope(*at) for at in zip(sigma, numbers(queries))]
    derivatives = [(p / scale, q) for (p, q), scale in zip(slopes, s)]
    # D = x - sigma d
    estimates = [(1 / scale - level * p, -level * q) for (p, q), level, scale in zip(derivatives, sigma, s)]
    rows = schedule.increments
    times = prediction.timestep(queries[skipped:])
    return Plan(
        schedule=schedule,
        rows=list(rows) if rows.requires_grad else rows.tolist(),
        carries=[1.0] * len(rows) if schedule.carries is None else schedule.carries.tolist(),
        scales=s,
        values=derivatives if schedule.carries is None else estimates,
        estimates=estimates,
        start=start if start.requires_grad else float(start),
        analytic=analytic if analytic is None or analytic.requires_grad else float(analytic),
        clip=clip,
        begin=begin,
        timesteps=times.to(torch.float32).to(device),
        times=times.detach().float().tolist(),
    )


def advance(
    plan: Plan, state: State, i: int, output: Tensor, sample: Tensor, size: Size | None = None
) -> tuple[Tensor, State, Callable[[], Tensor]]:
    """Step ``i`` of a plan. Source: DyWeight algorithm 1; SpanLift eq. (15), with alpha_i on the base step.

    Args:
        output: the network's, of the shape of ``sample``.
        sample: the state, as the network sees it.
        size: height and width of packed tokens.

    Returns:
        The next state in ``sample.dtype``, arithmetic being float32 or wider; what comes after; and a function that
        makes the estimate of x0.
    """
    row, dtype = i + plan.skipped, torch.promote_types(sample.dtype, torch.float32)
    x, output, history = _cast(sample, dtype), _cast(output, dtype), state.history
    if i == 0 and not state.scaled and plan.start != 1:
        x = x * plan.start  # this pipeline does not scale its noise by init_noise_sigma
    if plan.analytic is not None and i == 0:
        history = (plan.analytic * x,)

    def estimate() -> Tensor:
        (p, q), clip = plan.estimates[row], plan.clip
        x0 = combine((q, output), (p, x))
        return x0 if clip is None else clip(x0)

    # x stays in the network's frame: what leads out of it and into the next is in the coefficients.
    p, q = plan.values[row]
    if plan.clip is None:
        value = combine((q, output), (p, x))
    else:
        value = estimate() if plan.remembers_data else _derivative(plan, row, x, estimate())
    coefficients, carry, lift = plan.rows[row], plan.carries[row], plan.lift
    if lift is not None:
        alpha = lift.alpha[row]
        coefficients = [alpha * c for c in coefficients]
        if plan.remembers_data:
            carry = (1 - alpha) + alpha * carry
        else:  # the operator may look further back than the base: keep that, at no weight
            coefficients += [0.0] * (lift.operator.order - len(coefficients))
    scale, next_scale = plan.scales[row : row + 2]
    following, history = step(coefficients, x, value, history, scale, next_scale, carry)
    derivatives = state.derivatives
    if lift is not None:
        if plan.remembers_data:
            derivatives = (_derivative(plan, row, x, value), *derivatives)[: lift.operator.order]
        lifted = correction(lift, row, x, derivatives or history, size)
        following = following + lift.beta[row] * lift.sizes[row] * next_scale * lifted
    state = state.remember(history, derivatives, i + 1)
    return _cast(following, sample.dtype), state, lambda: _cast(estimate(), sample.dtype)


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value.to(dtype)``, which takes microseconds even where there is nothing to do."""
    return value if value.dtype == dtype else value.to(dtype)


def _derivative(plan: Plan, row: int, x: Tensor, x0: Tensor) -> Tensor:
    """d = (x - D) / sigma."""
    level = plan.schedule.levels[row].item()
    return combine((1 / (plan.scales[row] * level), x), (-1 / level, x0))


def correction(lift: LiftPlan, row: int, x: Tensor, derivatives: History, size: Size | None) -> Tensor:
    """R_phi(x_i, d_i, ..., d_{i-K+1}; xi_i), in the layout of ``x``."""
    operator = lift.operator
    images = to_grids(lift.layout, (x, *derivatives[: operator.order]), operator.channels, size)
    image = residual(operator, images[0], images[1:], lift.conditions[row].to(operator.dtype))
    return LAYOUTS[lift.layout].from_grid(image, x, size)


def numbers(values: Tensor) -> list[Number]:
    """Its elements: floats, or 0-dim tensors where a gradient is wanted."""
    return list(values) if values.requires_grad else values.tolist()


def _number(value: Number) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else value


def without_variance(output: Tensor, sample: Tensor) -> Tensor:
    """The network's output, of the sample's shape: a learned variance, which images have as further channels, is cut.

    Raises:
        ValueError: of any other shape.
    """
    if output.shape == sample.shape:
        return output
    if output.ndim == 4 and output.shape == (len(sample), 2 * sample.shape[1], *sample.shape[2:]):
        return output[:, : sample.shape[1]]
    raise ValueError(
        f"The network's output has shape {tuple(output.shape)}, the sample {tuple(sample.shape)}: they must be equal, "
        "but for a learned variance, which doubles the channels of images."
    )


def noising(
    prediction: Prediction, plan: Plan | None, expected: int | None, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) times the input scale of each timestep, on the CPU.

    Elements of the plan mean its calibrated levels; all others, integers among them, the network's own.
    """
    timesteps = timesteps.detach().reshape(-1)
    plan = plan if timesteps.is_floating_point() else None
    if plan is not None and timesteps.device.type != "cpu" and expected is not None and expected < len(plan.times):
        # While a pipeline samples, they are one level repeated, and reading would wait for the device.
        timesteps = torch.full(timesteps.shape, plan.times[expected])
    timesteps = timesteps.cpu()
    sigma = prediction.sigma(timesteps)
    tau = sigma.clone()
    for t in timesteps.unique():
        if plan is None:
            break
        try:
            row = min(plan.index(t.clone(), expected) + plan.skipped, len(plan.rows) - 1)
        except ValueError:
            continue
        sigma[timesteps == t] = plan.schedule.levels[row].detach()
        tau[timesteps == t] = plan.schedule.queries[row].detach()
    scale = prediction.input_scale(tau)
    return prediction.signal(sigma) * scale, sigma * scale


def noised(clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """alpha * clean + sigma * noise, of each sample, in the dtype of ``clean``; arithmetic is float32 or wider."""
    dtype = torch.promote_types(clean.dtype, torch.float32)
    alpha, sigma = (f.to(clean.device, dtype).reshape(-1, *(1,) * (clean.ndim - 1)) for f in (alpha, sigma))
    return (alpha * clean.to(dtype) + sigma * noise.to(dtype)).to(clean.dtype)
