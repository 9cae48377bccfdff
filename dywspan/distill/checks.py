"""What is found out about a run before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..core.bases import BASES
from ..core.operator import make_operator
from ..schedulers.apply import load
from ..schedulers.bind import guidance_argument, guidance_scale
from ..schedulers.dyweight import DyWeightScheduler
from ..schedulers.hosts import different_networks
from ..schedulers.spanlift import BASE, SpanLiftScheduler, different_bases
from .config import OPTIMIZERS, DistillConfig
from .lift import gone_on_with

_OF_SOLVERS = {*BASE, *("layout", "operator", "lifts", "continuous_lift", "weights_sha256", "dywspan_version")}
_OF_SOLVERS |= {"time_lifts", "timelift_sha256"}


def find_base(config: DistillConfig, pipe: Any) -> Any:
    """What is lifted: a DyWeight or SpanLift artefact, or a classical solver for every number of steps."""
    classical = config.base in BASES
    found: Any = None if classical else load(config.base)
    lifted = isinstance(found, SpanLiftScheduler)
    if config.optimizer not in OPTIMIZERS and not lifted:
        raise ValueError(
            f"least_squares fits alpha and beta of an operator that is there: base={config.base!r} must be a SpanLift "
            "artefact. Learn one by adam or adamw first."
        )
    if classical and config.learn_base:
        raise ValueError(f"learn_base: base={config.base!r} is a classical solver, which has no table to learn.")
    if classical:
        return DyWeightScheduler.from_config(pipe.scheduler, solver=config.base)
    own, other = (s.host.prediction for s in (DyWeightScheduler.from_config(pipe.scheduler), found))
    if wrong := different_networks(own, other):
        raise ValueError(
            f"base={config.base!r} was learned for {type(other).__name__} networks, and {config.model} is of kind "
            f"{type(own).__name__}, with other {wrong}: learn a base for this pipeline."
        )
    if config.continuous and found.continuous is None and found._solver is None:
        raise ValueError(
            f"base={config.base!r} has tables for {sorted(found.tables)} steps only, and continuous needs a base for "
            "every number: one learned with continuous, or a base solver."
        )
    if config.solver == "timelift":
        if config.learn_base and (missing := sorted({*config.steps} - found.tables.keys())):
            raise ValueError(
                f"learn_base: base={config.base!r} has no table for {missing} steps, only for {sorted(found.tables)}."
            )
        return found
    if config.continuous and found.time_lifts:
        raise ValueError(
            f"base={config.base!r} has a TimeLift for {sorted(found.time_lifts)} steps, and a continuous lift is for "
            "every number of them: leave out continuous, or take a base without TimeLift."
        )
    return gone_on_with(found, config.steps, config.continuous) if lifted else found


def check_variants(
    pipe: Any, config: DistillConfig, inputs: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]
) -> None:
    """Guidance scales that differ are followed."""
    told = {call.get(str(guidance_argument(pipe))) for call in calls}
    found = {guidance_scale(pipe, {**inputs, **call}) for call in calls}
    if len(told) > 1 and len(found) == 1:
        raise ValueError(
            f"variants={config.variants}: {type(pipe).__name__} guides by {found.pop():g} in all of them. Give scales "
            "that it follows, and a negative prompt if it needs one."
        )


def check_operator(config: DistillConfig) -> None:
    """The operator can be built, for any number of channels."""
    try:
        with torch.device("meta"):
            make_operator({"channels": 1, "order": config.order, **config.operator})
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"operator={config.operator} does not describe a SpanLift operator: {error}.") from None


def check_extension(existing: DyWeightScheduler | None, base: DyWeightScheduler, config: DistillConfig) -> None:
    """An artefact has one base, and a SpanLift artefact one layout and one size of operator: found out now."""
    if existing is None:
        return
    wrong, what = different_bases(existing.config, base.config), "operators"
    if config.solver == "timelift":
        what = "solvers on bases"
        wrong = [k for k in wrong if k != "tables" or not config.learn_base]
        wrong += ["class"] if type(existing) is not type(base) else []
        wrong += ["lifts"] if existing.config.get("lifts") != base.config.get("lifts") else []
    else:
        size = {"order": config.order, **config.operator}
        wrong += ["layout"] if existing.config["layout"] != config.layout else []
        wrong += [f"operator.{k}" for k, v in size.items() if existing.config["operator"].get(k, v) != v]
    if wrong:
        raise ValueError(f"{config.output} holds {what} that differ in {wrong}: choose another output.")


def check_model(existing: DyWeightScheduler, new: DyWeightScheduler, config: DistillConfig) -> None:
    """An artefact's configuration is that of one pipeline's scheduler."""
    ours, theirs = (json.loads(scheduler.to_json_string()) for scheduler in (existing, new))
    shared = {k for k in ours.keys() & theirs.keys() if not k.startswith("_")} - _OF_SOLVERS
    if wrong := {k: (ours[k], theirs[k]) for k in sorted(shared) if ours[k] != theirs[k]}:
        raise ValueError(
            f"{config.output} holds solvers of another pipeline, or of its former scheduler: {wrong}. Choose another "
            "output."
        )
