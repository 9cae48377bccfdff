"""Classical tables against diffusers' own schedulers: same levels, same network, every intermediate sample compared."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from dywspan import DyWeightScheduler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
# float64 proves the formulas; float32, whose rounding differs by machine, that they lose no digits.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])


@contextlib.contextmanager
def wide(dtype: torch.dtype) -> Iterator[None]:
    """diffusers casts to float32 by name: let that name mean float64 while its step runs."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with mock.patch.object(torch, "float32", dtype):
            yield
    finally:
        torch.set_default_dtype(default)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def compare(
    source: Any,
    ours: DyWeightScheduler,
    network: Callable[[Tensor, Tensor], Tensor],
    dtype: torch.dtype = torch.float32,
    begin: int = 0,
    same_times: float = 2e-3,
    **how: Any,
) -> None:
    """Run both from the same noise; at each step both see the same level, and their samples the same frame.

    Args:
        begin: step to start at, as img2img pipelines do.
        same_times: how far the published timesteps may lie apart (the source may round its own).
        how: arguments of set_timesteps.
    """
    assert ours.config["host_scheduler"] == type(source).__name__
    corrector = getattr(source.config, "disable_corrector", None)
    ours.set_timesteps(**how)
    source.set_timesteps(**how)
    assert corrector is None or len(corrector) >= len(source.timesteps)
    assert torch.equal(ours.sigmas, source.sigmas)
    source.sigmas = source.sigmas.double()  # its float32 coefficients cancel: DEIS loses two digits at order 3
    torch.testing.assert_close(ours.timesteps, source.timesteps.float(), rtol=0, atol=same_times)
    variance_exploding = isinstance(source, EulerDiscreteScheduler)

    def in_our_frame(x: Tensor, i: int) -> Tensor:
        return x / (1 + source.sigmas[i] ** 2) ** 0.5 if variance_exploding else x

    noise, clean = torch.randn(2, 4, 3, 3, dtype=dtype), torch.randn(2, 4, 3, 3, dtype=dtype)
    if begin:
        for scheduler in (source, ours):
            scheduler.set_begin_index(begin)
        if hasattr(source, "add_noise"):
            theirs = source.add_noise(clean, noise, source.timesteps[begin : begin + 1].repeat(2))
            x = ours.add_noise(clean, noise, ours.timesteps[begin : begin + 1].repeat(2))
        else:
            theirs = source.scale_noise(clean, source.timesteps[begin : begin + 1].repeat(2), noise)
            x = ours.scale_noise(clean, ours.timesteps[begin : begin + 1].repeat(2), noise)
        assert distance(x, in_our_frame(theirs, begin)) < TOLERANCE[dtype]
    else:
        assert ours.init_noise_sigma == pytest.approx(1, rel=1e-12)
        x, theirs = noise * ours.init_noise_sigma, noise
        if variance_exploding:
            theirs = noise * (1 + source.sigmas[0] ** 2) ** 0.5
    for i in range(begin, len(source.timesteps)):
        t = source.timesteps[i]
        scaled = source.scale_model_input(theirs, t) if hasattr(source, "scale_model_input") else theirs
        output = network(scaled, t)
        with wide(dtype):
            theirs = source.step(output, t, theirs).prev_sample
        x = ours.step(network(ours.scale_model_input(x, t), t), ours.timesteps[i], x).prev_sample
        assert x.dtype == theirs.dtype == dtype
        assert distance(x, in_our_frame(theirs, i + 1)) < TOLERANCE[dtype], f"step {i}"


# ---------------------------------------------------------------------- Euler


@DTYPES
@pytest.mark.parametrize("begin", [0, 1, 2])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_euler(kind: str, spacing: str, begin: int, dtype: torch.dtype, network: Callable) -> None:
    source = EulerDiscreteScheduler(**SD, prediction_type=kind, timestep_spacing=spacing)
    ours = DyWeightScheduler.from_config(source.config, solver="euler")
    for n in (3, 11):
        compare(source, ours, network, dtype, begin, num_inference_steps=n)


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas", "final_sigmas_type"])
def test_euler_on_other_grids(option: str, network: Callable) -> None:
    source = EulerDiscreteScheduler(**SD, **{option: "sigma_min" if option == "final_sigmas_type" else True})
    ours = DyWeightScheduler.from_config(source.config, solver="euler")
    compare(source, ours, network, same_times=0.05, num_inference_steps=7)


@DTYPES
@pytest.mark.parametrize("begin", [0, 1, 2])
@pytest.mark.parametrize(
    "config, how",
    [
        ({"shift": 3.0}, {"num_inference_steps": 8}),
        ({"use_dynamic_shifting": True}, {"mu": calculate_shift(1024), "sigmas": [1.0, 0.75, 0.5, 0.25]}),
        ({"use_dynamic_shifting": True}, {"mu": 0.9, "num_inference_steps": 4}),
        ({"shift": 1.5}, {"sigmas": [0.95, 0.6, 0.4, 0.1]}),
        ({"shift": 2.0, "shift_terminal": 0.02}, {"num_inference_steps": 5}),
    ],
    ids=["static", "flux", "mu", "sigmas", "terminal"],
)
def test_flow_match_euler(config: dict, how: dict, begin: int, dtype: torch.dtype, network: Callable) -> None:
    source = FlowMatchEulerDiscreteScheduler(**config)
    ours = DyWeightScheduler.from_config(source.config, solver="euler")
    compare(source, ours, network, dtype, begin, **how)


def test_flow_match_euler_inverted(network: Callable) -> None:
    """Mochi counts from data to noise: its sigmas rise, its network's output points the other way."""
    source = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    ours = DyWeightScheduler.from_config(source.config, solver="euler")
    compare(source, ours, network, sigmas=[1.0, 0.97, 0.9, 0.5])


# ---------------------------------------------------------------------- DPM-Solver++


@DTYPES
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmpp(order: int, lower_order_final: bool, final: str, dtype: torch.dtype, network: Callable) -> None:
    source = DPMSolverMultistepScheduler(
        **SD, solver_order=order, lower_order_final=lower_order_final, final_sigmas_type=final
    )
    ours = DyWeightScheduler.from_config(source.config, solver="dpmpp", solver_order=order)
    for n, begin in ((4, 0), (7, 2), (14, 0), (15, 1)):  # diffusers lowers the last orders below 15 steps
        compare(source, ours, network, dtype, begin, num_inference_steps=n)


@DTYPES
@pytest.mark.parametrize("begin", [0, 1, 2])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "karras"])
def test_dpmpp_conventions(spacing: str, kind: str, begin: int, dtype: torch.dtype, network: Callable) -> None:
    grid = {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
    source = DPMSolverMultistepScheduler(**SD, **grid, prediction_type=kind)
    ours = DyWeightScheduler.from_config(source.config, solver="dpmpp", solver_order=2)
    # Karras times are rounded by diffusers: the network is told its level's own time by us.
    compare(source, ours, network, dtype, begin, 0.51 if spacing == "karras" else 2e-3, num_inference_steps=9)


@DTYPES
@pytest.mark.parametrize("begin", [0, 1])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmpp_flow(order: int, begin: int, dtype: torch.dtype, network: Callable) -> None:
    source = DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0, solver_order=order)
    ours = DyWeightScheduler.from_config(source.config, solver="dpmpp", solver_order=order)
    for n in (4, 16):
        compare(source, ours, network, dtype, begin, same_times=1.0, num_inference_steps=n)


# ---------------------------------------------------------------------- UniPC's predictor, DEIS


@DTYPES
@pytest.mark.parametrize("begin", [0, 1, 2])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_predictor(order: int, kind: str, begin: int, dtype: torch.dtype, network: Callable) -> None:
    source = UniPCMultistepScheduler(**SD, solver_order=order, prediction_type=kind, disable_corrector=list(range(20)))
    ours = DyWeightScheduler.from_config(source.config, solver="unipc", solver_order=order)
    for n in (5, 16):
        compare(source, ours, network, dtype, begin, num_inference_steps=n)


@DTYPES
@pytest.mark.parametrize("order", [2, 3])
def test_unipc_predictor_keeps_its_order_to_the_end(order: int, dtype: torch.dtype, network: Callable) -> None:
    source = UniPCMultistepScheduler(
        **SD,
        solver_order=order,
        lower_order_final=False,
        final_sigmas_type="sigma_min",
        disable_corrector=list(range(20)),
        timestep_spacing="trailing",
    )
    ours = DyWeightScheduler.from_config(source.config, solver="unipc", solver_order=order)
    compare(source, ours, network, dtype, num_inference_steps=8)


@DTYPES
@pytest.mark.parametrize("begin", [0, 1])
@pytest.mark.parametrize("order", [2, 3])
def test_unipc_predictor_flow(order: int, begin: int, dtype: torch.dtype, network: Callable) -> None:
    source = UniPCMultistepScheduler(**FLOW, flow_shift=2.0, solver_order=order, disable_corrector=list(range(20)))
    ours = DyWeightScheduler.from_config(source.config, solver="unipc", solver_order=order)
    compare(source, ours, network, dtype, begin, same_times=1.0, num_inference_steps=8)


@DTYPES
@pytest.mark.parametrize("begin", [0, 1, 2])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order: int, kind: str, begin: int, dtype: torch.dtype, network: Callable) -> None:
    source = DEISMultistepScheduler(**SD, solver_order=order, prediction_type=kind)
    ours = DyWeightScheduler.from_config(source.config, solver="deis", solver_order=order)
    for n in (5, 14, 15):
        compare(source, ours, network, dtype, begin, num_inference_steps=n)
