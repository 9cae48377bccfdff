"""One line swaps the solver of any pipeline: proved on tiny networks in diffusers' own classes.

``DYWSPAN_WRITE_DOCS=1 pytest tests/test_pipelines.py`` writes docs/results/pipelines.json and docs/pipelines.md.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_pipelines as tp
import torch
import transformers
from torch import Tensor

import dywspan
from dywspan import DyWeightScheduler, SolverTable

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results" / "pipelines.json"
COMMAND = "DYWSPAN_WRITE_DOCS=1 pytest tests/test_pipelines.py"
# (test, pipeline, scheduler) -> whether it passed, filled in as the tests run: what the written results are made of.
OUTCOMES: dict[tuple[str, str, str], bool] = {}


def random_table(n: int, flow: bool) -> SolverTable:
    """As learned ones are: order 2, rows that do not sum to 1 (time shifting), s != 1 (time scaling)."""
    generator = torch.Generator().manual_seed(n)
    rows = torch.tensor([[0.93, 0.0]] + [[1.25, -0.32]] * (n - 1), dtype=torch.float64)
    rows += 0.03 * torch.rand(rows.shape, generator=generator, dtype=torch.float64) * (rows != 0)
    scale = 0.92 + 0.06 * torch.rand(n, generator=generator, dtype=torch.float64)
    vp = {"name": "polynomial", "sigma_min": 0.03, "sigma_max": 10.0}
    return SolverTable(rows, scale, {"name": "flow", "shift": 2.0} if flow else vp)


def dyweight(config: Any, steps: int, flow: bool) -> DyWeightScheduler:
    return DyWeightScheduler.from_config(config).with_tables([random_table(steps, flow)])


# A learned scheduler each: from a pipeline's scheduler.config, the number of steps and whether the model is a flow.
SCHEDULERS: list[tuple[str, Callable[[Any, int, bool], Any]]] = [("DyWeightScheduler", dyweight)]

rows = pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.skipif(not tp.available(n), reason="diffusers is older than this class"))
        for n in tp.PIPELINES
    ],
)
schedulers = pytest.mark.parametrize("scheduler", [s for s, _ in SCHEDULERS])


@contextmanager
def outcome(test: str, name: str, scheduler: str = "DyWeightScheduler") -> Iterator[None]:
    OUTCOMES[test, name, scheduler] = False
    yield
    OUTCOMES[test, name, scheduler] = True


@functools.cache
def sampled(name: str, scheduler: str, indices: tuple[int, ...]) -> tp.Trace:
    """One call: ``scheduler`` is a learned one of SCHEDULERS, or names a classical solver as ``solver-order``."""
    tiny = tp.build(name)
    config = tiny.pipe.scheduler.config
    if scheduler in dict(SCHEDULERS):
        return tp.run(tiny, dict(SCHEDULERS)[scheduler](config, tiny.steps, tiny.flow), indices)
    solver, order = scheduler.split("-")
    return tp.run(tiny, DyWeightScheduler.from_config(config, solver=solver, order=int(order)), indices)


def result(trace: tp.Trace, batch: int) -> list[Tensor]:
    """What the pipeline returned and what the solver did last (DiT: without the doubled half)."""
    return [trace.output.double(), trace.steps[-1][2][:batch].double()]


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, in units of the values' own size."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-8))


@rows
@schedulers
def test_swap(name: str, scheduler: str) -> None:
    """Finite, the same whether samples come together or alone, in the sample's dtype, asked as often as promised."""
    tiny = tp.build(name)
    solvers = (scheduler, "dpmpp-2", "ipndm-3")
    with outcome("swap", name, scheduler):
        for solver in solvers:
            both, first, second = (sampled(name, solver, indices) for indices in ((0, 1), (0,), (1,)))
            for together, *alone in zip(result(both, 2), result(first, 1), result(second, 1)):
                assert together.isfinite().all()
                assert distance(together, torch.cat(alone)) < tiny.tolerance, f"{solver} mixes the samples of a batch"
            assert distance(result(first, 1)[1], result(second, 1)[1]) > 0.1, "both samples are the same"
            for output, sample, prev_sample in both.steps:
                assert prev_sample.dtype == sample.dtype and prev_sample.shape == sample.shape
                assert output.float().std() > 0.05, "this network answers almost 0: it tests no solver"
            seen = tiny.seen(both.timesteps)
            assert len(both.timesteps) == tiny.steps
            assert 0 < len(seen) == len(both.steps)
            told = tiny.told(seen.double()).repeat_interleave(tiny.branches)
            torch.testing.assert_close(torch.cat(both.told), told, rtol=1e-5, atol=1e-6)
        learned, dpmpp, ipndm = (result(sampled(name, solver, (0, 1)), 2)[1] for solver in solvers)
        assert distance(learned, dpmpp) > 1e-2, "the learned table changed nothing"
        assert distance(dpmpp, ipndm) > 5e-4, "the solver changed nothing"


@rows
@schedulers
def test_second_call_equals_the_first(name: str, scheduler: str) -> None:
    """Nothing of a run is left in the scheduler."""
    tiny = tp.build(name)
    learned = dict(SCHEDULERS)[scheduler](tiny.pipe.scheduler.config, tiny.steps, tiny.flow)
    first, second = tp.run(tiny, learned, [0]), tp.run(tiny, learned, [0])
    assert torch.equal(first.output, second.output)
    assert torch.equal(first.output, sampled(name, scheduler, (0,)).output)


@rows
def test_equals_own_scheduler(name: str) -> None:
    """The classical form reproduces the scheduler the pipeline came with."""
    tiny = tp.build(name)
    own = tiny.pipe.scheduler
    with outcome("exact", name):
        reference = tp.run(tiny, (tiny.twin or type(own)).from_config(own.config), [0, 1])
        ours = tp.run(tiny, DyWeightScheduler.from_config(own.config, **tiny.exact), [0, 1])
        for a, b in zip(result(ours, 2), result(reference, 2)):
            assert distance(a, b) < tiny.tolerance
        assert len(ours.told) == len(reference.told)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"])
@pytest.mark.parametrize(
    ("solver", "twin"),
    [
        ({"solver": "dpmpp", "order": 2}, diffusers.DPMSolverMultistepScheduler),
        ({"solver": "deis", "order": 2}, diffusers.DEISMultistepScheduler),
        ({"solver": "heun"}, diffusers.HeunDiscreteScheduler),
        ({"solver": "dpm2"}, diffusers.KDPM2DiscreteScheduler),
    ],
)
def test_equals_diffusers_solver(name: str, solver: dict[str, Any], twin: Any) -> None:
    """From noise and from the middle of the grid, two-stage solvers included."""
    tiny = tp.build(name)
    theirs = twin.from_config(tiny.pipe.scheduler.config)
    ours = DyWeightScheduler.from_config(theirs.config, **solver)
    a, b = tp.run(tiny, ours, [0, 1]), tp.run(tiny, theirs, [0, 1])
    assert len(a.told) == len(b.told)
    # The time of DPM-Solver-2's midpoint is interpolated in log sigma by diffusers, in log alpha here.
    assert distance(a.output, b.output) < (1e-3 if solver == {"solver": "dpm2"} else 1e-4)


@rows
def test_learned_by_hand(name: str) -> None:
    """Every step and every time of a learned table, from the equations written out in plain numbers.

    DyWeight eqs. (5), (9); missing history (img2img) gives its weight to the oldest derivative.
    """
    with outcome("by hand", name):
        learned_by_hand(tp.build(name), sampled(name, "DyWeightScheduler", (0, 1)))


def learned_by_hand(tiny: tp.Tiny, trace: tp.Trace) -> None:
    n, table = tiny.steps, random_table(tiny.steps, tiny.flow)
    if tiny.flow:  # sigma = 2t / (1 + t)
        grid = [2 * t / (1 + t) for t in (1 - i / n for i in range(n + 1))]
    else:
        grid = [(10 ** (1 / 7) * (1 - i / n) + 0.03 ** (1 / 7) * i / n) ** 7 for i in range(n + 1)]
    levels = grid[:1]
    for target, weights in zip(grid[1:], table.weights.tolist()):
        levels.append(levels[-1] + sum(weights) * (target - levels[-1]))
    taus = [float(s) * level for s, level in zip(table.time_scale, levels)]
    torch.testing.assert_close(trace.timesteps.double(), model_times(tiny, taus), rtol=1e-5, atol=1e-3)

    # The frame the network sees: x / sqrt(1 + tau^2) for the first two kinds of network in derivative().
    frame = [1.0] * (n + 1) if tiny.flow else [(1 + tau**2) ** -0.5 for tau in taus] + [1.0]
    begin = trace.timesteps.tolist().index(float(tiny.seen(trace.timesteps)[0]))
    for time, clean, noise, noisy in trace.noised:
        i = trace.timesteps.tolist().index(time)
        alpha = 1 - levels[i] if tiny.flow else 1
        assert distance(noisy.double(), frame[i] * (alpha * clean.double() + levels[i] * noise.double())) < 1e-6
    past = None
    for i, (output, sample, prev_sample) in enumerate(trace.steps, start=begin):
        x, output = sample.double() / frame[i], output.double()
        if tiny.raw_noise and i == 0:
            x = sample.double() * grid[0]
        d = derivative(tiny, x, output, levels[i], taus[i])
        newest, older = table.weights[i].tolist()
        x = x + (grid[i + 1] - levels[i]) * (newest * d + older * (d if past is None else past))
        assert distance(prev_sample.double(), x * frame[i + 1]) < tiny.tolerance
        past = d


def model_times(tiny: tp.Tiny, taus: list[float]) -> Tensor:
    """1000 tau; log(tau) / 4; or linear in log alpha between integers, with log alpha = 0 at t = -1."""
    scheduler, tau = tiny.pipe.scheduler, torch.tensor(taus, dtype=torch.float64)
    if tiny.flow:
        return 1000 * (1 - tau) if scheduler.config.get("invert_sigmas") else 1000 * tau
    if scheduler.config.get("timestep_type") == "continuous":
        return tau.log() / 4
    nodes = -scheduler.alphas_cumprod.double().clamp(min=2**-24).log() / 2
    values = np.interp(torch.log1p(tau**2) / 2, [0.0, *nodes.tolist()], np.arange(-1, len(nodes)))
    return torch.from_numpy(values)


def derivative(tiny: tp.Tiny, x: Tensor, output: Tensor, sigma: float, tau: float) -> Tensor:
    """d = (x - D) / sigma, D = x - tau * eps or (x - tau * sqrt(1 + tau^2) * v) / (1 + tau^2); flow: the velocity."""
    config = tiny.pipe.scheduler.config
    if tiny.flow:
        return -output if config.get("invert_sigmas") else output
    if config.prediction_type == "epsilon":
        return tau * output / sigma
    return (x - (x - tau * (1 + tau**2) ** 0.5 * output) / (1 + tau**2)) / sigma


def test_base_and_refiner_are_one_run() -> None:
    """SDXL: denoising_end of one pipeline and denoising_start of the next share a schedule, learned or not."""
    base, refiner = tp.build("StableDiffusionXLPipeline"), "StableDiffusionXLImg2ImgPipeline (denoising_start)"
    second = tp.build(refiner)
    networks = second.pipe.unet, base.pipe.unet
    table = SolverTable(
        torch.tensor([[0.93], [0.97], [0.95], [0.96]]).double(), torch.full((4,), 0.96).double(),
        {"name": "polynomial", "sigma_min": 0.03, "sigma_max": 10.0},
    )  # fmt: skip
    config = base.pipe.scheduler.config
    for make in (
        lambda: DyWeightScheduler.from_config(config, solver="euler"),
        lambda: DyWeightScheduler.from_config(config).with_tables([table]),
    ):
        whole = tp.run(base, make(), [0, 1], num_inference_steps=4)
        half = tp.run(base, make(), [0, 1], num_inference_steps=4, denoising_end=0.5)
        second.pipe.unet = networks[1]
        try:
            rest = tp.run(second, make(), [0, 1], image=half.output)
        finally:
            second.pipe.unet = networks[0]
        assert len(half.steps) + len(rest.steps) == 4 and len(half.steps) and len(rest.steps)
        assert distance(rest.output, whole.output) < 1e-5


@pytest.mark.parametrize(("name", "latents"), [("StableDiffusionPipeline", (4, 16, 16)), ("FluxPipeline", (64, 16))])
def test_bfloat16(name: str, latents: tuple[int, ...]) -> None:
    """A bfloat16 pipeline stays in bfloat16, is told the same times up to rounding, and ends where float32 ends."""
    full = tp.build(name)
    half = copy.copy(full.pipe)
    half.register_modules(**{full.denoiser: copy.deepcopy(getattr(full.pipe, full.denoiser)).bfloat16()})
    tiny = dataclasses.replace(full, pipe=half)
    inputs = {k: v for k, v in full.inputs([0, 1]).items() if isinstance(v, Tensor)}
    inputs["latents"] = tp.normal([0, 1], *latents, salt=5)
    rounded = {k: v.bfloat16() for k, v in inputs.items()}
    config = full.pipe.scheduler.config
    for make in (
        lambda: dyweight(config, full.steps, full.flow),
        lambda: DyWeightScheduler.from_config(config, solver="dpmpp"),
    ):
        reference, trace = tp.run(full, make(), [0, 1], **inputs), tp.run(tiny, make(), [0, 1], **rounded)
        for output, sample, prev_sample in trace.steps:
            assert output.dtype == sample.dtype == prev_sample.dtype == torch.bfloat16
        told = full.told(trace.timesteps.double())
        torch.testing.assert_close(torch.cat(trace.told), told, rtol=2**-8, atol=1e-6)
        assert distance(trace.output.double(), reference.output.double()) < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("output_dtype", [torch.bfloat16, torch.float32])
def test_step_keeps_the_dtype_of_the_sample(dtype: torch.dtype, output_dtype: torch.dtype) -> None:
    """CogVideoX pairs a bfloat16 sample with a float32 output, Wan the reverse; rounded once."""
    generator = torch.Generator().manual_seed(0)
    sample, output = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    sample, output = sample.to(dtype), output.to(output_dtype)
    results = []
    for cast in (dtype, torch.float64):
        scheduler = dyweight(diffusers.FlowMatchEulerDiscreteScheduler().config, 3, flow=True)
        scheduler.set_timesteps(3)
        first = scheduler.step(output.to(output_dtype), scheduler.timesteps[0], sample.to(cast)).prev_sample
        assert first.dtype == cast
        assert scheduler.add_noise(sample.to(cast), sample.to(cast), scheduler.timesteps[:1]).dtype == cast
        results.append(first)
    rounding = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 1e-6, torch.float64: 0.0}[dtype]
    torch.testing.assert_close(results[0].double(), results[1], rtol=rounding, atol=1e-6)


def test_times_apart_from_levels_are_refused() -> None:
    """CogView4 and GLM-Image: silently telling the network 1000 * sigma instead would be wrong."""
    config = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config
    for scheduler in (DyWeightScheduler.from_config(config, solver="euler"), dyweight(config, 2, flow=True)):
        with pytest.raises(ValueError, match="CogView4"):
            scheduler.set_timesteps(timesteps=[1000, 500], sigmas=[1.0, 0.5], mu=0.7)
        scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=0.7)


def test_results_are_written_down() -> None:
    """The committed list is the registry's; a run of the whole file with DYWSPAN_WRITE_DOCS=1 writes it anew."""
    if os.environ.get("DYWSPAN_WRITE_DOCS") == "1":
        write_docs()
    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    expected = [(name, scheduler) for name in tp.PIPELINES for scheduler, _ in SCHEDULERS]
    assert [(r["pipeline"], r["scheduler"]) for r in data["rows"]] == expected, f"Run: {COMMAND}"
    assert all(r["ok"] for r in data["rows"])
    table = (DOCS / "pipelines.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in table for name in tp.PIPELINES), f"Run: {COMMAND}"


def write_docs() -> None:
    """Raises KeyError unless every test of every row ran, in this process and with a diffusers that has all classes."""
    ok = {
        (name, scheduler): OUTCOMES["swap", name, scheduler]
        and all(OUTCOMES[test, name, "DyWeightScheduler"] for test in ("exact", "by hand"))
        for name in tp.PIPELINES
        for scheduler, _ in SCHEDULERS
    }
    modules = {"dywspan": dywspan, "diffusers": diffusers, "transformers": transformers, "torch": torch}
    data = {
        "command": COMMAND,
        "versions": {"python": platform.python_version(), **{k: m.__version__ for k, m in modules.items()}},
        "device": "cpu",
        "rows": [{"pipeline": name, "scheduler": scheduler, "ok": passed} for (name, scheduler), passed in ok.items()],
    }
    names = [s for s, _ in SCHEDULERS]
    lines = [
        "# Pipelines",
        "",
        "Each row is a diffusers pipeline class with tiny random networks, run on the CPU with diffusers",
        f"{diffusers.__version__}. `{COMMAND}` writes this page. A tick means that after",
        "",
        "```python",
        "pipe.scheduler = DyWeightScheduler.from_config(pipe.scheduler.config, ...)",
        "```",
        "",
        "the pipeline runs unchanged with a learned table (order 2, time shifting and time scaling) and with the",
        "classical solvers `dpmpp` and `ipndm`, and that",
        "",
        "- a batch equals its samples one by one, and dtypes stay;",
        "- the network is told exactly `scheduler.timesteps`, once per step and guidance branch;",
        "- every step of the learned table equals the paper's equations evaluated by hand;",
        "- the classical solver in the third column gives the same result as the scheduler the pipeline came with.",
        "",
        f"| pipeline | what this row adds | equals own scheduler | {' | '.join(names)} |",
        f"|---|---|---|{'---|' * len(names)}",
    ]
    for name in tp.PIPELINES:
        tiny = tp.build(name)
        exact = ", ".join(f"{k}={v!r}" for k, v in tiny.exact.items())
        ticks = " | ".join("✓" if ok[name, s] else "✗" for s in names)
        lines.append(f"| {name} | {tiny.exercises} | `{exact}` | {ticks} |")
    lines += [
        "",
        "Good to know:",
        "",
        "- SDXL base and refiner pass latents on in the middle of a run (`denoising_end`, `denoising_start`): give",
        "  both pipelines the same solver. Its latents are scaled as the network wants them, like DDIM's and unlike",
        "  EulerDiscreteScheduler's.",
        "- Times are told as they are. Where a pipeline's own scheduler cuts them to integers (SANA's), results differ",
        "  by that rounding; where a pipeline rounds them to bfloat16 (Flux and others), it still does.",
        "- CogView4Pipeline and GlmImagePipeline pass times and levels apart from each other (unshifted times beside",
        "  shifted levels), so the time is no function of the level: the schedulers refuse them.",
    ]
    replace(RESULTS, json.dumps(data, indent=2) + "\n")
    replace(DOCS / "pipelines.md", "\n".join(lines) + "\n")


def replace(path: Path, text: str) -> None:
    """Write beside the file and rename, so that nobody reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
