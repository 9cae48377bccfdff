"""One line swaps the solver of any pipeline: proved on tiny networks in diffusers' own classes.

``DYWSPAN_WRITE_DOCS=1 pytest tests/test_pipelines.py`` writes docs/results/pipelines.json and docs/pipelines.md.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import tiny as tp
import torch
from tiny import by_hand, report
from tiny.by_hand import distance
from torch import Tensor

import dywspan
from dywspan import DyWeightScheduler, SolverTable, SpanLiftScheduler
from dywspan.core.time_lift import TimeLift
from dywspan.pipelines.conditioning import Found, looking_for_modulation

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


def spanlift(tiny: tp.Tiny, **changes: Any) -> SpanLiftScheduler:
    """The same table, lifted by a random operator that looks further back (K = 3) than the table does (K = 2)."""
    base = dyweight(tiny.pipe.scheduler.config, tiny.steps, tiny.flow)
    scalars = torch.linspace(0.8, 1.2, tiny.steps, dtype=torch.float64)
    lift = {"alpha": scalars.flip(0).tolist(), "beta": (0.5 * scalars).tolist(), **changes}
    operator = {"channels": tiny.channels, "order": 3, "width": 8}
    scheduler = SpanLiftScheduler.from_config(
        base.config, layout=tiny.layout, operator=operator, lifts={str(tiny.steps): lift}
    ).initialize()
    generator = torch.Generator().manual_seed(4)
    for parameter in scheduler.operators["shared"].requires_grad_(False).parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5)
    return scheduler


# A learned scheduler each.
SCHEDULERS: list[tuple[str, Callable[[tp.Tiny], Any]]] = [
    ("DyWeightScheduler", lambda tiny: dyweight(tiny.pipe.scheduler.config, tiny.steps, tiny.flow)),
    ("SpanLiftScheduler", spanlift),
]

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
        return tp.run(tiny, dict(SCHEDULERS)[scheduler](tiny), indices)
    solver, order = scheduler.split("-")
    return tp.run(tiny, DyWeightScheduler.from_config(config, solver=solver, solver_order=int(order)), indices)


def result(trace: tp.Trace, batch: int) -> list[Tensor]:
    """What the pipeline returned and what the solver did last (DiT: without the doubled half)."""
    return [trace.output.double(), trace.steps[-1][2][:batch].double()]


def skip_unlifted(name: str, scheduler: str = "SpanLiftScheduler") -> None:
    if scheduler == "SpanLiftScheduler" and tp.build(name).unlifted:
        pytest.skip("SpanLift refuses it, as test_swap sees")


@functools.cache
def modulation(name: str) -> Found:
    """What a row's networks are modulated by; a step cache is looked for without it."""
    tiny = tp.build(name)
    if getattr(getattr(tiny.pipe, "transformer", None), "is_cache_enabled", False):
        return modulation(name.partition(" (")[0])
    with looking_for_modulation(tiny.pipe) as found:
        tp.run(tiny, DyWeightScheduler.from_config(tiny.pipe.scheduler), [0])
    return found


def timelift(name: str, size: float) -> DyWeightScheduler:
    """The table, and offsets of some size."""
    tiny, draw = tp.build(name), torch.Generator().manual_seed(5)
    base = dyweight(tiny.pipe.scheduler.config, tiny.steps, tiny.flow)
    offsets = {k: size * torch.randn(tiny.steps, *shape, generator=draw) for k, shape in modulation(name).items()}
    return base.with_time_lifts({tiny.steps: TimeLift(offsets)})


@rows
def test_time_lift(name: str) -> None:
    """Offsets change what is sampled; zeros do not, by a bit; and the networks are left as they were."""
    tiny = tp.build(name)
    if tiny.unmodulated:
        with outcome("time lift", name), pytest.raises(ValueError, match="TimeLift finds nothing"):
            modulation(name)
        return
    state = {f"{i}.{k}": v.clone() for i, network in enumerate(tiny.networks) for k, v in network.state_dict().items()}
    with outcome("time lift", name):
        outputs = [sampled(name, "DyWeightScheduler", tiny.samples)]
        for scheduler in (timelift(name, 0.0), timelift(name, 0.2)):
            with dywspan.apply(tiny.pipe, scheduler):
                outputs.append(tp.run(tiny, scheduler, tiny.samples))
        base, zero, moved = (result(trace, tiny.batch)[1] for trace in outputs)
        assert torch.equal(zero, base)
        assert distance(moved, base) > 1e-3, "the offsets changed nothing"
        for i, network in enumerate(tiny.networks):
            own = network.state_dict()
            assert all(torch.equal(v, state[f"{i}.{k}"]) for k, v in own.items()), "the network was left changed"
            assert len(own) == sum(k.startswith(f"{i}.") for k in state)


@rows
@schedulers
def test_swap(name: str, scheduler: str) -> None:
    """Finite, the same whether samples come together or alone, in the sample's dtype, asked as often as promised."""
    tiny = tp.build(name)
    if scheduler == "SpanLiftScheduler" and tiny.unlifted:  # what has no layout is not lifted wrongly
        said = rf"Layout '{tiny.layout}' does not fit this sample of shape \(.*DyWeightScheduler\.from_config"
        with outcome("swap", name, scheduler), pytest.raises(ValueError, match=said):
            tp.run(tiny, spanlift(tiny), [0])
        return
    solvers = (scheduler, "dpmpp-2", "ipndm-3")
    with outcome("swap", name, scheduler):
        for solver in solvers:
            both, first, second = (sampled(name, solver, indices) for indices in (tiny.samples, (0,), (1,)))
            singles = [result(trace, 1) for trace in (first, second)[: tiny.batch]]
            for together, *alone in zip(result(both, tiny.batch), *singles):
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
        learned, dpmpp, ipndm = (result(sampled(name, s, tiny.samples), tiny.batch)[1] for s in solvers)
        assert distance(learned, dpmpp) > 1e-2, "the learned table changed nothing"
        assert distance(dpmpp, ipndm) > 5e-4, "the solver changed nothing"
        if scheduler != "DyWeightScheduler":
            base = result(sampled(name, "DyWeightScheduler", tiny.samples), tiny.batch)[1]
            assert 1e-2 < distance(learned, base) < 20, "the operator changed nothing, or all"


@rows
@schedulers
def test_second_call_equals_the_first(name: str, scheduler: str) -> None:
    """Nothing of a run is left in the scheduler."""
    skip_unlifted(name, scheduler)
    tiny = tp.build(name)
    learned = dict(SCHEDULERS)[scheduler](tiny)
    first, second = tp.run(tiny, learned, [0]), tp.run(tiny, learned, [0])
    assert torch.equal(first.output, second.output)
    assert torch.equal(first.output, sampled(name, scheduler, (0,)).output)


@rows
def test_equals_own_scheduler(name: str) -> None:
    """The classical form reproduces the scheduler the pipeline came with."""
    tiny = tp.build(name)
    own = tiny.pipe.scheduler
    if "scheduler.sigma_min = " in inspect.getsource(type(tiny.pipe).__call__):
        pytest.skip("older Z-Image pipelines change their own scheduler before they use it")
    with outcome("exact", name):
        reference = tp.run(tiny, (tiny.twin or type(own)).from_config(own.config), tiny.samples)
        ours = tp.run(tiny, DyWeightScheduler.from_config(own.config, **tiny.exact), tiny.samples)
        for a, b in zip(result(ours, tiny.batch), result(reference, tiny.batch)):
            assert distance(a, b) < tiny.tolerance
        assert len(ours.told) == len(reference.told)


@pytest.mark.parametrize("strength", [1.0, 0.6])  # its tokens never change, or from the middle on
def test_frames_that_are_given_stay(strength: float) -> None:
    """LTX tells each token's time, and keeps what it does not ask to be moved."""
    tiny = tp.build("LTXConditionPipeline")
    own = tiny.pipe.scheduler
    given = {"image": tp.images([0], 64), "strength": strength}
    reference = tp.run(tiny, type(own).from_config(own.config), [0], **given)
    ours = tp.run(tiny, DyWeightScheduler.from_config(own.config, solver="euler"), [0], **given)
    assert distance(ours.output, reference.output) < tiny.tolerance
    assert distance(ours.output, tp.run(tiny, type(own).from_config(own.config), [0]).output) > 1e-2


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"])
@pytest.mark.parametrize(
    ("solver", "twin"),
    [
        ({"solver": "dpmpp", "solver_order": 2}, diffusers.DPMSolverMultistepScheduler),
        ({"solver": "deis", "solver_order": 2}, diffusers.DEISMultistepScheduler),
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
@schedulers
def test_learned_by_hand(name: str, scheduler: str) -> None:
    """Every step and every time of a learned table, from the equations written out in plain numbers.

    DyWeight eqs. (5), (9); missing history (img2img) gives its weight to the oldest derivative. SpanLift eq. (15).
    """
    skip_unlifted(name, scheduler)
    tiny = tp.build(name)
    with outcome("by hand", name, scheduler):
        lifted = spanlift(tiny) if scheduler == "SpanLiftScheduler" else None
        if lifted is not None:
            tp.run(tiny, lifted, [0])  # tells it the latent's size where the pipeline is bound
        by_hand.check(tiny, sampled(name, scheduler, tiny.samples), random_table(tiny.steps, tiny.flow), lifted)


@rows
def test_no_lift_is_the_base(name: str) -> None:
    """With beta = 0 and alpha = 1 whatever the operator says, a pipeline returns what its base does, bit for bit."""
    skip_unlifted(name)
    tiny = tp.build(name)
    idle = spanlift(tiny, alpha=[1.0] * tiny.steps, beta=[0.0] * tiny.steps)
    assert torch.equal(tp.run(tiny, idle, [0]).output, sampled(name, "DyWeightScheduler", (0,)).output)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        # The third of each is rounded down by the pipeline; {} is its default size.
        ("FluxPipeline", [{"height": 24, "width": 40}, {"height": 40, "width": 24}, {"height": 27, "width": 38}, {}]),
        ("ChromaPipeline", [{"height": 24, "width": 40}, {"height": 40, "width": 24}, {"height": 27, "width": 38}, {}]),
        (
            "QwenImagePipeline",
            [{"height": 64, "width": 96}, {"height": 96, "width": 32}, {"height": 70, "width": 95}, {}],
        ),
        ("LTXPipeline", [{"height": 64, "width": 96}, {"height": 96, "width": 32}, {}]),
    ],
)
def test_bind_tells_the_true_grid(name: str, sizes: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Height and width of the latent that the pipeline packs, at every call anew."""
    tiny = tp.build(name)
    pipe = copy.copy(tiny.pipe)
    monkeypatch.setattr(pipe, "default_sample_size", 12, raising=False)
    pack, packed = pipe._pack_latents, []

    def watch(latents: Tensor, *args: Any) -> Tensor:
        packed.append(tuple(latents.shape[-2:]))
        return pack(latents, *args)

    monkeypatch.setattr(type(pipe), "_pack_latents", staticmethod(watch))
    bound = dataclasses.replace(tiny, pipe=dywspan.bind(pipe))
    scheduler = spanlift(tiny)
    for size in sizes:
        inputs = {k: v for k, v in tiny.inputs([0]).items() if k not in ("height", "width")}
        tp.run(dataclasses.replace(bound, inputs=lambda _, given=inputs | size: given), scheduler, [0])
        assert scheduler.request.latent_size == packed[-1] and scheduler.latent_size is None
    assert len(set(packed)) == len(packed) == len(sizes)


def test_bind_knows_a_pipelines_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """LTX's ``prepare_latents`` need not be told 512 x 704."""
    tiny = tp.build("LTXPipeline")
    scheduler = spanlift(tiny)
    monkeypatch.setattr(tiny.pipe, "scheduler", scheduler)
    tokens = tiny.pipe.prepare_latents(num_channels_latents=8, num_frames=1, dtype=torch.float32)
    assert scheduler.latent_size == (16, 22) and tokens.shape[1] == 16 * 22


def test_tokens_of_an_unknown_size_are_refused() -> None:
    tiny = tp.build("FluxPipeline")
    with pytest.raises(ValueError, match=r"60 tokens are not a square: .*dywspan\.bind\(pipe\)"):
        tp.run(tiny, spanlift(tiny), [0], height=24, width=40)
    with pytest.raises(TypeError, match=r"DDPMPipeline has no prepare_latents .*set_latent_size"):
        dywspan.bind(tp.build("DDPMPipeline").pipe)


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


@pytest.mark.parametrize("name", tp.REFUSED)
@schedulers
def test_refused(name: str, scheduler: str) -> None:
    """What integrates no known ODE runs with its own scheduler, and with ours says why not, learned or classical."""
    builder, reason = tp.REFUSED[name]
    if not tp.available(name):
        pytest.skip("diffusers is older than this class")
    tiny = tp.made(builder)
    with outcome("refused", name, scheduler):
        assert tp.run(tiny, tiny.pipe.scheduler, [0]).output.isfinite().all()
        for make in (
            dict(SCHEDULERS)[scheduler],
            lambda tiny: DyWeightScheduler.from_config(tiny.pipe.scheduler.config),
        ):
            with pytest.raises((ValueError, TypeError), match=reason):
                tp.run(tiny, make(tiny), [0])


@pytest.mark.parametrize(
    "kind",
    ["MiniMaxH3", "CosineDPMSolverMultistep", "Helios", "HeliosDMD", "RePaint", "UnCLIP", "ScoreSdeVe", "DDIMInverse"],
)
def test_schedulers_refused_by_name(kind: str) -> None:
    """MiniMax-H3, Stable Audio, Helios and others: whatever settings stand beside the class."""
    name = f"{kind}Scheduler"
    with pytest.raises(ValueError, match=name):
        DyWeightScheduler.from_config({"_class_name": name}).set_timesteps(3)


def test_compiled_network() -> None:
    """The same outputs behind torch.compile, and nothing to compile anew for another scheduler."""
    tiny = tp.PIPELINES["WanPipeline"]()
    tiny.pipe.set_progress_bar_config(disable=True)
    blocks = tiny.pipe.transformer.eval().requires_grad_(False)
    makers = [dict(SCHEDULERS)["DyWeightScheduler"], spanlift]
    expected = [tp.run(tiny, make(tiny), [0]).output for make in makers]
    blocks.compile_repeated_blocks(backend="eager")
    assert torch.equal(tp.run(tiny, makers[0](tiny), [0]).output, expected[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(tp.run(tiny, makers[1](tiny), [0]).output, expected[1])


def test_times_apart_from_levels_are_refused() -> None:
    """CogView4 and GLM-Image: silently telling the network 1000 * sigma instead would be wrong."""
    config = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config
    for scheduler in (DyWeightScheduler.from_config(config, solver="euler"), dyweight(config, 2, flow=True)):
        with pytest.raises(ValueError, match="CogView4"):
            scheduler.set_timesteps(timesteps=[1000, 500], sigmas=[1.0, 0.5], mu=0.7)
        scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=0.7)


def test_results_are_written_down() -> None:
    """The committed list is the registry's; a run of the whole file with DYWSPAN_WRITE_DOCS=1 writes it anew."""
    names = [*(name for name, _ in SCHEDULERS), "TimeLift"]
    if os.environ.get("DYWSPAN_WRITE_DOCS") == "1":
        report.write(OUTCOMES, names)
    report.check(names)
