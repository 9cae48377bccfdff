"""What a step costs besides the network, and that being cheap changes nothing in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from dywspan import DyWeightScheduler, SolverTable, SpanLiftScheduler
from dywspan.bench import overhead
from dywspan.bench.overhead import SIZES, state_bytes
from dywspan.cli import main
from dywspan.core.operator import Lift
from dywspan.core.step import combine, rollout

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP_GRID = {"name": "discrete", "sigma_min": 0.03, "sigma_max": 14.6}
EDM_GRID = {"name": "polynomial", "sigma_min": 0.01, "sigma_max": 80.0}
FLOW_GRID = {"name": "flow", "shift": 3.0}
Derivative = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x, output, sigma, tau) -> d


def _edm(sign: int) -> Derivative:
    """EDM, table 1, with sigma_data = 0.5."""

    def derivative(x: Tensor, output: Tensor, sigma: Tensor, tau: Tensor) -> Tensor:
        c_skip, c_out = 0.25 / (tau**2 + 0.25), 0.5 * tau / (tau**2 + 0.25).sqrt()
        return (x - (c_skip * x + sign * c_out * output)) / sigma

    return derivative


def _velocity(x: Tensor, output: Tensor, sigma: Tensor, tau: Tensor) -> Tensor:
    alpha = 1 / (1 + tau**2).sqrt()
    return (x - (alpha * (alpha * x) - tau * alpha * output)) / sigma


# Each convention's scheduler, grid, and derivative as its paper has it.
CONVENTIONS: dict[str, tuple[Any, dict[str, Any], Derivative]] = {
    "epsilon": (
        DDIMScheduler(**SD, clip_sample=False),
        VP_GRID,
        lambda x, out, sigma, tau: (x - (x - tau * out)) / sigma,
    ),
    "v_prediction": (DDIMScheduler(**SD, clip_sample=False, prediction_type="v_prediction"), VP_GRID, _velocity),
    "sample": (
        DDIMScheduler(**SD, clip_sample=False, prediction_type="sample"),
        VP_GRID,
        lambda x, out, sigma, tau: (x - out) / sigma,
    ),
    "edm": (EDMEulerScheduler(), EDM_GRID, _edm(1)),
    "edm, velocity": (EDMEulerScheduler(prediction_type="v_prediction"), EDM_GRID, _edm(-1)),
    "flow": (FlowMatchEulerDiscreteScheduler(shift=3.0), FLOW_GRID, lambda x, out, sigma, tau: out),
    "flow, inverted": (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), FLOW_GRID, lambda x, out, s, t: -out),
}
CASES = [(kind, afs) for kind in CONVENTIONS for afs in (False, True) if not (afs and "flow" in kind)]
SOLVERS = pytest.mark.parametrize("solver", ["dyweight", "spanlift"])


def learned(kind: str, n: int = 5, order: int = 3, afs: bool = False, solver: str = "dyweight") -> DyWeightScheduler:
    """A table as training leaves it; SpanLift's operator still adds nothing, and its alpha is 1."""
    source, grid, _ = CONVENTIONS[kind]
    plain, rows = DyWeightScheduler.from_config(source.config), n + afs
    generator = torch.Generator().manual_seed(n)
    noise = torch.randn(rows, order + 1, generator=generator, dtype=torch.float64)
    weights = SolverTable.initial(rows, order, grid, plain.host.prediction).weights + 0.04 * noise[:, 1:].tril()
    base = plain.with_tables([SolverTable(weights, 1 + 0.03 * noise[:, 0], grid, afs)])
    if solver == "dyweight":
        return base
    lifted = SpanLiftScheduler.from_config(base.config, operator={"channels": 4, "order": order, "width": 8})
    lifted.lifts[n] = Lift(torch.ones(rows), torch.ones(rows))
    return lifted.initialize()


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


# ---------------------------------------------------------------------- the same numbers


@SOLVERS
@pytest.mark.parametrize("kind, afs", CASES)
def test_a_run_is_the_formula_to_rounding(kind: str, afs: bool, solver: str, network: Callable[..., Tensor]) -> None:
    """Frames and derivatives folded into two coefficients a step and one a derivative, against x + sum c d."""
    scheduler, derivative = learned(kind, afs=afs, solver=solver), CONVENTIONS[kind][2]
    scheduler.set_timesteps(5)
    prediction, noise = scheduler.host.prediction, random(2, 4, 3, 3)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]

    def asked(x: Tensor, sigma: Tensor, tau: Tensor) -> Tensor:
        return derivative(x, network(prediction.input_scale(tau) * x, prediction.timestep(tau).float()), sigma, tau)

    schedule = scheduler.tables[5].schedule(prediction)
    expected = rollout(schedule, asked, schedule.levels[0] * noise)
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


def test_combine_is_the_sum_and_its_gradient() -> None:
    coefficients, values = random(4).requires_grad_(), [v.clone().requires_grad_() for v in random(4, 5)]

    def combined(c: Tensor, *v: Tensor) -> Tensor:
        return combine(*zip(c, v))

    torch.testing.assert_close(combined(coefficients, *values), coefficients @ torch.stack(values))
    assert torch.autograd.gradcheck(combined, (coefficients, *values))
    assert torch.autograd.gradgradcheck(combined, (coefficients, *values))
    numbers = coefficients.tolist()
    assert torch.autograd.gradcheck(lambda *v: combine(*zip(numbers, v)), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_combine_gives_the_same_bits_with_a_graph_and_without(dtype: torch.dtype) -> None:
    """What a student was trained at is what its saved table samples."""
    coefficients, values = random(4), random(4, 1031, dtype=dtype).unbind()
    coefficients[2] = 0  # costs nothing, and has a gradient
    leaves = coefficients.clone().requires_grad_()
    with_graph = combine(*zip(leaves, values))
    assert torch.equal(with_graph, combine(*zip(coefficients.tolist(), values))) and with_graph.dtype == dtype
    (gradient,) = torch.autograd.grad(with_graph.sum(), leaves)
    torch.testing.assert_close(gradient, torch.stack([v.sum() for v in values]).double(), rtol=1e-5, atol=1e-5)


@SOLVERS
@pytest.mark.parametrize("kind", CONVENTIONS)
def test_a_step_owns_its_memory(kind: str, solver: str) -> None:
    """Compiled networks write each output over the last one: neither the sample nor the past may lie in it."""
    scheduler, x, outputs = learned(kind, solver=solver), random(2, 4, 3, 3).float(), random(5, 2, 4, 3, 3).float()
    ends = []
    for static in (False, True):
        scheduler.set_timesteps(5)
        buffer, sample = torch.empty_like(x), x.clone()
        for t, output in zip(scheduler.timesteps, outputs):
            buffer = buffer.copy_(output) if static else output
            before = [v.clone() for v in (sample, buffer)]
            after = scheduler.step(buffer, t, sample, return_dict=False)[0]
            assert torch.equal(sample, before[0]) and torch.equal(buffer, before[1])
            sample = sample.copy_(after) if static else after
        ends.append(sample)
    assert torch.equal(*ends)


# ---------------------------------------------------------------------- what it costs


@SOLVERS
@pytest.mark.parametrize("order", [2, 3])
def test_state_does_not_grow_with_the_number_of_steps(order: int, solver: str) -> None:
    x = random(1, 4, 8, 8, dtype=torch.float32)
    for n in (3, 10, 50):
        scheduler = learned("epsilon", n, order, solver=solver)
        scheduler.set_timesteps(n)
        held = []
        for t in scheduler.timesteps:
            scheduler.step(x, t, x)
            held.append(state_bytes(scheduler, x.shape))
        assert max(held) == min(order, n - 1) * x.nbytes and held[-1] == 0


def _small_sd15(device: str) -> Any:
    """Its pipeline around a small network of the same kind."""
    blocks: Any = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = UNet2DConditionModel(8, block_out_channels=(32,), cross_attention_dim=768, norm_num_groups=8, **blocks)
    absent: Any = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler: Any = DDIMScheduler(**SD, clip_sample=False)
    return StableDiffusionPipeline(unet=unet, scheduler=scheduler, requires_safety_checker=False, **absent).to(device)


def test_bench_overhead_counts_no_host_reads_and_a_flat_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "_denoiser_seconds", lambda unet, x: 1.0)
    monkeypatch.setattr(overhead, "sd15", _small_sd15)
    file = tmp_path / "o.json"
    options = ["--sizes", "sd15", "flux", "--steps", "3", "5", "--repeats", "1", "--output", str(file)]
    assert main(["bench", "overhead", *options]) == 0
    data = json.loads(file.read_text())
    assert data["threads"] == torch.get_num_threads()
    for size, others in (("sd15", ["SpanLift, K = 2", "TimeLift, K = 2"]), ("flux", ["Euler, diffusers"])):
        rows = [r for r in data["rows"] if r["shape"] == list(SIZES[size].shape)]
        sample = 4 * torch.Size(SIZES[size].shape).numel()
        for n in (3, 5):
            by_name = {r["scheduler"]: r for r in rows if r["num_inference_steps"] == n}
            assert by_name.keys() > {overhead.REFERENCE, "UniPC, diffusers", *others}
            reference = by_name[overhead.REFERENCE]
            assert reference["syncs"] > 0 and reference["state_bytes"] == 2 * sample
            for name, row in by_name.items():
                assert row["ratio_to_dpmpp2m"] == pytest.approx(row["us_per_step"] / reference["us_per_step"])
                if size == "sd15":
                    assert row["percent_of_denoiser"] == pytest.approx(row["us_per_step"] / 1e4)
                else:
                    assert row["percent_of_denoiser"] is None
                if not name.endswith("diffusers"):
                    assert row["syncs"] == 0 and row["state_bytes"] == min(int(name[-1]), n - 1) * sample
