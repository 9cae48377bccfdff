"""One solver of several that were learned apart for the same model: tables, lifts and functions together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..artifact import continuous_to_json, lift_to_json, table_to_json
from ..core.check import shown
from ..core.operator import Lift
from ..text import counts
from .apply import models
from .dyweight import DyWeightScheduler
from .spanlift import BASE, SpanLiftScheduler, different_bases

# What differs between solvers of one model, or says nothing of it.
_OF_SOLVERS = {"tables", "continuous", "lifts", "continuous_lift", "weights_sha256", "dywspan_version"}
_OF_SOLVERS |= {"time_lifts", "timelift_sha256"}


def merge(solvers: Mapping[str, DyWeightScheduler]) -> tuple[DyWeightScheduler, list[str]]:
    """One solver that holds what all of them do; where two were learned for the same, the later one counts.

    Args:
        solvers: by what they are called in messages.

    Returns:
        The solver, and a line for each number of steps that an earlier solver had otherwise.

    Raises:
        ValueError: fewer than two, or solvers of different classes, networks, configurations, bases or models.
    """
    if len(solvers) < 2:
        raise ValueError(f"Only {[*solvers]} was named: merging takes at least two solvers.")
    result: DyWeightScheduler
    (first, result), *others = solvers.items()
    told: list[str] = []
    for name, other in others:
        _check(first, solvers[first], name, other)
        told += [f"{what}: that of {name} replaces an earlier one" for what in _replaced(result, other)]
        former, result = result, _both(result, other)
        lost = sorted(former.time_lifts.keys() - result.time_lifts.keys())
        told += [f"TimeLift for {n} steps: left out, as {name} replaces what it was learned on" for n in lost]
    return result, told


def _both(ours: Any, theirs: Any) -> Any:
    if isinstance(ours, SpanLiftScheduler):
        return ours.with_lifts(theirs)
    result = ours.with_tables([*theirs.tables.values()])
    if theirs.continuous is not None:
        result = result.with_continuous(theirs.continuous)
    return result.with_time_lifts(theirs.time_lifts)


def _check(first: str, ours: DyWeightScheduler, name: str, theirs: DyWeightScheduler) -> None:
    kinds = [type(scheduler).__name__ for scheduler in (ours, theirs)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{first} holds a {kinds[0]} and {name} a {kinds[1]}: merge solvers of one class.")
    conventions = [type(scheduler.host.prediction).__name__ for scheduler in (ours, theirs)]
    if conventions[0] != conventions[1]:
        raise ValueError(
            f"{first} was learned for {conventions[0]} networks and {name} for {conventions[1]}: merge solvers of one "
            "model."
        )
    known = [{*map(_place, models(scheduler))} for scheduler in (ours, theirs)]
    if all(known) and known[0] != known[1]:
        raise ValueError(
            f"{first} was learned on {sorted(known[0])} and {name} on {sorted(known[1])}: merge solvers of one model."
        )
    one, other = (json.loads(scheduler.to_json_string()) for scheduler in (ours, theirs))
    lifted = isinstance(ours, SpanLiftScheduler)
    if lifted and (wrong := different_bases(ours.config, theirs.config)):
        raise ValueError(f"{first} and {name} have different bases, in {wrong}: learn the lifts on one base.")
    apart = _OF_SOLVERS | ({*BASE} if lifted else set())
    names = sorted(k for k in one.keys() | other.keys() if not k.startswith("_") and k not in apart)
    if wrong := {k: (shown(one.get(k)), shown(other.get(k))) for k in names if one.get(k) != other.get(k)}:
        pairs = ", ".join(f"{k} ({a} and {b})" for k, (a, b) in wrong.items())
        raise ValueError(f"{first} and {name} differ in {pairs}: they cannot share one configuration.")


def _replaced(ours: DyWeightScheduler, theirs: DyWeightScheduler) -> list[str]:
    """What both hold, and not the same: "5 steps"."""
    one, other = _parts(ours), _parts(theirs)
    return [what for what in one if what in other and one[what] != other[what]]


def _parts(scheduler: DyWeightScheduler) -> dict[str, str]:
    """All that was learned, by what for, as texts that are the same where the numbers are."""
    lifted = isinstance(scheduler, SpanLiftScheduler)
    found: dict[str, Any] = {}
    for n, part in sorted((scheduler.lifts if lifted else scheduler.tables).items()):
        found[f"{n} steps"] = lift_to_json(part) if isinstance(part, Lift) else table_to_json(part)
    if (function := scheduler.continuous_lift if lifted else scheduler.continuous) is not None:
        found["any other number of steps"] = continuous_to_json(function)
    for part in found.values() if lifted else ():  # what an operator is called says nothing
        network = scheduler.operators[part["operator"]].state_dict()
        part["operator"] = {name: value.tolist() for name, value in network.items()}
    for n, lift in scheduler.time_lifts.items():
        found[f"TimeLift for {n} steps"] = {name: offset.tolist() for name, offset in lift.offsets.items()}
    return {what: json.dumps(part, sort_keys=True) for what, part in found.items()}


def _place(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).exists() else model


def learned(scheduler: Any) -> str:
    """What it was learned for: "3, 5 and any other number of"; "" for nothing."""
    lifted = isinstance(scheduler, SpanLiftScheduler)
    function = scheduler.continuous_lift if lifted else scheduler.continuous
    return counts(scheduler.lifts if lifted else scheduler.tables, function is not None)
