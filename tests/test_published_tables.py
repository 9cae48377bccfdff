"""Learned numbers as published, run through our core and scheduler against plain loops written from the papers."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dywspan import DyWeightScheduler, SolverTable
from dywspan.artifact import table_to_json
from dywspan.core.prediction import EDM, Epsilon, Flow, Prediction
from dywspan.core.step import rollout

FOLDER = Path(__file__).parents[2] / "shared" / "published_tables"
if not FOLDER.is_dir():
    pytest.skip("the published tables are not part of this repository", allow_module_level=True)


def published(file: str) -> dict[str, Any]:
    return json.loads((FOLDER / file).read_text())["tables"]


DYWEIGHT = published("dyweight.json")
PIXEL, LATENT, FLUX = ({k: v for k, v in DYWEIGHT.items() if mark in k} for mark in ("cifar", "mscoco", "flux"))
NEURAL = {
    f"{family}-{steps}": t for family, tables in published("neuralsolver.json").items() for steps, t in tables.items()
}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
# Log alpha at the trained times and one node beyond each end: 0 at t = -1, the last slope up to t = 1099.
TIMES = np.array([-1, *range(1000), 1099])
_trained = np.log(ALPHAS_CUMPROD.numpy()) / 2
LOG_ALPHAS = np.array([0.0, *_trained, _trained[-1] + 100 * (_trained[-1] - _trained[-2])])
MU = 0.74
Network = Callable[[Tensor, Tensor], Tensor]


def test_every_published_table_is_run() -> None:
    assert len(PIXEL) + len(LATENT) + len(FLUX) == len(DYWEIGHT) > 0
    assert all(table["afs"] for table in PIXEL.values()) and not any(table["afs"] for table in LATENT.values())


# ---------------------------------------------------------------------- the papers, as plain loops


def dyweight(
    x: Tensor, derivative: Callable[[Tensor, float, float], Tensor], sigmas: list[float], table: dict[str, Any]
) -> Tensor:
    """Eqs. (5) and (9) with weights indexed by absolute step; ``derivative`` is told (x, level, told level)."""
    weights, scales = table["weights"], table["scales"]
    level, taken = sigmas[0], []
    for i, row in enumerate(weights):
        if table["afs"] and i == 0:
            taken.append(x / math.sqrt(1 + sigmas[0] ** 2))
        else:
            taken.append(derivative(x, level, scales[i - table["afs"]] * level))
        size = sigmas[i + 1] - level
        x = x + size * sum(row[j] * taken[j] for j in range(i + 1))
        level += sum(row[: i + 1]) * size
    return x


def edm(network: Network) -> Callable[[Tensor, float, float], Tensor]:
    def derivative(x: Tensor, level: float, told: float) -> Tensor:
        variance = 0.5**2 + told**2
        output = network(x / math.sqrt(variance), torch.tensor(math.log(told) / 4, dtype=torch.float64))
        denoised = 0.5**2 / variance * x + told * 0.5 / math.sqrt(variance) * output
        return (x - denoised) / level

    return derivative


def vp(network: Network) -> Callable[[Tensor, float, float], Tensor]:
    def derivative(x: Tensor, level: float, told: float) -> Tensor:
        t = np.interp(math.log(1 + told**2) / 2, -LOG_ALPHAS, TIMES)
        output = network(x / math.sqrt(1 + told**2), torch.tensor(t))
        return (x - (x - told * output)) / level

    return derivative


def flow(network: Network) -> Callable[[Tensor, float, float], Tensor]:
    return lambda x, level, told: network(x, torch.tensor(1000 * told, dtype=torch.float64))


# ---------------------------------------------------------------------- reading them


def plain(raw: dict[str, Any]) -> dict[str, Any]:
    """The two layouts of the published files as one."""
    names = ("dyweight_weights_raw", "dyweight_t_scales") if "dyweight_meta" in raw else ("weights", "t_scale")
    weights, scales = (raw[name] for name in names)
    return {"weights": weights, "scales": scales, "afs": raw.get("afs", False)}


def by_lag(weights: list[list[float]]) -> Tensor:
    """Absolute lower-triangular weights as our (N, K) table, with K the width of the band that is used."""
    n = len(weights)
    order = 1 + max(i - j for i in range(n) for j in range(i + 1) if weights[i][j] != 0)
    lagged = [[weights[i][i - j] if j <= i else 0.0 for j in range(order)] for i in range(n)]
    return torch.tensor(lagged, dtype=torch.float64)


def ours(raw: dict[str, Any], grid: dict[str, Any]) -> SolverTable:
    table = plain(raw)
    scales = [1.0] * table["afs"] + table["scales"]  # with AFS the first entry does not exist in the files
    return SolverTable(by_lag(table["weights"]), torch.tensor(scales, dtype=torch.float64), grid, table["afs"])


def run_core(
    table: SolverTable, prediction: Prediction, network: Network, x: Tensor, mu: float | None = None
) -> Tensor:
    def derivative(x: Tensor, sigma: Tensor, tau: Tensor) -> Tensor:
        output = network(prediction.input_scale(tau) * x, prediction.timestep(tau))
        return prediction.derivative(x, output, sigma, tau)

    return rollout(table.schedule(prediction, mu), derivative, x)


def run_pipeline(table: SolverTable, source: Any, network: Network, noise: Tensor, **how: Any) -> Tensor:
    """What a diffusers pipeline does, in float32, from a file."""
    n = table.num_inference_steps
    scheduler = DyWeightScheduler.from_config(source.config, tables={str(n): table_to_json(table)})
    scheduler.set_timesteps(n, **how)
    assert len(scheduler.timesteps) == n
    latents = noise.float() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(latents, t), t)
        latents = scheduler.step(output, t, latents, return_dict=False)[0]
    return latents


def check(result: Tensor, expected: Tensor) -> None:
    tolerance = 1e-9 if result.dtype == torch.float64 else 1e-4
    assert float((result - expected).norm() / expected.norm()) < tolerance


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(2, 3, 4, 4, dtype=torch.float64)


# ---------------------------------------------------------------------- DyWeight


@pytest.mark.parametrize("name", PIXEL)
def test_pixel_tables_with_analytical_first_step(name: str, noise: Tensor, network: Network) -> None:
    raw = PIXEL[name]

    def told(sample: Tensor, t: Tensor) -> Tensor:
        return network(sample, 400 * t)  # log(sigma) / 4 is of the order of 1

    n = raw["num_steps"] - 1  # the file counts grid points
    assert n == len(raw["weights"]) == len(raw["t_scale"]) + 1
    ends = [raw["sigma_max"], raw["sigma_min"]]
    roots = [e ** (1 / raw["schedule_rho"]) for e in ends]
    sigmas = [(roots[0] + i / n * (roots[1] - roots[0])) ** raw["schedule_rho"] for i in range(n + 1)]
    expected = dyweight(ends[0] * noise, edm(told), sigmas, plain(raw))

    table = ours(raw, {"name": "polynomial", "sigma_min": ends[1], "sigma_max": ends[0], "rho": raw["schedule_rho"]})
    assert table.weights.shape[1] == raw["max_history_steps"] and table.num_inference_steps == n - 1
    check(run_core(table, EDM(0.5), told, ends[0] * noise), expected)
    check(run_pipeline(table, EDMEulerScheduler(sigma_data=0.5), told, noise), expected)


@pytest.mark.parametrize("name", LATENT)
def test_stable_diffusion_tables(name: str, noise: Tensor, network: Network) -> None:
    raw, ends = LATENT[name], [14.6146, 0.0292]
    n = raw["num_steps"] - 1
    first, last = (np.interp(math.log(1 + e**2) / 2, -LOG_ALPHAS, TIMES) for e in ends)
    times = [first + i / n * (last - first) for i in range(n + 1)]
    sigmas = [math.sqrt(math.expm1(-2 * np.interp(t, TIMES, LOG_ALPHAS))) for t in times]
    expected = dyweight(sigmas[0] * noise, vp(network), sigmas, plain(raw))

    table = ours(raw, {"name": "discrete", "sigma_min": ends[1], "sigma_max": ends[0]})
    assert table.weights.shape[1] <= raw["max_history_steps"] and table.num_inference_steps == n
    check(run_core(table, Epsilon(ALPHAS_CUMPROD), network, sigmas[0] * noise), expected)
    check(run_pipeline(table, EulerDiscreteScheduler(**SD), network, noise), expected)


@pytest.mark.parametrize("name", FLUX)
def test_flux_tables_at_the_pipelines_shift(name: str, noise: Tensor, network: Network) -> None:
    raw = FLUX[name]
    n = len(raw["dyweight_t_scales"])
    times = [1 - i / n for i in range(n)]
    sigmas = [math.exp(MU) / (math.exp(MU) + 1 / t - 1) for t in times] + [0.0]
    expected = dyweight(noise, flow(network), sigmas, plain(raw))

    table = ours(raw, {"name": "flow"})
    assert table.weights.shape[1] == raw["window_size"] and table.num_inference_steps == n
    check(run_core(table, Flow(1000), network, noise, mu=MU), expected)
    source = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    check(run_pipeline(table, source, network, noise, sigmas=np.linspace(1, 1 / n, n).tolist(), mu=MU), expected)


# ---------------------------------------------------------------------- NeuralSolver


@pytest.mark.parametrize("name", NEURAL)
def test_neural_solver_tables(name: str, noise: Tensor, network: Network) -> None:
    """t = 1 - sigma runs from noise to data, and so does the velocity. The VP tables are run on the same axis."""
    raw = NEURAL[name]
    steps, rows = raw["timedeltas"], raw["coeffs"]
    total = sum(steps)  # printed with four digits
    steps = [dt / total for dt in steps]
    t, x, taken = 0.0, noise, []
    for dt, row in zip(steps, rows):
        taken.append(-network(x, torch.tensor(1000 * (1 - t), dtype=torch.float64)))
        older = [c * v for c, v in zip(row, taken[:-1])]
        x = x + dt * ((1 - sum(row)) * taken[-1] + sum(older))
        t += dt
    expected = x

    n = len(steps)
    weights = [[1 - sum(row) if i == j else row[j] for j in range(n)] for i, row in enumerate(rows)]
    sigmas = [1 - sum(steps[:i]) for i in range(n)] + [0.0]
    table = SolverTable(by_lag(weights), torch.ones(n, dtype=torch.float64), {"sigmas": sigmas})
    check(run_core(table, Flow(1000), network, noise), expected)
    check(run_pipeline(table, FlowMatchEulerDiscreteScheduler(), network, noise), expected)
