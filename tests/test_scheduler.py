"""The contract with diffusers' pipelines and training scripts."""

import copy
import inspect
import json
import math
import pickle
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dywspan
from dywspan import DyWeightScheduler, SolverTable
from dywspan.artifact import table_to_json
from dywspan.core.bases import BASES
from dywspan.core.prediction import Prediction
from dywspan.core.step import rollout

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SOURCES = {
    "epsilon": DDIMScheduler(**SD, clip_sample=False),
    "v_prediction": EulerDiscreteScheduler(**SD, prediction_type="v_prediction"),
    "edm": EDMEulerScheduler(),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
}
GRID = {
    "epsilon": {"name": "discrete", "sigma_min": 0.03, "sigma_max": 14.6},
    "v_prediction": {"name": "logsnr", "sigma_min": 0.03, "sigma_max": 14.0},
    "edm": {"name": "polynomial", "sigma_min": 0.01, "sigma_max": 80.0},
    "flow": {"name": "flow", "shift": 3.0},
}
Network = Callable[[Tensor, Tensor], Tensor]
KINDS = pytest.mark.parametrize("kind", SOURCES)


def learned(kind: str = "epsilon", n: int = 5, order: int = 3, afs: bool = False) -> SolverTable:
    """A table as training leaves it: near its base, rows off 1, times off the grid."""
    generator = torch.Generator().manual_seed(n)
    n += afs
    weights = SolverTable.initial(n, order, GRID[kind], with_table(kind).host.prediction).weights
    noise = torch.randn(n, order, generator=generator, dtype=torch.float64).tril()
    scale = 1 + 0.03 * torch.randn(n, generator=generator, dtype=torch.float64)
    return SolverTable(weights + 0.04 * noise, scale, GRID[kind], afs)


def with_table(kind: str = "epsilon", *tables: SolverTable, **config: Any) -> DyWeightScheduler:
    data = {str(t.num_inference_steps): table_to_json(t) for t in tables}
    return DyWeightScheduler.from_config(SOURCES[kind].config, tables=data, **config)


def classical(solver: str, kind: str = "epsilon", **config: Any) -> DyWeightScheduler:
    return DyWeightScheduler.from_config(SOURCES[kind].config, solver=solver, **config)


def sample_of(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 4, 3, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def run(scheduler: DyWeightScheduler, network: Network, x: Tensor, times: Iterable[Any] | None = None) -> Tensor:
    """A pipeline's loop; the network is told the schedule's own time, whatever form ``times`` hands to step."""
    for t in scheduler.timesteps if times is None else times:
        index = scheduler.index_for_timestep(t)
        x = scheduler.step(network(x, scheduler.timesteps[index]), t, x, return_dict=False)[0]
    return x


def by_hand(
    table: SolverTable, prediction: Prediction, network: Network, x: Tensor, start: int = 0, mu: float | None = None
) -> Tensor:
    """Solver-frame loop over a table from step ``start``; weights of derivatives never taken go to the oldest one."""
    schedule = table.schedule(prediction, mu)
    taken: list[Tensor] = []
    for i in range(start, len(table.weights)):
        level, tau = schedule.levels[i], schedule.queries[i]
        if table.afs and i == 0:
            taken.append(x / math.sqrt(1 + float(level) ** 2))
        else:
            output = network(prediction.input_scale(tau) * x, prediction.timestep(tau).float())
            taken.append(prediction.derivative(x, output, level, tau))
        for j, c in enumerate(schedule.increments[i]):
            x = x + c * taken[max(len(taken) - 1 - j, 0)]
    return x


# ---------------------------------------------------------------------- no waiting for the device


class DeviceReads(TorchDispatchMode):
    """Operations that make the host wait for float32 tensors, as samples and timesteps are, or move between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero") and first.dtype == torch.float32:
            self.seen.append(name)
        if name == "_to_copy" and kwargs.get("device") not in (None, first.device):
            self.seen.append(name)
        if name == "copy_" and args[1].device != first.device:
            self.seen.append(name)
        return func(*args, **kwargs)


def test_the_counter_sees_reads() -> None:
    with DeviceReads() as reads:
        torch.ones(1).item()
        (torch.ones(3) == 1).float().nonzero()
        torch.ones(1).to("meta")
    assert reads.seen == ["_local_scalar_dense", "nonzero", "_to_copy"]


@pytest.mark.parametrize("start", ["whole", "sliced", "begin index"])
@pytest.mark.parametrize("solver", ["table", "trainable table", "dpmpp", "heun"])
def test_step_never_reads_the_device(solver: str, start: str, network: Network) -> None:
    scheduler = with_table("epsilon", learned()) if "table" in solver else classical(solver)
    if solver == "trainable table":
        require_grad(scheduler, 5)
    scheduler.set_timesteps(5)
    times, x = scheduler.timesteps, sample_of() * scheduler.init_noise_sigma
    if start != "whole":
        times = times[2:]
    if start == "begin index":
        scheduler.set_begin_index(2)
    for t in times:
        output = network(x, t)
        with DeviceReads() as reads:
            x = scheduler.step(output, t, x).prev_sample
        assert reads.seen == []
    assert scheduler.step_index == len(scheduler.timesteps)


@pytest.mark.parametrize("begin", [0, 2])
@pytest.mark.parametrize("solver", ["table", "trainable table", *BASES])
def test_on_a_device_that_cannot_be_read(solver: str, begin: int) -> None:
    """Any host read of a meta tensor raises; so does an operation across devices."""
    scheduler = with_table("epsilon", learned()) if "table" in solver else classical(solver)
    if solver == "trainable table":
        require_grad(scheduler, 5)
    scheduler.set_timesteps(5, device="meta")
    assert scheduler.timesteps.device.type == "meta" and scheduler.timesteps.ndim == 1
    scheduler.set_begin_index(begin)
    x = torch.empty(2, 4, 3, 3, device="meta")
    x = scheduler.add_noise(x, x, scheduler.timesteps[begin : begin + 1].repeat(2))
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(torch.empty_like(x), t, x).prev_sample
    assert x.device.type == "meta" and scheduler.step_index == len(scheduler.timesteps)
    with pytest.raises(ValueError, match=r"past the end of .* call set_timesteps again"):
        scheduler.step(x, scheduler.timesteps[-1].clone(), x)


# ---------------------------------------------------------------------- finding the step

FORMS: dict[str, Callable[[Tensor], Any]] = {
    "views": lambda t: t,
    "expanded": lambda t: t.expand(2),
    "clones": lambda t: t.clone(),
    "bfloat16": lambda t: t.to(torch.bfloat16),
    "numbers": lambda t: float(t),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("begin", [0, 2])
@pytest.mark.parametrize("solver", ["table", "ipndm", "heun"])
def test_every_form_of_timestep_finds_its_step(solver: str, begin: int, form: str, network: Network) -> None:
    """Heun's times repeat in value: a step's end is the next one's start."""
    scheduler = with_table("epsilon", learned()) if solver == "table" else classical(solver)
    scheduler.set_timesteps(5)
    first = begin * scheduler.order
    expected = run(scheduler, network, sample_of(), scheduler.timesteps[first:])
    scheduler.set_timesteps(5)
    if form == "bfloat16" or first:
        scheduler.set_begin_index(first)
    x, convert = sample_of(), FORMS[form]
    for i in range(first, len(scheduler.timesteps)):
        t = scheduler.timesteps[i]
        x = scheduler.step(network(x, t), convert(t), x).prev_sample
        assert scheduler.step_index == i + 1
    assert torch.equal(x, expected)


def test_times_that_coincide_in_bfloat16_keep_their_order(network: Network) -> None:
    scheduler = classical("euler", "flow")
    scheduler.set_timesteps(400)
    rounded = [t.to(torch.bfloat16) for t in scheduler.timesteps]
    assert len({float(t) for t in rounded}) < 300
    x = sample_of()
    for i, t in enumerate(rounded):
        assert scheduler.index_for_timestep(t) == i
        x = scheduler.step(x, t, x).prev_sample


def test_a_jump_forgets_the_past(network: Network) -> None:
    scheduler, fresh = with_table("epsilon", learned()), with_table("epsilon", learned())
    x = sample_of()
    for s in (scheduler, fresh):
        s.set_timesteps(5)
    run(scheduler, network, x, scheduler.timesteps[:4])
    assert torch.equal(run(scheduler, network, x, scheduler.timesteps[1:]), run(fresh, network, x, fresh.timesteps[1:]))
    with_past, without = x, x
    fresh.set_timesteps(5)
    for t in fresh.timesteps[:2]:
        with_past = fresh.step(network(x, t), t, x).prev_sample
    fresh.set_timesteps(5)
    without = fresh.step(network(x, t), t, x).prev_sample
    assert not torch.equal(with_past, without)  # the past would have shown


def test_foreign_timesteps_are_refused() -> None:
    scheduler = with_table("epsilon", learned())
    x = sample_of()
    with pytest.raises(ValueError, match="Call set_timesteps before step"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(5)
    for t in (torch.tensor(500.0), 1e4, 0.99 * float(scheduler.timesteps[1])):  # bfloat16 is within 0.4%
        with pytest.raises(ValueError, match=r"not in the schedule.*pass elements of `timesteps`"):
            scheduler.step(x, t, x)


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("kind, afs", [(k, a) for k in SOURCES for a in (False, True) if not (a and k == "flow")])
def test_a_learned_run_is_the_method(kind: str, afs: bool, network: Network) -> None:
    """From unit noise to x_N, through input scale, calibrated times and AFS, against the solver-frame loop."""
    table = learned(kind, afs=afs)
    scheduler = with_table(kind, table)
    scheduler.set_timesteps(5)
    noise = sample_of(dtype=torch.float64)
    x = run(scheduler, network, noise * scheduler.init_noise_sigma)
    sigma_0 = 1.0 if kind == "flow" else GRID[kind]["sigma_max"]
    expected = by_hand(table, scheduler.host.prediction, network, sigma_0 * noise)
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == 5
    assert len(scheduler.sigmas) == 6 and float(scheduler.sigmas[-1]) == pytest.approx(GRID[kind].get("sigma_min", 0))


@KINDS
@pytest.mark.parametrize("start", [1, 3])
def test_a_start_in_mid_table_keeps_row_sums_and_levels(kind: str, start: int, network: Network) -> None:
    table = learned(kind)
    scheduler = with_table(kind, table)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(start)
    prediction, schedule = scheduler.host.prediction, table.schedule(scheduler.host.prediction)
    level, tau = schedule.levels[start], schedule.queries[start]
    clean, noise = sample_of(dtype=torch.float64), sample_of(dtype=torch.float64).flip(0)
    state = prediction.signal(level) * clean + level * noise
    times = scheduler.timesteps[start:]
    x = scheduler.add_noise(clean, noise, times[:1].repeat(2))
    torch.testing.assert_close(x, prediction.input_scale(tau) * state, rtol=1e-12, atol=1e-12)
    x = run(scheduler, network, x, times)
    expected = by_hand(table, prediction, network, state, start)
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("afs", [False, True])
def test_pipelines_that_never_scale_their_noise(afs: bool) -> None:
    """Most flow and some VP pipelines do not read init_noise_sigma: the first step makes up for it."""
    scheduler = with_table("epsilon", learned(afs=afs))
    noise, outputs = sample_of(dtype=torch.float64), torch.randn(5, 2, 4, 3, 3, dtype=torch.float64)
    ends = []
    for reads in (True, False):
        scheduler.set_timesteps(5)
        x = noise * scheduler.init_noise_sigma if reads else noise
        for t, output in zip(scheduler.timesteps, outputs):
            x = scheduler.step(output, t, x).prev_sample
        ends.append(x)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-12)
    assert scheduler.init_noise_sigma == 1, "to a pipeline that asks before set_timesteps, the last run is nothing"
    scheduler.set_timesteps(5)
    assert scheduler.init_noise_sigma != 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", ["table", "dpmpp"])
def test_half_precision_is_rounded_once_per_step(solver: str, dtype: torch.dtype, network: Network) -> None:
    half, full = (with_table("epsilon", learned()) if solver == "table" else classical(solver) for _ in range(2))
    x = sample_of(dtype=dtype)
    for scheduler in (half, full):
        scheduler.set_timesteps(5)
        x = sample_of(dtype=dtype) * scheduler.init_noise_sigma
    for t, u in zip(half.timesteps, full.timesteps):
        output = network(x.float(), t).to(dtype)
        exact = full.step(output.float(), u, x.float()).prev_sample
        x = half.step(output, t, x).prev_sample
        assert x.dtype == dtype and exact.dtype == torch.float32
        assert torch.equal(x, exact.to(dtype))


@pytest.mark.parametrize("sample", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("output", [torch.bfloat16, torch.float32, torch.float64])
def test_the_sample_keeps_its_dtype(sample: torch.dtype, output: torch.dtype) -> None:
    scheduler = with_table("epsilon", learned())
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        assert scheduler.step(sample_of(dtype=output), t, sample_of(dtype=sample)).prev_sample.dtype == sample
    assert scheduler.add_noise(sample_of(dtype=sample), sample_of(dtype=output), torch.tensor([3, 700])).dtype == sample


@pytest.mark.parametrize("solver", ["table", *BASES])
def test_runs_repeat_bit_for_bit_and_samples_do_not_mix(solver: str, network: Network) -> None:
    scheduler = with_table("epsilon", learned()) if solver == "table" else classical(solver)
    noise = sample_of(3)
    whole = []
    for _ in range(2):
        scheduler.set_timesteps(5)
        whole.append(run(scheduler, network, noise * scheduler.init_noise_sigma))
    assert torch.equal(*whole)
    for one, end in zip(noise.split(1), whole[0].split(1)):
        scheduler.set_timesteps(5)
        assert torch.equal(run(scheduler, network, one * scheduler.init_noise_sigma), end)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_history_is_bounded(order: int, network: Network) -> None:
    scheduler = with_table("epsilon", learned(order=order, n=7))
    scheduler.set_timesteps(7)
    x = sample_of()
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(x, t), t, x).prev_sample
        assert len(scheduler.state.history) == (min(i + 1, order) if i < 6 else 0)


@KINDS
def test_learned_variances_are_dropped(kind: str, network: Network) -> None:
    scheduler, plain = with_table(kind, learned(kind)), with_table(kind, learned(kind))
    x = sample_of()
    for s in (scheduler, plain):
        s.set_timesteps(5)
    for t, u in zip(scheduler.timesteps, plain.timesteps):
        output = network(x, t)
        expected = plain.step(output, u, x).prev_sample
        x = scheduler.step(torch.cat([output, torch.randn_like(output)], 1), t, x).prev_sample
        assert torch.equal(x, expected)


# ---------------------------------------------------------------------- noising


def test_training_scripts_noise_at_any_timestep() -> None:
    clean, noise, times = sample_of(4), sample_of(4).flip(0), torch.tensor([0, 17, 512, 999])
    reference = DDPMScheduler(**SD).add_noise(clean, noise, times)
    for scheduler in (classical("ipndm"), with_table("epsilon", learned())):
        torch.testing.assert_close(scheduler.add_noise(clean, noise, times), reference, rtol=1e-5, atol=1e-6)
        scheduler.set_timesteps(5)
        torch.testing.assert_close(scheduler.add_noise(clean, noise, times), reference, rtol=1e-5, atol=1e-6)
        run(scheduler, lambda x, t: 0.1 * x, sample_of())
        torch.testing.assert_close(scheduler.add_noise(clean, noise, times), reference, rtol=1e-5, atol=1e-6)
    flow = classical("euler", "flow")
    sigma = (times / 1000)[:, None, None, None]
    expected = (1 - sigma) * clean + sigma * noise
    torch.testing.assert_close(flow.add_noise(clean, noise, times), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(flow.scale_noise(clean, times, noise), flow.add_noise(clean, noise, times))
    with pytest.raises(ValueError, match="needs the noise: pass noise="):
        flow.scale_noise(clean, times)


@KINDS
def test_inpainting_noises_to_the_level_the_state_is_at(kind: str, network: Network) -> None:
    """After step i inpainting pipelines noise the known part to ``torch.tensor([timesteps[i + 1]])``."""
    table = learned(kind)
    scheduler = with_table(kind, table)
    scheduler.set_timesteps(5)
    prediction = scheduler.host.prediction
    schedule = table.schedule(prediction)
    clean, noise = sample_of(dtype=torch.float64), sample_of(dtype=torch.float64).flip(0)
    x = noise * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps[:-1]):
        x = scheduler.step(network(x, t), t, x).prev_sample
        known = scheduler.add_noise(clean, noise, torch.tensor([scheduler.timesteps[i + 1]]))
        level, tau = schedule.levels[i + 1], schedule.queries[i + 1]
        expected = prediction.input_scale(tau) * (prediction.signal(level) * clean + level * noise)
        torch.testing.assert_close(known, expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- gradients, copies


def require_grad(scheduler: DyWeightScheduler, n: int) -> SolverTable:
    """What a trainer does: leaves in place of a table's numbers."""
    old = scheduler.tables[n]
    leaves = [v.clone().requires_grad_() for v in (old.weights, old.time_scale)]
    scheduler.tables[n] = SolverTable(*leaves, old.grid, old.afs)
    return scheduler.tables[n]


@pytest.mark.parametrize("kind, afs", [(k, a) for k in SOURCES for a in (False, True) if not (a and k == "flow")])
def test_gradients_reach_the_table_through_step_and_timesteps(kind: str, afs: bool, network: Network) -> None:
    scheduler = with_table(kind, learned(kind, afs=afs))
    table = require_grad(scheduler, 5)
    scheduler.set_timesteps(5)
    prediction = scheduler.host.prediction
    stretch = 100 if kind == "edm" else 1

    def told(sample: Tensor, t: Tensor) -> Tensor:
        return network(sample, stretch * t)

    def derivative(x: Tensor, sigma: Tensor, tau: Tensor) -> Tensor:
        output = told(prediction.input_scale(tau) * x, prediction.timestep(tau).float())
        return prediction.derivative(x, output, sigma, tau)

    noise = sample_of(dtype=torch.float64)
    x = noise * scheduler.init_noise_sigma
    end = run(scheduler, told, x)
    sigma_0 = 1.0 if kind == "flow" else GRID[kind]["sigma_max"]
    reference = rollout(table.schedule(prediction), derivative, sigma_0 * noise)
    torch.testing.assert_close(end, reference, rtol=1e-9, atol=1e-9)
    parameters = (table.weights, table.time_scale)
    ours, theirs = (torch.autograd.grad(e.square().sum(), parameters, retain_graph=True) for e in (end, reference))
    torch.testing.assert_close(ours[0].tril(), theirs[0].tril(), rtol=1e-5, atol=1e-7)  # above it, nothing exists
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-7)
    assert ours[0].tril().count_nonzero() == table.weights.count_nonzero() and ours[1].count_nonzero() == 5
    assert scheduler.timesteps.requires_grad
    through_times = torch.autograd.grad(scheduler.timesteps.sum(), parameters)
    assert all(g.abs().max() > 0 for g in through_times)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("afs", [False, True])
def test_copies_while_a_graph_is_held(how: Callable, afs: bool, network: Network) -> None:
    scheduler = with_table("epsilon", learned(afs=afs))
    require_grad(scheduler, 5)
    scheduler.set_timesteps(5)
    x = sample_of() * scheduler.init_noise_sigma
    middle = run(scheduler, network, x, scheduler.timesteps[:2])
    assert middle.requires_grad
    twin = how(scheduler)
    assert twin.step_index == 2 and type(twin) is DyWeightScheduler
    end = run(scheduler, network, middle, scheduler.timesteps[2:])
    assert not twin.timesteps.requires_grad
    ready = run(twin, network, x.detach())  # as it is, without a new set_timesteps
    torch.testing.assert_close(ready, end.detach(), rtol=1e-6, atol=1e-6)
    assert not ready.requires_grad
    twin.set_timesteps(5)
    assert torch.equal(run(twin, network, sample_of() * twin.init_noise_sigma), end)
    assert twin.tables[5].weights.requires_grad and twin.tables[5].weights is not scheduler.tables[5].weights


def test_a_scheduler_that_is_learned_can_be_copied(network: Network) -> None:
    """LTX2 and others copy theirs inside their call; the copy has the numbers, not their graph."""
    scheduler = with_table("epsilon", learned())
    table = scheduler.tables[5]
    scheduler.tables = {5: replace(table, weights=2 * (table.weights / 2).requires_grad_())}
    assert scheduler.tables[5].weights.grad_fn is not None
    twin = copy.deepcopy(scheduler)
    assert twin.tables[5].weights.grad_fn is None and torch.equal(twin.tables[5].weights, table.weights)
    scheduler.set_timesteps(5)
    x = run(scheduler, network, sample_of(), scheduler.timesteps[:2])
    twin = copy.deepcopy(scheduler)
    ends = [run(s, network, x.detach(), s.timesteps[2:]) for s in (scheduler, twin)]
    assert ends[0].requires_grad and not ends[1].requires_grad
    torch.testing.assert_close(ends[1], ends[0].detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", ["table", "dpmpp", "heun"])
def test_a_copy_made_in_advance_runs_beside_the_first(solver: str, network: Network) -> None:
    """LTX2 steps video and audio with two copies in turn."""
    scheduler = with_table("epsilon", learned()) if solver == "table" else classical(solver)
    scheduler.set_timesteps(5)
    twin = copy.deepcopy(scheduler)
    x, y = sample_of(), sample_of().flip(0)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
        y = twin.step(network(y, t), t, y).prev_sample
    scheduler.set_timesteps(5)
    assert torch.equal(run(scheduler, network, sample_of()), x)
    scheduler.set_timesteps(5)
    scheduler.init_noise_sigma  # noqa: B018  (reading it is what marks the noise as scaled)
    twin.set_timesteps(5)
    assert torch.equal(run(twin, network, sample_of().flip(0)), y)


# ---------------------------------------------------------------------- configuration


def constructible() -> list[str]:
    """Compatible diffusers schedulers whose optional dependencies are installed."""
    names = []
    for name in DyWeightScheduler._compatibles:
        try:
            getattr(diffusers, name)()
        except (ImportError, ValueError, AttributeError):
            continue
        names.append(name)
    return names


@pytest.mark.parametrize("name", constructible())
def test_any_compatible_scheduler_is_taken_over(name: str, tmp_path: Path) -> None:
    """In memory a configuration does not name its class, from a file it does: both must be understood alike."""
    source = getattr(diffusers, name)()
    source.save_config(tmp_path)
    loaded = DyWeightScheduler.load_config(tmp_path)
    for config in (source.config, loaded):
        scheduler = DyWeightScheduler.from_config(config, solver="ipndm")
        assert scheduler.config["host_scheduler"] == name
        for key, value in source.config.items():
            if not key.startswith("_") and key != "prediction_type":
                assert scheduler.config[key] == value, key
        scheduler.set_timesteps(6)
        assert len(scheduler.timesteps) == 6 and bool((scheduler.timesteps.diff() < 0).all())


@pytest.mark.parametrize(
    "source",
    [
        DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True, algorithm_type="sde-dpmsolver++"),
        PNDMScheduler(**SD, skip_prk_steps=True, set_alpha_to_one=False),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
    ],
    ids=["karras", "pndm", "flow"],
)
def test_hidden_keys_survive_a_round_trip_through_files(source: Any, tmp_path: Path) -> None:
    scheduler = DyWeightScheduler.from_config(source.config, solver="ipndm")
    scheduler.save_pretrained(tmp_path)
    again = DyWeightScheduler.from_pretrained(tmp_path)
    back = type(source).from_config(again.config)
    for key, value in source.config.items():
        if not key.startswith("_"):
            assert again.config[key] == value and back.config[key] == value, key
    for s in (scheduler, again):
        s.set_timesteps(6)
    assert torch.equal(scheduler.timesteps, again.timesteps) and torch.equal(scheduler.sigmas, again.sigmas)


def test_tables_survive_files_and_another_scheduler(tmp_path: Path, network: Network) -> None:
    scheduler = with_table("epsilon", learned(n=4), learned(n=5, afs=True))
    scheduler.save_pretrained(tmp_path)
    euler = EulerDiscreteScheduler.from_config(scheduler.config)
    ends = []
    for s in (scheduler, DyWeightScheduler.from_pretrained(tmp_path), DyWeightScheduler.from_config(euler.config)):
        assert sorted(s.tables) == [4, 5] and s.tables[5].afs and not s.tables[4].afs
        assert torch.equal(s.tables[4].weights, learned(n=4).weights)
        s.set_timesteps(5)
        ends.append(run(s, network, sample_of() * s.init_noise_sigma))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert written["tables"]["4"] == table_to_json(learned(n=4))


def test_with_tables_is_a_copy_with_more_tables() -> None:
    scheduler = with_table("epsilon", learned(n=4))
    more = scheduler.with_tables([learned(n=5), learned(n=4, order=2)])
    assert sorted(scheduler.tables) == [4] and sorted(more.tables) == [4, 5]
    assert more.tables[4].weights.shape == (4, 2) and scheduler.tables[4].weights.shape == (4, 3)
    assert more.config["host_scheduler"] == scheduler.config["host_scheduler"]


def test_errors_name_the_way_out() -> None:
    scheduler = with_table("epsilon", learned(n=4), learned(n=6))
    with pytest.raises(ValueError, match=r"num_inference_steps=5.*\[4, 6\].*solver='ipndm'"):
        scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="must be at least 1; got 0"):
        scheduler.set_timesteps(0)
    with pytest.raises(ValueError, match=r"Unknown solver 'rk4'.*'ipndm'"):
        classical("rk4")
    for solver, order in (("ipndm", 5), ("dpmpp", 4), ("deis", 0)):
        with pytest.raises(ValueError, match=f"solver_order={order} is out of range for '{solver}': 1 to"):
            classical(solver, solver_order=order)
    with pytest.raises(ValueError, match="AFS is defined for VE and VP"):
        with_table("flow", learned("flow", afs=True)).set_timesteps(5)
    with pytest.raises(ValueError, match="prediction_type='noise' is not one of"):
        DyWeightScheduler(prediction_type="noise").set_timesteps(5)
    with pytest.raises(ValueError, match="'NoSuchScheduler' is not one of the schedulers"):
        DyWeightScheduler(host_scheduler="NoSuchScheduler").set_timesteps(5)
    with pytest.raises(ValueError, match=r"KarrasVeScheduler.* not known to integrate an ODE"):
        DyWeightScheduler(host_scheduler="KarrasVeScheduler").set_timesteps(5)


def test_tables_and_a_classical_solver_side_by_side(network: Network) -> None:
    both, alone = with_table("epsilon", learned(), solver="dpmpp"), classical("dpmpp")
    ends = []
    for s in (both, alone):
        s.set_timesteps(9)
        ends.append(run(s, network, sample_of() * s.init_noise_sigma))
    assert torch.equal(*ends)
    both.set_timesteps(5)
    table_only = with_table("epsilon", learned())
    table_only.set_timesteps(5)
    assert torch.equal(both.timesteps, table_only.timesteps)


# ---------------------------------------------------------------------- what pipelines expect


def test_the_surface_pipelines_inspect() -> None:
    """retrieve_timesteps asks signatures; keyword callers and unguarded calls rely on names."""
    assert list(inspect.signature(DyWeightScheduler.set_timesteps).parameters)[1:] == [
        "num_inference_steps", "device", "timesteps", "sigmas", "mu",
    ]  # fmt: skip
    step = inspect.signature(DyWeightScheduler.step).parameters
    assert list(step)[1:4] == ["model_output", "timestep", "sample"]
    assert {"generator", "return_dict"} <= step.keys() and "eta" not in step
    init = inspect.signature(DyWeightScheduler.__init__).parameters
    assert all(p.default is not p.empty and p.kind is not p.VAR_KEYWORD for n, p in init.items() if n != "self")
    assert DyWeightScheduler.__module__ == "dywspan" and dywspan.SchedulerMixin is diffusers.SchedulerMixin
    assert not issubclass(DyWeightScheduler, nn.Module)
    scheduler = DyWeightScheduler(trained_betas=np.array([0.1, 0.3]), num_train_timesteps=2)
    assert len(scheduler) == 2 and scheduler.init_noise_sigma == 1 and DyWeightScheduler.compatibles.fget(scheduler)
    assert scheduler.config.base_image_seq_len == 256 and scheduler.config.max_shift == 1.15
    x = sample_of()
    assert scheduler.scale_model_input(x, 0.0) is x


def test_keyword_calls_and_both_return_types(network: Network) -> None:
    scheduler, x = with_table("epsilon", learned()), sample_of()
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[0]
    output = network(x, t)
    as_object = scheduler.step(model_output=output, timestep=t, sample=x, generator=None, eta=0.0)
    scheduler.set_timesteps(5)
    as_tuple, x0 = scheduler.step(output, t, x, return_dict=False)
    assert torch.equal(as_object.prev_sample, as_tuple) and torch.equal(as_object.pred_original_sample, x0)
    with pytest.raises(ValueError, match=r"step has no {'eta': 0.5}"):
        scheduler.step(output, t, x, eta=0.5)


def test_a_table_ignores_the_pipelines_own_grid_but_takes_its_mu() -> None:
    """Flux-like pipelines always pass linspace(1, 1/N, N) and mu."""
    table = SolverTable(torch.ones(4, 1), torch.ones(4), {"name": "flow"})
    scheduler = with_table("flow", table)
    for custom in ({"sigmas": np.linspace(1, 0.25, 4)}, {"timesteps": [9, 7, 5, 2]}, {"num_inference_steps": 4}):
        scheduler.set_timesteps(mu=0.8, device="cpu", **custom)
        t = torch.linspace(1, 0, 5)[:4]
        expected = 1000 * math.exp(0.8) / (math.exp(0.8) + 1 / t - 1)
        torch.testing.assert_close(scheduler.timesteps, expected, rtol=1e-6, atol=0)
        assert scheduler.num_inference_steps == 4 and float(scheduler.sigmas[0]) == 1.0


@pytest.mark.parametrize("solver", ["dpm2", "heun"])
def test_two_stage_solvers_publish_two_evaluations_per_step(solver: str, network: Network) -> None:
    """img2img slices ``timesteps[t_start * order:]``; into sigma = 0 one evaluation is enough."""
    scheduler = classical(solver)
    scheduler.set_timesteps(5)
    assert scheduler.order == 2 and len(scheduler.timesteps) == 9
    # dx/dsigma of Gaussian data of spread 1 from its exact epsilon: x(0) = x(sigma_0) / sqrt(1 + sigma_0^2).
    scheduler.set_timesteps(120)
    prediction, x = scheduler.host.prediction, sample_of(dtype=torch.float64)
    start = x
    for t in scheduler.timesteps:
        sigma = prediction.sigma(t)
        x = scheduler.step(x * sigma / (1 + sigma**2) ** 0.5, t, x).prev_sample
    torch.testing.assert_close(x, start, rtol=0, atol=2e-3)
