"""A solver in a minute: every classical solver as a table, no evaluation twice, never worse than what one had."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from test_any_pipeline import KINDS, asked
from test_distill import EMOJI
from test_trainable import Subject, fresh
from tiny import build

import dywspan
from dywspan import DyWeightScheduler
from dywspan.cli import main
from dywspan.core.grid import make_grid
from dywspan.core.table import SolverTable
from dywspan.pipelines import arena
from dywspan.pipelines.classical import SOLVERS, asked_for, default_grid, grids, of_diffusers, solvers_on
from dywspan.pipelines.linear import as_table
from dywspan.pipelines.replay import Memo
from dywspan.pipelines.rollout import load_pipeline, sample
from dywspan.tuning import course
from dywspan.tuning.config import TuneConfig

HOSTS = {"StableDiffusionPipeline": 6, "FluxPipeline": 5, "StableDiffusion3Pipeline": 5, "SanaPipeline": 4}
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SMALL: dict[str, Any] = {"pairs": 8, "held_out": 4, "evaluations": 300}


def settings_of(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """A tiny pipeline of its own, twelve samples' inputs, and the arguments of its call."""
    subject = fresh(name)
    return subject.pipe, subject.inputs(range(12)), call_of(subject)


def call_of(subject: Subject) -> dict[str, Any]:
    """Without what a tuning chooses itself."""
    return {k: v for k, v in subject.call.items() if k != "output_type"}


# ------------------------------------------------------------------------------------------------ classical solvers


@pytest.mark.parametrize("name", HOSTS)
def test_every_grid_begins_where_the_network_s_noise_does_and_none_is_there_twice(name: str) -> None:
    pipe, inputs, call = settings_of(name)
    scheduler, request = asked_for(pipe, 5, inputs, call)
    found = grids(pipe, scheduler, request)
    assert len(found) >= HOSTS[name], found
    shift = request.host.shift(request.mu)
    levels = {key: make_grid(grid, 5, scheduler.host.prediction, shift) for key, grid in found.items()}
    start = make_grid(default_grid(scheduler), 5, scheduler.host.prediction, shift)[0]
    for key, own in levels.items():
        assert float(own[0]) == pytest.approx(float(start), rel=0.05), key
        assert not any(torch.allclose(own, other) for name, other in levels.items() if name != key)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_a_classical_solver_s_table_samples_what_the_solver_does(name: str) -> None:
    pipe, inputs, call = settings_of(name)
    scheduler, request = asked_for(pipe, 4, inputs, call)
    grid = default_grid(scheduler)
    found = solvers_on(grid, "uniform", request)

    def samples(own: DyWeightScheduler) -> torch.Tensor:
        return sample(pipe, own, 4, inputs[:2], [0, 1], call)[0]

    by_table = {own.solver: samples(scheduler.with_tables([own.table])) for own in found}
    for solver in by_table:
        base, order, lower = SOLVERS[solver]
        options: dict[str, Any] = {"solver": base, "solver_order": order, "lower_order_final": lower}
        # FLUX' own levels are what the grid makes of its shift.
        options |= {"grid": grid} if name == "StableDiffusionPipeline" else {}
        expected = samples(DyWeightScheduler.from_config(scheduler.config, **options))
        errors = {other: float((own - expected).norm() / expected.norm()) for other, own in by_table.items()}
        assert min(errors, key=lambda key: errors[key]) == solver and errors[solver] < 0.01, errors


def test_solvers_that_are_the_same_at_few_steps_are_there_once() -> None:
    pipe, inputs, call = settings_of("StableDiffusionPipeline")
    counts = []
    for n in (2, 3, 5):
        scheduler, request = asked_for(pipe, n, inputs, call)
        counts.append(len(solvers_on(default_grid(scheduler), "uniform", request)))
    assert counts[0] < counts[1] < counts[2] <= len(SOLVERS)


# ------------------------------------------------------------------------------------------------ memory of answers


def test_what_was_asked_before_is_not_computed_again() -> None:
    pipe, inputs, call = settings_of("FluxPipeline")
    schedulers = [DyWeightScheduler.from_config(pipe.scheduler, solver="ipndm", solver_order=k) for k in (2, 3)]
    plain = [sample(pipe, own, 4, inputs[:2], [0, 1], call)[0] for own in schedulers]
    told: list[int] = []
    memo = Memo(pipe, told.append)
    with asked(pipe) as count, memo.installed():
        again = [sample(pipe, own, 4, inputs[:2], [0, 1], call)[0] for own in [*schedulers, *schedulers]]
    assert memo.computed == int(count) == sum(told) == 2 * (4 + 1), "the orders differ from the third update on"
    assert memo.remembered == 2 * 4 * 4 - memo.computed
    for first, second in zip(plain * 2, again):
        assert torch.equal(first, second)


def test_an_answer_that_was_changed_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, *_ = settings_of("FluxPipeline")
    memo, calls = Memo(pipe), []

    def forward(x: torch.Tensor, extra: Any = None) -> torch.Tensor:
        calls.append(x)
        return x + 1

    call, x = memo._wrap(forward), torch.zeros(2, 3)
    call(x).mul_(2)
    assert torch.equal(call(x), x + 1) and len(calls) == 2
    call(x)
    assert len(calls) == 2
    call(x.double())
    call(x.reshape(3, 2))
    call(x, extra=1.5)
    assert len(calls) == 5, "types, shapes and numbers count"
    call(x, extra=object()), call(x, extra=object())
    assert len(calls) == 7, "an object may change between two calls"


def test_no_more_answers_are_kept_than_there_is_room_for() -> None:
    pipe, *_ = settings_of("FluxPipeline")
    memo, calls = Memo(pipe, most=3 * 24), []
    call = memo._wrap(lambda x: calls.append(x) or x + 1)
    for i in range(5):
        call(torch.full((2, 3), float(i)))
    assert len(memo.known) == 3 and memo.size == 3 * 24
    call(torch.full((2, 3), 4.0))
    assert len(calls) == 5
    call(torch.full((2, 3), 0.0))
    assert len(calls) == 6


# ------------------------------------------------------------------------------------------------ tuning


RARER = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("compiled", "sequential offload")]


@pytest.mark.parametrize("kind", ["torchao int8", "lora", "modular", *RARER])
def test_a_pipeline_is_tuned_as_it_is_used(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    from test_any_pipeline import make

    subject = make(kind)
    inputs = subject.inputs(range(12))
    pipe, before = subject.pipe, subject.pipe.scheduler
    with asked(pipe) as count:
        scheduler = dywspan.tune(pipe, 3, inputs, call=call_of(subject), **SMALL)
    assert pipe.scheduler is scheduler and before is not scheduler
    made = scheduler.tables[3].provenance
    spent = sum(v for k, v in made["evaluations"].items() if k != "seconds")
    assert spent <= int(count) <= 1.1 * spent, "all that the network computed, but for the rounding"
    assert made["held_out_error"]["after"] <= made["held_out_error"]["before"]
    assert "| steps |" in capsys.readouterr().out
    end, _ = sample(pipe, pipe.scheduler, 3, inputs[:2], [0, 1], subject.call)
    assert bool(end.isfinite().all())


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """emoji-sd, tuned for 3 steps by the command line, and where it was saved."""
    folder = tmp_path_factory.mktemp("tuned")
    command = ["tune", str(EMOJI), "--steps", "3", "--guidance-scale", "1", "--output", str(folder / "solver")]
    prompts = EMOJI.parent / "prompts" / "emoji-train.txt"
    assert main([*command, "--prompts", str(prompts), "--device", "cpu", "--dtype", "float32"]) == 0
    yield dywspan.load(folder / "solver"), folder / "solver"


@pytest.mark.slow
def test_it_beats_the_best_classical_solver_within_its_budget(tuned: tuple[Any, Path]) -> None:
    scheduler, _ = tuned
    table = scheduler.tables[3]
    made = table.provenance
    assert made["call"] == {"guidance_scale": 1.0} and made["start"]
    spent = sum(v for k, v in made["evaluations"].items() if k != "seconds")
    assert 700 < spent < 1100
    pipe = load_pipeline(str(EMOJI), device="cpu")
    lines = (EMOJI.parent / "prompts" / "emoji-held-out.txt").read_text().splitlines()[:32]
    config = TuneConfig(steps=[3], prompts=lines, call={"guidance_scale": 1.0}, pairs=24, held_out=8)
    with course.tuning(pipe, config) as own:
        places = range(32)
        ends = own.arena.endpoints(own._teacher(40).scheduler, 40, places)
        own.arena.targets.update(zip(places, ends))
        classical = own._classical(3)[0][0]
        rival, ours = (own._errors(3, t, places) for t in (classical.table, table))
    assert arena.typical(ours) < 0.97 * arena.typical(rival)
    assert float((ours < rival).double().mean()) > 0.6


@pytest.mark.slow
def test_what_is_saved_has_a_card_and_a_picture(tuned: tuple[Any, Path]) -> None:
    from PIL import Image

    _, folder = tuned
    assert {path.name for path in folder.iterdir()} == {
        "scheduler_config.json", "README.md", "samples-3.png", "solver.png",
    }  # fmt: skip
    assert "num_inference_steps=3" in (folder / "README.md").read_text(encoding="utf-8")
    assert Image.open(folder / "samples-3.png").height > 3 * 90, "teacher, classical, tuned"


def test_what_is_not_better_is_not_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, inputs, call = settings_of("FluxPipeline")

    def spoiled(self: Any, n: int, student: Any, *others: Any) -> dict[str, Any]:
        student.move(student.vector() * 1.05)
        return {}

    monkeypatch.setattr(course.Course, "_learn", spoiled)
    scheduler = dywspan.tune(pipe, [2, 3], inputs, call=call, **SMALL)
    out = capsys.readouterr().out
    for n in (2, 3):
        made = scheduler.tables[n].provenance
        assert made["solver"] == made["start"] and f"{n} steps: learning did not beat {made['start']}" in out
        assert bool((scheduler.tables[n].time_scale == 1).all())
        json.dumps(made)


def test_a_pipeline_is_given_back_as_it_was_when_tuning_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, inputs, call = settings_of("FluxPipeline")
    before, kind = pipe.scheduler, type(pipe)
    bars = dict(getattr(pipe, "_progress_bar_config", {}))
    monkeypatch.setattr(course.Course, "_learn", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        dywspan.tune(pipe, 2, inputs, call=call, **SMALL)
    assert pipe.scheduler is before and type(pipe) is kind and "encode_prompt" not in vars(pipe)
    assert getattr(pipe, "_progress_bar_config", {}) == bars


def test_samples_that_are_not_finite_are_said_before_anything_is_learned() -> None:
    pipe, inputs, call = settings_of("FluxPipeline")
    with torch.no_grad():
        next(pipe.transformer.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        dywspan.tune(pipe, 2, inputs, call=call, **SMALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1}, "from 2 to 16"),
        ({"steps": [3, 3]}, "once"),
        ({"pairs": 3}, "pairs=3 must be at least 8"),
        ({"evaluations": 20}, "evaluations=20 must be at least 300"),
        ({"call": {"hight": 8}}, "hight"),
        ({"prompts": "nowhere.txt"}, "there is no such file"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    pipe = build("FluxPipeline").pipe
    with pytest.raises((ValueError, OSError), match=message):
        dywspan.tune(pipe, **settings)


def test_kinds_are_those_of_learning() -> None:
    assert {"torchao int8", "lora"} <= KINDS.keys()


# ------------------------------------------------------------------------------------------------ diffusers' solvers


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("EulerDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"solver_order": 2}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {}),
        ("DEISMultistepScheduler", {}),
    ],
)
def test_a_scheduler_of_diffusers_becomes_the_table_that_samples_as_it_does(kind: str, options: dict[str, Any]) -> None:
    """On a denoiser that is told the level, and not the time that these round."""
    own = DyWeightScheduler.from_config(diffusers.DPMSolverMultistepScheduler(**BETAS))
    theirs = getattr(diffusers, kind)(**BETAS, timestep_spacing="trailing", **options)
    table = as_table(theirs, own.host.prediction, 6)
    ours = own.with_tables([table])
    ends: list[torch.Tensor] = []
    theirs.set_timesteps(6), ours.set_timesteps(6)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * float(theirs.init_noise_sigma)
    assert ours.plan is not None
    start = theirs.scale_model_input(noise, theirs.timesteps[0]) / ours.plan.start * ours.init_noise_sigma
    for scheduler, x in ((theirs, noise), (ours, start)):
        for t, sigma in zip(scheduler.timesteps, theirs.sigmas):
            given = scheduler.scale_model_input(x, t)
            x_ve = given * float((1 + sigma**2).sqrt())
            x = scheduler.step((x_ve - 0.5 * torch.tanh(x_ve)) / float((1 + sigma**2).sqrt()), t, x, return_dict=False)[
                0
            ]
        ends.append(x)
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) < 1e-3
    euler = own.with_tables([SolverTable.initial(6, 2, table.grid, own.host.prediction, base="euler")])
    assert table.weights.shape[1] == 1 or not torch.allclose(table.weights[:, :1], euler.tables[6].weights[:, :1])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("HeunDiscreteScheduler", "takes 11 evaluations"),
        ("PNDMScheduler", "evaluations for 6 steps"),
        ("EulerAncestralDiscreteScheduler", "noise's part|straight"),
        ("LCMScheduler", "names no levels"),
    ],
)
def test_other_schedulers_are_no_tables(kind: str, message: str) -> None:
    own = DyWeightScheduler.from_config(diffusers.DPMSolverMultistepScheduler(**BETAS))
    options = {"skip_prk_steps": True} if kind == "PNDMScheduler" else {}
    with pytest.raises(ValueError, match=message):
        as_table(getattr(diffusers, kind)(**BETAS, **options), own.host.prediction, 6)


def test_the_solver_that_a_pipeline_has_is_among_those_that_are_judged() -> None:
    pipe, inputs, call = settings_of("StableDiffusionPipeline")
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    scheduler, request = asked_for(pipe, 4, inputs, call)
    names = [own.name for own in of_diffusers(pipe, scheduler, request)]
    assert "UniPCMultistepScheduler, as it was" in names
    learned = scheduler.with_tables([solvers_on(default_grid(scheduler), "uniform", request)[1].table])
    pipe.scheduler = learned
    scheduler, request = asked_for(pipe, 4, inputs, call)
    assert of_diffusers(pipe, scheduler, request)[0].table is scheduler.tables[4]
