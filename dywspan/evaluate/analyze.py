"""How much of each step a solver can reach: ``dywspan analyze``.

From each state x_i of a solver, the exact solution continues to the level where the step ends, by Heun's method in the
same pipeline: its move Delta*. V is the span of the last K derivatives, Pi the projection on it, ~ the part across the
chord x*_N - x_0 of the whole exact solution.

    error             |Delta* - Delta| / |Delta*|
    in_span           |Pi Delta* - Pi Delta| / |Delta*|    what better weights would gain, SpanLift eq. (7)
    out_of_span       |Delta* - Pi Delta*| / |Delta*|      what no weights reach, SpanLift eq. (8)
    lift_out_of_span  |R - Pi R| / |R|                     SpanLift table 6
    lift_size         |beta ~R| / |alpha ~base|            SpanLift figure 4
    gap_closed        1 - |Delta* - Delta| / |Delta* - base|
"""

from __future__ import annotations

import difflib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.span import norm, project
from ..pipelines.classical import SOLVERS, asked_for, default_grid, solvers_on
from ..pipelines.inputs import OWN, check_call, lacks_text, read_inputs
from ..pipelines.replay import Memo
from ..pipelines.rollout import Inputs, load_pipeline
from ..schedulers.apply import load
from ..schedulers.bind import bind
from .baselines import slug
from .spans import Step, exact, going_on, run_of, with_schedule

NAMES = {slug(name): name for name in SOLVERS}
BATCH = 16
_TINY = 1e-12


def shares(step: Step, target: Tensor, chord: Tensor, order: int) -> dict[str, Tensor]:
    """(B,) numbers of one step, by name; see this module.

    Args:
        target: where the exact solution moves the step's state by.
        chord: x*_N - x_0.
        order: K.
    """
    basis, size = step.derivatives[:order], norm(target).clamp(min=_TINY)
    inside, moved = project(target, basis), project(step.move, basis)
    differences = {"error": target - step.move, "in_span": inside - moved, "out_of_span": target - inside}
    found = {name: norm(difference) / size for name, difference in differences.items()}
    if step.lifted is not None:
        across = [norm(v - project(v, [chord])) for v in (step.lifted, step.alpha * step.base)]
        outside = norm(step.lifted - project(step.lifted, basis))
        found["lift_out_of_span"] = outside / norm(step.lifted).clamp(min=_TINY)
        found["lift_size"] = across[0] / across[1].clamp(min=_TINY)
        found["gap_closed"] = 1 - norm(target - step.move) / norm(target - step.base).clamp(min=_TINY)
    return found


@torch.no_grad()
def steps_of(
    pipe: Any,
    scheduler: Any,
    steps: int,
    inputs: Inputs,
    seeds: Sequence[int],
    call: Mapping[str, Any],
    *,
    substeps: int = 8,
    order: int | None = None,
) -> list[dict[str, Any]]:
    """A row for each step of a solver: ``step``, ``sigma``, ``sigma_next`` and means over samples of :func:`shares`.

    Args:
        substeps: of Heun's method in each step, two evaluations each.
        order: K; None: as many derivatives as the solver itself combines.

    Returns:
        With each row ``end_rmse``, the root mean square error of the last state.
    """
    found: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
    levels: list[float] = []
    for first in range(0, len(inputs), BATCH):
        part = slice(first, first + BATCH)
        given = inputs[part], seeds[part], call
        with Memo(pipe).installed():
            taken, end = run_of(pipe, scheduler, steps, *given)
            schedule = scheduler.plan.schedule
            levels, skipped = schedule.levels.clamp(min=0).tolist(), scheduler.plan.skipped
            columns = order or int(schedule.increments.abs().amax(0).nonzero().max()) + 1
            whole, aim = run_of(pipe, *with_schedule(scheduler, exact(levels, substeps), 0), *given)
            chord = aim - whole[0].state
            error = (end - aim).flatten(1).square().mean(1).sqrt()
            for i, step in enumerate(taken):
                row = i + skipped
                _, goal = run_of(pipe, *with_schedule(scheduler, going_on(schedule, row, substeps), row), *given)
                for name, values in shares(step, goal - step.state, chord, columns).items():
                    found[row, name].append(values)
                found[row, "end_rmse"].append(error)
    rows: dict[int, dict[str, Any]] = {}
    for (row, name), values in found.items():
        own = rows.setdefault(row, {"step": row, "sigma": levels[row], "sigma_next": levels[row + 1]})
        own[name] = float(torch.cat(values).mean())
    return [*rows.values()]


def find(pipe: Any, name: str, steps: int, inputs: Inputs, call: Mapping[str, Any]) -> tuple[str, Any]:
    """A solver's name and scheduler: an artefact, or a classical one on the grid that solvers are learned on.

    Raises:
        ValueError: an unknown name, or an artefact that has no solver of this many steps.
        OSError: an artefact that cannot be read.
    """
    if "/" in name or Path(name).exists():
        scheduler = load(name)
        lifts = getattr(scheduler, "lifts", {})
        known = sorted(lifts or scheduler.tables)
        function = getattr(scheduler, "continuous_lift", None) if lifts else scheduler.continuous
        if known and steps not in known and function is None:
            raise ValueError(f"{name} was learned for {known} steps, not for {steps}: change --steps.")
        return Path(name).name, scheduler
    known = name if name in SOLVERS else NAMES.get(name)
    if known is None:
        near = difflib.get_close_matches(slug(name), NAMES, 1, 0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {[*NAMES]}, or an artefact's path."
        raise ValueError(f"Unknown solver {name!r}: {hint}")
    scheduler, request = asked_for(pipe, steps, inputs, call)
    (made,) = solvers_on(default_grid(scheduler), "", request, {known: SOLVERS[known]})
    return known, scheduler.with_tables([made.table])


def analyze(
    model: Any,
    solvers: Sequence[str],
    steps: Sequence[int],
    *,
    prompts: str | Sequence[Any] | None = None,
    call: Mapping[str, Any] | None = None,
    samples: int = 16,
    seed: int = 0,
    substeps: int = 8,
    order: int | None = None,
) -> list[dict[str, Any]]:
    """The rows of :func:`steps_of` for each solver and number of steps, with ``solver`` and ``num_inference_steps``.

    Args:
        model: a pipeline, or a directory or a Hub id of one.
        solvers: artefacts by directory or Hub id, or classical ones by name, such as "ipndm-2m".
        prompts: see :func:`dywspan.pipelines.inputs.read_inputs`; None: those of this package, where it needs some.
        call: arguments of the pipeline's call.

    Raises:
        ValueError, OSError: settings that cannot work, files that cannot be read; nothing is computed then.
    """
    pipe, call = load_pipeline(model) if isinstance(model, str) else model, dict(call or {})
    for name, value in {
        "samples": samples,
        "substeps": substeps,
        "order": 1 if order is None else order,
        "steps": min(steps),
    }.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    with suppress(TypeError):  # it cannot be told what a solver is to know
        bind(pipe)
    source = OWN if prompts is None and lacks_text(pipe, call) else prompts
    inputs = read_inputs(source, limit=samples) or [{}] * samples
    if len(inputs) < samples:
        raise ValueError(f"{source} has {len(inputs)} prompts, and samples={samples}: lower --samples.")
    check_call(pipe, inputs, call)
    runs = [(n, *find(pipe, name, n, inputs, call)) for n in steps for name in solvers]
    rows: list[dict[str, Any]] = []
    for n, name, scheduler in tqdm(runs, desc="solvers", leave=False):
        seeds = range(seed, seed + samples)
        found = steps_of(pipe, scheduler, n, inputs, seeds, call, substeps=substeps, order=order)
        rows += [{"solver": name, "num_inference_steps": n, **row} for row in found]
    return rows


def plot(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """A line of panels for each number of steps: what the steps miss, and where the lift of a SpanLift solver goes."""
    from matplotlib import pyplot

    counts = sorted({row["num_inference_steps"] for row in rows})
    names = list(dict.fromkeys(row["solver"] for row in rows))
    lifted = any("lift_size" in row for row in rows)
    panels = {"error": "error of a step / exact step", "out_of_span": "out-of-span share of the exact step"}
    panels |= {"lift_out_of_span": "out-of-span share of the lift", "lift_size": "lift / base step"} if lifted else {}
    shape = {"figsize": (4 * len(panels), 3.2 * len(counts)), "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot.subplots(len(counts), len(panels), **shape)
    for n, line in zip(counts, axes):
        for (key, title), axis in zip(panels.items(), line):
            for k, name in enumerate(names):
                own = [row for row in rows if (row["solver"], row["num_inference_steps"]) == (name, n) and key in row]
                if own:
                    axis.plot([r["step"] for r in own], [r[key] for r in own], "o-", label=name, color=f"C{k}")
            axis.set(xlabel="step i", xticks=range(n), title=f"{title}\n{n} steps")
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.25, lw=0.5)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
