"""The golden vectors of docs/format.md: what dywspan makes of solvers whose network is known in closed form.

    python tests/golden.py  # writes docs/format.golden.json

The data are Gaussian, x0 ~ N(mean, std^2), each coordinate on its own. So E[x0 | x] is closed, and a network is exact:

    VE:    D(x; tau) = (std^2 x + tau^2 mean) / (std^2 + tau^2)
    flow:  D(x; tau) = mean + std^2 (1 - tau) (x - (1 - tau) mean) / ((1 - tau)^2 std^2 + tau^2)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dywspan import DyWeightScheduler
from dywspan.artifact import compact
from dywspan.core.prediction import EDM, Flow, Sample, Velocity

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docs" / "format.golden.json"
DATA = {"mean": [0.5, -1.0, 0.25, 0.0], "std": [1.0, 0.3, 0.05, 2.0]}
NOISE = [1.5, -0.75, 0.4, -1.1]
STABLE_DIFFUSION = {
    "host_scheduler": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "clip_sample": False,
}


def denoised(x: Any, tau: float, flow: bool, mean: Any, std: Any) -> Any:
    """E[x0 | x], of arrays of any library."""
    if flow:
        kept = (1 - tau) * std**2
        return mean + kept * (x - (1 - tau) * mean) / ((1 - tau) * kept + tau**2)
    return (std**2 * x + tau**2 * mean) / (std**2 + tau**2)


def _output(prediction: Any, x: Tensor, x0: Tensor, tau: float) -> Tensor:
    """What a network of this convention says where it estimates x0."""
    scale = prediction.input_scale(tau)
    if isinstance(prediction, EDM):
        noise = tau * scale
        return (x0 - (1 - noise**2) * x) / (prediction.sign * prediction.sigma_data * noise)
    if isinstance(prediction, Velocity):
        return (scale**2 * x - x0) / (tau * scale)
    if isinstance(prediction, Sample):
        return x0
    return (x - x0) / (-tau if isinstance(prediction, Flow) and prediction.inverted else tau)


def trajectory(
    scheduler: DyWeightScheduler, steps: int, mu: float | None = None, begin: int = 0, **data: Any
) -> dict[str, Any]:
    """Levels, queries and times of a run from step ``begin``, and its states in the solver's frame: x_begin to x_N."""
    mean, std, noise = (torch.tensor(data[k], dtype=torch.float64) for k in ("mean", "std", "noise"))
    scheduler.set_timesteps(steps, mu=mu)
    plan, prediction = scheduler.plan, scheduler.host.prediction
    assert plan is not None
    schedule, skipped, level = plan.schedule, plan.skipped, plan.schedule.levels[begin]
    states = [level * noise + (prediction.signal(level) * mean if begin else 0 * mean)]
    sample = noise * scheduler.init_noise_sigma
    if begin:
        scheduler.set_begin_index(begin - skipped)  # of the steps that ask the network
        sample = states[0] * plan.scales[begin]
    elif skipped:
        states.append(sample / plan.scales[1])
    for i, t in list(enumerate(scheduler.timesteps))[max(begin - skipped, 0) :]:
        row = i + skipped
        x, tau = sample / plan.scales[row], float(schedule.queries[row])
        output = _output(prediction, x, denoised(x, tau, isinstance(prediction, Flow), mean, std), tau)
        sample = scheduler.step(output, t, sample, return_dict=False)[0]
        states.append(plan.state_after(i, sample))
    return {
        "levels": schedule.levels.tolist(),
        "queries": schedule.queries.tolist(),
        "times": prediction.timestep(schedule.queries).tolist(),
        "states": torch.stack(states).tolist(),
    }


def _shipped(name: str, *keep: str) -> dict[str, Any]:
    """The part of a solver of examples/ that says what its steps are."""
    config = json.loads((ROOT / "examples" / name / "scheduler_config.json").read_text())
    network = ["beta_schedule", "beta_start", "beta_end", "host_scheduler", "num_train_timesteps", "prediction_type"]
    config = {key: config[key] for key in [*network, *keep]}
    for entry in [config.get("continuous"), *config.get("tables", {}).values()]:
        if entry is not None:
            entry["provenance"] = {}
    return config


def _one(config: dict[str, Any], steps: int) -> dict[str, Any]:
    return config | {"tables": {str(steps): config["tables"][str(steps)]}}


def cases() -> dict[str, dict[str, Any]]:
    """A solver and a run each."""
    afs = {
        "weights": [[0.9], [1.35, -0.3], [1.8, -1.1, 0.35], [1.6, -0.9, 0.25], [1.1, -0.2, 0.05]],
        "time_scale": [1.0, 0.93, 1.02, 0.97, 0.9],
        "grid": {"name": "polynomial", "sigma_min": 0.03, "sigma_max": 14.6, "rho": 7.0},
        "afs": True,
        "convention": "vp",
    }
    epsilon = {**STABLE_DIFFUSION, "prediction_type": "epsilon", "tables": {"4": afs}}
    edm = {
        "weights": [[1.1], [1.3, -0.2], [1.2, -0.3]],
        "time_scale": [0.98, 1.01, 1.05],
        "grid": {"sigmas": [80.0, 9.0, 1.2, 0.002]},
        "time_shifting": False,
    }
    flow = _one(_shipped("emoji-flow-solvers", "tables", "time_shift_type", "use_dynamic_shifting"), 4)
    return {
        "epsilon, AFS": {"config": epsilon, "steps": 4},
        "epsilon, AFS, from step 2": {"config": epsilon, "steps": 4, "begin": 2},
        "v-prediction, shipped": {"config": _one(_shipped("emoji-sd-solvers", "tables"), 3), "steps": 3},
        "EDM, levels not shifted": {
            "config": {"host_scheduler": "EDMEulerScheduler", "prediction_type": "epsilon", "tables": {"3": edm}},
            "steps": 3,
        },
        "flow, shipped": {"config": flow, "steps": 4, "mu": 0.75},
        "flow, from step 2": {"config": flow, "steps": 4, "mu": 0.75, "begin": 2},
        "v-prediction, continuous": {"config": _shipped("emoji-sd-any-steps", "continuous"), "steps": 3},
        "flow, continuous": {"config": _shipped("emoji-flow-any-steps", "continuous"), "steps": 3, "mu": 0.75},
    }


def make() -> dict[str, Any]:
    """The vectors by name; what a continuous function writes for the number of steps stands beside it."""
    found = {}
    for name, case in cases().items():
        scheduler = DyWeightScheduler.from_config({"_class_name": "DyWeightScheduler", **case["config"]})
        run = {key: case[key] for key in ("steps", "mu", "begin") if key in case}
        expected = trajectory(scheduler, **run, **DATA, noise=NOISE)
        if scheduler.continuous is not None:
            assert scheduler.source is not None and scheduler.request is not None
            table = scheduler.source.table(scheduler.request)  # type: ignore[attr-defined]
            expected |= {"weights": table.weights.tolist(), "time_scale": table.time_scale.tolist()}
        found[name] = {**case, **expected}
    return {"data": DATA, "noise": NOISE, "cases": found}


if __name__ == "__main__":
    FILE.write_text(compact(json.dumps(make(), indent=1)) + "\n")
