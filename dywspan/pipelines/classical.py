"""Every classical multistep solver on every grid that fits a pipeline, each written as a table: one form for what is
measured, kept and learned from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.schedulers import AysSchedules
from torch import Tensor

from ..core.bases import BASES
from ..core.grid import make_grid
from ..core.prediction import EDM, Flow, VariancePreserving
from ..core.table import SolverTable
from ..schedulers.dyweight import DyWeightScheduler
from ..schedulers.hosts import Host
from ..schedulers.sources import Request
from .linear import as_table, built
from .networks import left_at_first_call
from .rollout import Inputs, sample

# By display name: the base, its order, and whether its last steps are of lower orders.
SOLVERS: dict[str, tuple[str, int, bool]] = {
    "Euler": ("euler", 1, False),
    "iPNDM(2M)": ("ipndm", 2, False),
    "iPNDM(3M)": ("ipndm", 3, False),
    "Adams(2M)": ("adams", 2, False),
    "Adams(3M)": ("adams", 3, False),
    "DEIS(2M)": ("deis", 2, False),
    "DEIS(3M)": ("deis", 3, False),
    "DPM-Solver++(2M)": ("dpmpp", 2, False),
    "DPM-Solver++(3M)": ("dpmpp", 3, False),
    "DPM-Solver++(2M), lower order final": ("dpmpp", 2, True),
    "RES(2M)": ("res", 2, False),
    "CAB-2": ("cab", 2, False),
    "CAB-3": ("cab", 3, False),
    "UniP(2M)": ("unipc", 2, False),
    "UniP(3M)": ("unipc", 3, False),
}
SHIFTS = (1.0, 1.5, 2.0, 3.0, 5.0)  # of flow networks
AS_IT_WAS = "as it was"  # the grid of what the pipeline has
_NEAR = 0.05  # how far a grid's first level may lie from where the network's noise starts


@dataclass(frozen=True)
class Classical:
    """One solver on one grid.

    Attributes:
        solver: its name, of ``SOLVERS``.
        grid: its grid's name.
        table: the solver as weights of past derivatives, with s = 1.
    """

    solver: str
    grid: str
    table: SolverTable

    @property
    def name(self) -> str:
        """ "iPNDM(2M), Karras"."""
        return f"{self.solver}, {self.grid}"


def default_grid(scheduler: DyWeightScheduler) -> dict[str, Any]:
    """The grid to learn on, by the kind of network: EDM's polynomial, FLUX's shift, or uniform in model time down to 0.

    A flow pipeline whose shift depends on resolution keeps it: its ``mu`` is read at every call.
    """
    prediction, config = scheduler.host.prediction, scheduler.config
    if isinstance(prediction, EDM):
        ends = {"sigma_min": config.get("sigma_min", 0.002), "sigma_max": config.get("sigma_max", 80.0)}
        return {"name": "polynomial", **ends}
    if isinstance(prediction, Flow):
        shift = config.get("shift") or config.get("flow_shift") or 1.0
        return {"name": "flow"} if config.get("use_dynamic_shifting") else {"name": "flow", "shift": shift}
    sigma_max = float(prediction.sigma(torch.tensor([config["num_train_timesteps"] - 1.0])))
    return {"name": "discrete", "sigma_min": 0.0, "sigma_max": sigma_max}


def asked_for(pipe: Any, steps: int, inputs: Inputs, call: Mapping[str, Any]) -> tuple[DyWeightScheduler, Request]:
    """What a pipeline asks of its scheduler in a call of so many steps: its grid, and its shift. Nothing is sampled.

    Returns:
        Its scheduler as one of ours, and the request.
    """
    scheduler = DyWeightScheduler.from_config(pipe.scheduler)
    with torch.no_grad(), left_at_first_call(pipe):
        sample(pipe, scheduler, steps, inputs[:1], [0], call)
    assert scheduler.request is not None
    return scheduler, scheduler.request


def grids(pipe: Any, scheduler: DyWeightScheduler, request: Request) -> dict[str, dict[str, Any]]:
    """The grids of this many steps that fit, by name; no two are the same."""
    usual, start = default_grid(scheduler), _start(scheduler, request)
    found: dict[str, dict[str, Any]] = {}
    known: list[Tensor] = []
    for name, make in _makers(pipe, scheduler, request, usual):
        with contextlib.suppress(ValueError, ImportError):  # diffusers' beta grid needs scipy
            grid = make()
            levels = _levels(grid, request)
            fits = len(levels) == request.steps + 1 and abs(float(levels[0]) / start - 1) < _NEAR
            if fits and not any(torch.allclose(levels, other, rtol=1e-4, atol=1e-6) for other in known):
                known.append(levels)
                found[name] = grid
    return found


def solvers_on(
    grid: Mapping[str, Any], name: str, request: Request, among: Mapping[str, Any] = SOLVERS
) -> list[Classical]:
    """The solvers on one grid, those that differ: with few steps many are the same.

    Args:
        among: those asked for, as in ``SOLVERS``.
    """
    prediction, levels = request.host.prediction, _levels(grid, request)
    alphas, found = prediction.signal(levels), list[Classical]()
    for solver, (base, order, lower) in among.items():
        with contextlib.suppress(ArithmeticError, torch.linalg.LinAlgError):  # levels as near as rounding
            weights = BASES[base](levels, alphas, order, lower)
            width = 1 + max((int(j) for j in weights.abs().amax(0).nonzero()), default=0)
            ones = torch.ones(len(weights), dtype=torch.float64)
            table = SolverTable(weights[:, :width], ones, dict(grid), convention=prediction.convention)
            if not any(_same(table, other.table) for other in found):
                found.append(Classical(solver, name, table))
    return found


def on_all_grids(
    pipe: Any, scheduler: DyWeightScheduler, request: Request, among: Mapping[str, Any] = SOLVERS
) -> list[Classical]:
    """The solvers on every grid that fits, and those of :func:`of_diffusers`.

    Args:
        among: those asked for, as in ``SOLVERS``.
    """
    found = grids(pipe, scheduler, request).items()
    own = [classical for name, grid in found for classical in solvers_on(grid, name, request, among)]
    return own + of_diffusers(pipe, scheduler, request)


def of_diffusers(pipe: Any, scheduler: DyWeightScheduler, request: Request) -> list[Classical]:
    """What is not in ``SOLVERS``: the solver that the pipeline has, learned ones too, and UniPC with its corrector."""
    prediction, n, unipc = request.host.prediction, request.steps, diffusers.UniPCMultistepScheduler
    found = [Classical("the pipeline's own", AS_IT_WAS, scheduler.tables[n])] if n in scheduler.tables else []
    own: list[tuple[str, str, Callable[[], Any]]] = [
        (type(pipe.scheduler).__name__, AS_IT_WAS, lambda: pipe.scheduler),
    ]
    options: dict[str, Any] = {"timestep_spacing": "trailing"}
    flags = {"uniform": None, "Karras": "karras", "log-SNR": "exponential"}
    if isinstance(prediction, Flow):
        shift = scheduler.config.get("shift") or scheduler.config.get("flow_shift") or 1.0
        options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
        options["use_dynamic_shifting"], flags = False, {f"shift {shift:g}": None}
    for grid, flag in flags.items():
        given = options | ({f"use_{flag}_sigmas": True} if flag else {})
        own.append(("UniPC(2M)", grid, lambda given=given: built(unipc, {**scheduler.config, **given})))
    for solver, grid, make in own:
        with contextlib.suppress(Exception):  # schedulers refuse each other's settings in every way there is
            table = as_table(make(), prediction, n, request.mu)
            near = abs(float(table.grid["sigmas"][0]) / _start(scheduler, request) - 1) < _NEAR
            if near or grid == AS_IT_WAS:
                found.append(Classical(solver, grid, table))
    return found


def _start(scheduler: DyWeightScheduler, request: Request) -> float:
    """The level that the network's noise starts at."""
    return float(_levels(default_grid(scheduler), request)[0])


def align_your_steps(pipe: Any, scheduler: DyWeightScheduler, steps: int) -> dict[str, Any]:
    """The ten-step grid published for this kind of pipeline, for other numbers log-linear between.

    Source: Align Your Steps (Sabour et al. 2024). The last published level is the smallest that the network knows; a
    sampling ends at 0 instead.

    Raises:
        ValueError: none is published.
    """
    name = type(pipe).__name__.removesuffix("Pipeline") + "Sigmas"
    if name not in AysSchedules:
        raise ValueError(f"no grid of Align Your Steps is published for a {type(pipe).__name__}")
    own = scheduler.host.prediction
    smallest = 0.002 if isinstance(own, EDM) else float(own.sigma(torch.zeros(1)))
    known = torch.tensor([*AysSchedules[name][:-1], smallest], dtype=torch.float64).log()
    place = torch.linspace(0, len(known) - 1, steps + 1, dtype=torch.float64)[:-1]
    low = place.long()
    return {"sigmas": [*torch.lerp(known[low], known[low + 1], place - low).exp().tolist(), 0.0]}


def _makers(
    pipe: Any, scheduler: DyWeightScheduler, request: Request, usual: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Names of grids, and what makes each; ValueError where it does not fit."""
    prediction, n = scheduler.host.prediction, request.steps

    def of_host(kind: str, **options: Any) -> dict[str, Any]:
        own = built(getattr(diffusers, kind), {**scheduler.config, **options})
        return {"sigmas": Host(DyWeightScheduler.from_config(own).config).grid(n).tolist()}

    yield "uniform" if not isinstance(prediction, EDM) else "rho 7", lambda: usual
    yield "the pipeline's", lambda: {"sigmas": request.levels(None).tolist()}
    if isinstance(prediction, Flow):
        yield from ((f"shift {shift:g}", lambda s=shift: {"name": "flow", "shift": s}) for shift in SHIFTS)
        plain: dict[str, Any] = {"use_dynamic_shifting": False, "shift": 1.0, "use_beta_sigmas": True}
        yield "beta", lambda: of_host("FlowMatchEulerDiscreteScheduler", **plain)
        return
    high = float(_levels(usual, request)[0])
    low = 0.0 if not isinstance(prediction, EDM) else usual["sigma_min"]
    for rho in (3.0, 5.0):
        ends = {"sigma_min": low, "sigma_max": high, "rho": rho}
        yield f"rho {rho:g}", lambda ends=ends: {"name": "polynomial", **ends}
    if isinstance(prediction, VariancePreserving):
        names = {"Karras": "karras", "log-SNR": "exponential", "beta": "beta"}
        for name, flag in names.items():
            options = {"timestep_spacing": "trailing", f"use_{flag}_sigmas": True}
            yield name, lambda options=options: of_host("DPMSolverMultistepScheduler", **options)
        yield "AYS", lambda: align_your_steps(pipe, scheduler, n)
    elif isinstance(prediction, EDM):
        yield "log-SNR", lambda: {"name": "logsnr", "sigma_min": low, "sigma_max": high}


def _levels(grid: Mapping[str, Any], request: Request) -> Tensor:
    """Of a grid, whatever levels the pipeline gives: a table's are its own."""
    return make_grid(grid, request.steps, request.host.prediction, request.host.shift(request.mu))


def _same(a: SolverTable, b: SolverTable) -> bool:
    width = min(a.weights.shape[1], b.weights.shape[1])
    beyond = (a.weights[:, width:], b.weights[:, width:])
    near = torch.allclose(a.weights[:, :width], b.weights[:, :width], atol=1e-9)
    return near and not any(bool(rest.abs().gt(1e-9).any()) for rest in beyond)
