"""What a learned solver is compared with: every solver of the ODE that fits a pipeline, at the same cost.

Whether one fits is asked of the pipeline, not looked up: it must begin with it, give its network what the network was
trained on, and end at the image of a network that knows the image.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..artifact import for_every_count
from ..core.prediction import Flow, Prediction
from ..names import slug
from ..pipelines import classical
from ..pipelines.hashes import digest
from ..pipelines.networks import left_at_first_call
from ..pipelines.rollout import sample
from ..pipelines.teacher import Teacher
from ..published import neuralsolver_tables
from ..schedulers.apply import load
from ..schedulers.dyweight import DyWeightScheduler
from ..schedulers.spanlift import SpanLiftScheduler

Maker = Callable[[Any, int], Any]  # (pipeline, number of steps) -> scheduler; ValueError: there is none


def of_diffusers(name: str, **options: Any) -> Maker:
    """A scheduler of diffusers from the pipeline's own configuration, told of flow networks in its own words."""

    def make(pipe: Any, steps: int) -> Any:
        kind, config, given = getattr(diffusers, name), pipe.scheduler.config, dict(options)
        if isinstance(prediction(pipe), Flow):
            shift = config.get("shift") or config.get("flow_shift") or 1.0
            given |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
            given |= {"shift": shift, "timestep_spacing": config.get("timestep_spacing", "linspace")}
        if config.get("timestep_spacing") == "leading":
            given |= _TRAILING
        known = inspect.signature(kind.__init__).parameters
        return kind.from_config(config, **{k: v for k, v in given.items() if k in known})

    return make


def of_ours(solver: str, order: int = 2) -> Maker:
    """A classical solver of ``BASES`` on the pipeline's own grid, from all noise."""

    def make(pipe: Any, steps: int) -> DyWeightScheduler:
        own = pipe.scheduler
        spacing: dict[str, Any] = _TRAILING if own.config.get("timestep_spacing") == "leading" else {}
        return DyWeightScheduler.from_config(own, solver=solver, solver_order=order, **spacing)

    return make


def align_your_steps(pipe: Any, steps: int) -> Any:
    """DPM-Solver++(2M) on the grid of Align Your Steps."""
    own = DyWeightScheduler.from_config(pipe.scheduler)
    grid = classical.align_your_steps(pipe, own, steps)
    return DyWeightScheduler.from_config(pipe.scheduler, solver="dpmpp", solver_order=2, grid=grid)


def neuralsolver(pipe: Any, steps: int) -> Any:
    """The published solver whose noise starts where this network's does."""
    own = DyWeightScheduler.from_config(pipe.scheduler)
    last = torch.tensor([own.config["num_train_timesteps"] - 1.0])
    start = 1.0 if isinstance(own.host.prediction, Flow) else float(own.host.prediction.sigma(last))
    for family in ("flow_matching", "ddpm"):
        tables = {table.num_inference_steps: table for table in neuralsolver_tables(family)}
        if math.isclose(next(iter(tables.values())).grid["sigmas"][0], start, rel_tol=0.1):
            if steps not in tables:
                raise ValueError(f"published for {sorted(tables)} steps")
            return own.with_tables([tables[steps]])
    raise ValueError(f"none is published for networks whose noise starts at sigma {start:.4g}")


def full_name(name: str) -> str:
    """The name that is shown of what was typed; of what is no classical solver, itself."""
    return SLUGS.get(name, name)


# In each row, the first that fits is the solver: what a user of this kind of pipeline would reach for, then our own.
# Where a pipeline's grid starts below all noise and spends the last evaluation at t = 0, "trailing" does not.
_TRAILING: dict[str, Any] = {"timestep_spacing": "trailing"}
BASELINES: dict[str, tuple[Maker, ...]] = {
    "DDIM": (of_diffusers("DDIMScheduler", clip_sample=False, **_TRAILING),),  # it would clip latents to [-1, 1]
    "Euler": (
        of_diffusers("EulerDiscreteScheduler", **_TRAILING),
        of_diffusers("FlowMatchEulerDiscreteScheduler"),
        of_diffusers("EDMEulerScheduler"),
        of_ours("euler"),
    ),
    "Heun": (
        of_diffusers("HeunDiscreteScheduler", **_TRAILING),
        of_diffusers("FlowMatchHeunDiscreteScheduler"),
        of_ours("heun"),
    ),
    "DPM-Solver-2": (of_diffusers("KDPM2DiscreteScheduler", **_TRAILING), of_ours("dpm2")),
    "PNDM": (of_diffusers("PNDMScheduler", skip_prk_steps=True, **_TRAILING),),
    "DEIS": (of_diffusers("DEISMultistepScheduler"), of_ours("deis")),
    "DPM-Solver++(2M)": (
        of_diffusers("DPMSolverMultistepScheduler", solver_order=2),
        of_diffusers("EDMDPMSolverMultistepScheduler", solver_order=2),
        of_ours("dpmpp", 2),
    ),
    "DPM-Solver++(2M), Karras": (of_diffusers("DPMSolverMultistepScheduler", solver_order=2, use_karras_sigmas=True),),
    "DPM-Solver++(2M), AYS": (align_your_steps,),
    "DPM-Solver++(3M)": (
        of_diffusers("DPMSolverMultistepScheduler", solver_order=3),
        of_diffusers("EDMDPMSolverMultistepScheduler", solver_order=3),
        of_ours("dpmpp", 3),
    ),
    "UniPC": (of_diffusers("UniPCMultistepScheduler"), of_ours("unipc")),
    "RES(2M)": (of_ours("res", 2),),
    "CAB-2": (of_ours("cab", 2),),
    "CAB-3": (of_ours("cab", 3),),
    "Adams(2M)": (of_ours("adams", 2),),
    "Adams(3M)": (of_ours("adams", 3),),
    "iPNDM(2M)": (of_ours("ipndm", 2),),
    "iPNDM(3M)": (of_ours("ipndm", 3),),
    "iPNDM(4M)": (of_ours("ipndm", 4),),
    "NeuralSolver": (neuralsolver,),
}


BEST = "best classical"  # of all classical solvers on all grids, see :mod:`.rivals`
SLUGS = {slug(name): name for name in (*BASELINES, BEST)}
# Stable Diffusion's schedulers may end at the first training level, sigma = 0.029, instead of 0: that is allowed.
STRAY = 0.05


@dataclass(frozen=True)
class Solver:
    """A row of a comparison: a name, and what makes its scheduler."""

    name: str
    makers: tuple[Maker, ...]
    learned: bool = False


@dataclass(frozen=True)
class Cell:
    """A solver at a cost.

    Attributes:
        solver: its row's name.
        scheduler: that samples.
        num_inference_steps: what its ``set_timesteps`` is given.
        nfe: guided evaluations of the denoiser: the steps the pipeline then takes.
        line: of tables and plots that it belongs to, where that is not its own.
    """

    solver: str
    scheduler: Any
    num_inference_steps: int
    nfe: int
    learned: bool = False
    line: str | None = None

    def describe(self) -> dict[str, Any]:
        """All that determines its endpoints: of what was learned count by count, this count's."""
        own, count = Teacher(self.scheduler, self.num_inference_steps).describe(), str(self.num_inference_steps)
        tables, lifts = ({k: v for k, v in own["config"].get(n, {}).items() if k == count} for n in ("tables", "lifts"))
        named = {lift["operator"] for lift in lifts.values()}
        if function := own["config"].get("continuous_lift"):
            named.add(function["operator"])
        operators = getattr(self.scheduler, "operators", {})
        weights = {name: digest(list(operators[name].state_dict().values())) for name in sorted(named)}
        config = {k: v for k, v in own["config"].items() if k != "weights_sha256"}  # of all operators
        return own | {"config": config | {"tables": tables, "lifts": lifts}, "operators": weights}


def find_solvers(names: Sequence[str]) -> list[Solver]:
    """Solvers by name or slug: of ``BASELINES`` ("all" is each of them), or artefacts, by directory or Hub id.

    ``BEST`` has no maker: it is chosen by samples, see :mod:`.rivals`.

    Raises:
        ValueError: an unknown name; says which one is nearest.
        OSError: an artefact that cannot be read.
    """
    found: dict[str, Solver] = {}
    artefacts: dict[str, Any] = {}
    for name in map(full_name, names):
        if name == "all":
            found |= {known: Solver(known, makers) for known, makers in BASELINES.items()}
        elif name in BASELINES or name == BEST:
            found[name] = Solver(name, BASELINES.get(name, ()))
        elif "/" in name or Path(name).exists():
            artefacts[name] = load(name)
        else:
            near = difflib.get_close_matches(slug(name), ["all", *SLUGS], 1, 0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"use one of {['all', *SLUGS]}, or an artefact's path."
            raise ValueError(f"Unknown solver {name!r}: {hint}")
    for name, scheduler in artefacts.items():
        kind = _kind(scheduler)
        alone = sum(_kind(other) == kind for other in artefacts.values()) == 1
        last = [other.rstrip("/").split("/")[-1] for other in artefacts]
        short = name.rstrip("/").split("/")[-1]
        label = f"{kind} (learned)" if alone else f"{kind}, {short if last.count(short) == 1 else name}"
        found[label] = Solver(label, (_learned(scheduler),), learned=True)
    return list(found.values())


def _kind(scheduler: Any) -> str:
    """What was learned: "SpanLift + TimeLift"."""
    name = type(scheduler).__name__.removesuffix("Scheduler")
    return f"{name} + TimeLift" if scheduler.time_lifts else name


def _learned(scheduler: Any) -> Maker:
    counts = scheduler.lifts if isinstance(scheduler, SpanLiftScheduler) else scheduler.tables
    counts = scheduler.time_lifts or counts  # an artefact that has some is shown where they are

    def make(pipe: Any, steps: int) -> Any:
        own, other = type(prediction(pipe)).__name__, type(scheduler.host.prediction).__name__
        if own != other:
            raise ValueError(f"learned for {other} networks, and this one is of kind {own}")
        # Not a classical solver instead, which the artefact may also name.
        if counts and steps not in counts and (scheduler.time_lifts or for_every_count(scheduler) is None):
            raise ValueError(f"learned for {sorted(counts)} steps")
        return scheduler

    return make


def prediction(pipe: Any) -> Prediction:
    """The convention of the pipeline's network."""
    return DyWeightScheduler.from_config(pipe.scheduler).host.prediction


def make_cell(pipe: Any, solver: Solver, nfe: int, own: Mapping[str, Any], call: Mapping[str, Any]) -> Cell:
    """The solver with the number of steps that takes ``nfe`` guided evaluations in this pipeline.

    Args:
        own, call: arguments of one sample, and of all, that the pipeline is begun with.

    Raises:
        ValueError: it does not fit the pipeline, or no number of steps costs this much; says why.
    """
    reasons: list[str] = []
    for make in solver.makers:
        try:
            for steps in [nfe, *(n for n in range(1, nfe + 2) if n != nfe)]:
                scheduler = make(pipe, steps)
                level = begin(pipe, scheduler, steps, own, call)
                if len(scheduler.timesteps) == nfe:
                    _check(pipe, solver, scheduler, steps, level, own, call)
                    return Cell(solver.name, scheduler, steps, nfe, solver.learned)
            reasons.insert(0, f"no number of steps costs {nfe} evaluations")
        except Exception as error:  # schedulers and pipelines refuse each other in every way there is
            reasons.append(" ".join(str(error).split()) or type(error).__name__)
    raise ValueError(f"{solver.name}, {nfe} evaluations: {reasons[0]}")


def make_cells(
    pipe: Any, solver: Solver, counts: Sequence[int], own: Mapping[str, Any], call: Mapping[str, Any]
) -> tuple[list[Cell], list[str]]:
    """The solver at each of ``counts``, and why it does not fit the others; all of the maker that fits most of them."""
    ways = []
    for maker in solver.makers:
        made: list[Cell] = []
        refused: list[str] = []
        for nfe in counts:
            try:
                made.append(make_cell(pipe, replace(solver, makers=(maker,)), nfe, own, call))
            except ValueError as error:
                refused.append(str(error))
        ways.append((made, refused))
        if not refused:
            break
    return max(ways, key=lambda way: len(way[0]))


class _Refused(Exception):
    """Why a scheduler does not fit."""


@torch.no_grad()
def begin(pipe: Any, scheduler: Any, steps: int, own: Mapping[str, Any], call: Mapping[str, Any]) -> float:
    """Run one sample up to the first evaluation; the root mean square of what the denoiser is given.

    Raises:
        Exception: any; the pipeline does not run with this scheduler.
    """
    levels: list[float] = []
    scale, scaled = getattr(scheduler, "scale_model_input", None), []

    def scale_model_input(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scaled.append(True)
        assert scale is not None
        return scale(x, *args, **kwargs)

    def look(given: Any) -> None:
        levels.append(_rms(next(v for v in tree_leaves(given) if isinstance(v, Tensor) and v.ndim > 1)))

    if scale is not None:
        scheduler.scale_model_input = scale_model_input
    try:
        with left_at_first_call(pipe, look):
            sample(pipe, scheduler, steps, [own], [0], call)
    finally:
        vars(scheduler).pop("scale_model_input", None)
    if scale is not None and not scaled and not torch.equal(scale(one := torch.ones(1), scheduler.timesteps[0]), one):
        raise _Refused(f"{type(pipe).__name__} never scales the sample as a {type(scheduler).__name__} needs it")
    return levels[0]


def _check(
    pipe: Any,
    solver: Solver,
    scheduler: Any,
    steps: int,
    level: float,
    own: Mapping[str, Any],
    call: Mapping[str, Any],
) -> None:
    nfe = len(scheduler.timesteps)
    usual = begin(pipe, of_ours("euler")(pipe, nfe), nfe, own, call)
    if not 0.5 < level / usual < 2:
        raise _Refused(f"the network would first be given {level / usual:.2g} times the noise that it knows")
    if not solver.learned and not (error := stray(scheduler, prediction(pipe))) < STRAY:
        raise _Refused(f"it strays by {error:.2g} from the way to an image that the network knows")
    if not isinstance(scheduler, DyWeightScheduler):  # whose step may not take all that the pipeline gives it
        with torch.no_grad():
            sample(pipe, scheduler, steps, [own], [0], call, until=1)


@torch.no_grad()
def stray(scheduler: Any, prediction: Prediction) -> float:
    """How far a begun scheduler strays with a network that knows the image: whose D is that image at every level.

    The ODE's solution is then a straight line from the noise to the image, and so is every solver's whose levels,
    times, scales and meaning of the network's output are this network's:

        x_i = alpha_i image + sigma_i e, with one e for all i;   x_N = image

    Returns:
        The largest root mean square of what x_i differs by, in units of (alpha_i^2 + sigma_i^2)^1/2.
    """
    image, x = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if (device := scheduler.timesteps.device).type != "mps":  # which has no float64
        image, x = image.to(device), x.to(device)
    image, x = image / _rms(image), x * getattr(scheduler, "init_noise_sigma", 1.0)
    line, strays = None, []
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        tau = prediction.sigma(t.detach().cpu().double())
        state, signal = given / prediction.input_scale(tau), prediction.signal(tau)
        line = (state - signal * image) / tau if line is None else line
        strays.append(_rms(state - signal * image - tau * line) / math.hypot(signal, tau))
        # D is affine in the output: solve for the output whose D is the image.
        offset, unit = (prediction.denoised(state, torch.full_like(state, v), tau) for v in (0, 1))
        x = scheduler.step((image - offset) / (unit - offset), t, x, return_dict=False)[0]
    return max([_rms(x - image), *strays], key=lambda v: math.inf if math.isnan(v) else v)


def _rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())
