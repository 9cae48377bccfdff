"""The guidance scale as an input of continuous solvers: what it changes, who tells it, learning over a range."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import tiny as tp
import torch
from test_continuous import GRIDS
from test_continuous import learned as table_of
from test_continuous_lift import lifts, on
from test_distill import EMOJI
from test_least_squares import columns_of
from test_spanlift import SIZE
from test_trainable import float64 as float64
from test_trainable import fresh

import dywspan
from dywspan import DyWeightScheduler
from dywspan.artifact import continuous_to_json, read_continuous
from dywspan.cli import main
from dywspan.core.continuous import FEATURES, GUIDED, ContinuousLift, features, guided
from dywspan.core.grid import make_grid
from dywspan.core.prediction import Flow
from dywspan.distill.config import DistillConfig, LearningConfig
from dywspan.distill.gradients import batch_loss
from dywspan.distill.least_squares import Problem
from dywspan.distill.losses import latent_mse
from dywspan.distill.progress import endpoint_error
from dywspan.distill.setup import prepare
from dywspan.distill.student import ContinuousStudent
from dywspan.distill.task import Task, make_terms
from dywspan.distill.trainer import distill, run
from dywspan.pipelines.classical import default_grid
from dywspan.pipelines.pairs import make_pairs
from dywspan.pipelines.rollout import frozen, load_pipeline, rollout
from dywspan.schedulers.bind import guidance_argument, guidance_scale

G0, COUNT = 4.0, len(FEATURES)
EMOJI_FLOW = EMOJI.parent / "emoji-flow"
EMOJI_PROMPTS = EMOJI.parent / "prompts" / "emoji-train.txt"


def learned(function: Any, size: float = 0.1) -> Any:
    """Where the guidance scale matters, as training leaves it."""
    wide = guided(function, G0)
    draw = torch.Generator().manual_seed(7)
    slopes = size * torch.randn(wide.coefficients.shape, generator=draw, dtype=torch.float64)
    return replace(wide, coefficients=wide.coefficients + slopes * (torch.arange(2 * COUNT) >= COUNT))


# ---------------------------------------------------------------------- the functions


@pytest.mark.parametrize("grid", GRIDS)
def test_zeros_are_the_unguided_function_bit_for_bit(grid: str) -> None:
    spec, prediction, mu = GRIDS[grid]
    levels, table = make_grid(spec, 5, prediction, mu), table_of(3, spec)
    plain = table.table(5, prediction, mu), lifts().lift(levels, prediction)
    for function in (lambda f: guided(f, G0), learned):
        for g in (None, G0, 1.0, 0.3, 50.0):
            found = function(table).table(5, prediction, mu, guidance_scale=g)
            lift = function(lifts()).lift(levels, prediction, g)
            of_table, of_lift = (found.weights, found.time_scale), (lift.alpha, lift.beta)
            same = [*map(torch.equal, of_table, (plain[0].weights, plain[0].time_scale))]
            same += map(torch.equal, of_lift, (plain[1].alpha, plain[1].beta))
            assert all(same) if function is not learned or g in (None, G0) else not any(same)


def test_each_slope_moves_what_it_belongs_to_by_the_logarithm() -> None:
    spec, prediction, mu = GRIDS["flow"]
    n, c, g = 6, -0.37, 10.0
    phi = features(levels := make_grid(spec, n, prediction, mu), prediction.signal(levels))
    for row, column in [(r, k) for r in range(2) for k in range(len(FEATURES))]:
        function = guided(ContinuousLift(torch.zeros(2, COUNT).double(), 3, 4.0), G0)
        function.coefficients[row, COUNT + column] = c
        found = function.lift(levels, prediction, g)
        moved = c * math.log(2.5) * 0.4**3 * phi[:, column]  # f = 1 / (1 + 6 / 4)
        torch.testing.assert_close((found.alpha - 1, found.beta)[row], moved)
        assert not (found.alpha - 1, found.beta)[1 - row].any()


@pytest.mark.parametrize("function", [table_of(2), lifts()], ids=["table", "lift"])
def test_it_survives_json_and_damage_is_named(function: Any) -> None:
    kind, wide = type(function), learned(function)
    data = json.loads(json.dumps(continuous_to_json(wide)))
    again = read_continuous(data, kind)
    assert torch.equal(again.coefficients, wide.coefficients) and again.guidance_scale == G0
    assert data["features"] == [*FEATURES, *GUIDED] and "guidance_scale" not in continuous_to_json(function)
    rows = len(function.coefficients)
    for damage, said in (
        ({"coefficients": [[0.0] * 8] * rows}, r"x 16 numbers, twice the features with guidance_scale; got shape"),
        ({"guidance_scale": None}, "its features are .*this version's"),
        ({"guidance_scale": 0}, "guidance_scale=0 must be a positive number, 1 without guidance"),
        ({"guidance_scale": "4"}, "guidance_scale='4' must be a positive number"),
        ({"features": [*FEATURES]}, "upgrade dywspan"),
    ):
        with pytest.raises(ValueError, match=f"(?s)Damaged continuous {kind.__name__[10:].lower()}: .*{said}"):
            read_continuous({**data, **damage}, kind)
    assert guided(wide, 9.0) is wide and guided(function, None) is function


# ---------------------------------------------------------------------- in schedulers


def test_a_scheduler_keeps_it_and_saves_it_not(tmp_path: Path) -> None:
    base = DyWeightScheduler(prediction_type="flow_prediction").with_continuous(learned(table_of()))
    lifted = on(base, learned(lifts()), operator=SIZE)
    for own in (base, lifted):
        own.set_guidance_scale(9)
        own.set_timesteps(4)
        for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
            other.set_timesteps(3)
            assert other.guidance_scale == 9 and other.plan.rows == rows_of(base, 3, 9)
        own.save_pretrained(tmp_path)
        again = type(own).from_pretrained(tmp_path)
        again.set_timesteps(3)
        assert again.guidance_scale is None and again.plan.rows == rows_of(base, 3, None)
        for wrong in (0, -1.0, float("nan"), float("inf"), True, "4"):
            with pytest.raises(ValueError, match=r"guidance_scale=.* must be a positive number"):
                own.set_guidance_scale(wrong)
        assert own.guidance_scale == 9
    expected = learned(lifts()).lift(lifted.plan.schedule.levels, Flow(), 9)
    assert lifted.plan.lift.alpha == expected.alpha.tolist() and lifted.plan.lift.beta == expected.beta.tolist()


def rows_of(scheduler: DyWeightScheduler, n: int, g: float | None) -> list[list[float]]:
    assert scheduler.continuous is not None
    table = scheduler.continuous.table(n, Flow(), guidance_scale=g)
    return table.schedule(Flow()).increments.tolist()


# ---------------------------------------------------------------------- in pipelines


def told(name: str) -> tuple[tp.Tiny, DyWeightScheduler]:
    """A pipeline of one's own, bound, and a solver that depends on the guidance scale."""
    tiny = tp.build.__wrapped__(name)
    own = DyWeightScheduler.from_config(tiny.pipe.scheduler.config)
    grid = {"name": "flow"} if own.config.get("use_dynamic_shifting") else default_grid(own)
    dywspan.bind(tiny.pipe)
    return tiny, own.with_continuous(learned(table_of(2, grid)))


NEGATIVE = {f"negative_{k}": v for k, v in tp.positive(tp.text([99], 8, 16, pooled=16)).items()}


@pytest.mark.parametrize(
    ("name", "call", "expected"),
    [
        ("StableDiffusionPipeline", {}, 7.5),  # of the signature
        ("StableDiffusionPipeline", {"guidance_scale": 3}, 3),
        ("StableDiffusionPipeline", {"guidance_scale": 1.0}, 1),
        ("StableDiffusionPipeline", {"guidance_scale": 0.0}, 1),
        ("FluxPipeline", {}, 3.5),
        ("FluxPipeline", {"guidance_scale": 0.5}, 0.5),
        ("FluxPipeline", {"guidance_scale": 2.0, "true_cfg_scale": 3.0}, 2),  # of no negative prompt
        ("FluxPipeline", {"guidance_scale": 2.0, "true_cfg_scale": 3.0, **NEGATIVE}, 6),
        ("FluxPipeline", {"guidance_scale": 2.0, "true_cfg_scale": 0.5, **NEGATIVE}, 2),
    ],
)
def test_bind_tells_it_from_the_call(name: str, call: dict[str, Any], expected: float) -> None:
    tiny, scheduler = told(name)
    output = tp.run(tiny, scheduler, [0], **call).output
    assert scheduler.request.guidance_scale == expected and scheduler.guidance_scale is None
    by_hand, unbound = copy.deepcopy(scheduler), tp.build(name)
    outputs = []
    for g in (expected, None):
        by_hand.set_guidance_scale(g)
        outputs.append(tp.run(unbound, by_hand, [0], **call).output)
    assert torch.equal(output, outputs[0]) and not torch.allclose(*outputs, rtol=1e-2, atol=1e-3)


def test_a_scale_without_effect_does_not_count() -> None:
    """QwenImage and FLUX.1-schnell: their networks are not told guidance_scale."""
    pipe = tp.build("QwenImagePipeline").pipe
    assert guidance_argument(pipe) == "true_cfg_scale" and guidance_scale(pipe, {"guidance_scale": 9}) == 1
    assert guidance_scale(pipe, {"negative_prompt": " "}) == 4 == guidance_scale(pipe, {"negative_prompt_embeds": 0})
    assert guidance_argument(tp.build("FluxPipeline").pipe) == "guidance_scale"
    assert guidance_argument(tp.build("DDPMPipeline").pipe) is None


def test_a_bound_pipeline_is_what_it_was(tmp_path: Path) -> None:
    tiny, scheduler = told("StableDiffusionPipeline")
    kind, pipe = type(tiny.pipe), tiny.pipe
    assert isinstance(pipe, diffusers.StableDiffusionPipeline) and dywspan.bind(pipe) is pipe and type(pipe) is kind
    assert kind.__name__ == "StableDiffusionPipeline"
    assert inspect.signature(kind.__call__) == inspect.signature(diffusers.StableDiffusionPipeline.__call__)
    assert tp.run(tiny, pipe.scheduler, [0]).output.requires_grad is False  # another scheduler is told nothing
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    assert type(again) is diffusers.StableDiffusionPipeline
    other = copy.deepcopy(pipe)
    other.scheduler = scheduler
    arguments = {**tiny.inputs([0]), "num_inference_steps": 2}
    other(**arguments, guidance_scale=5.0)
    assert scheduler.request.guidance_scale == 5 and pipe.scheduler is not scheduler
    with torch.no_grad():
        rollout(pipe, scheduler, **arguments, guidance_scale=6.0)
    assert scheduler.request.guidance_scale == 6


# ---------------------------------------------------------------------- learning


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_gradients_and_columns_reach_both_halves(name: str) -> None:
    subject = fresh(name)
    scheduler = subject.solver()
    student = ContinuousStudent(scheduler, learned(table_of(2, default_grid(scheduler))))
    pairs = subject.pairs(range(2))
    argument, both = str(guidance_argument(subject.pipe)), {"low": pairs, "high": pairs}
    calls = {name: {**subject.call, argument: g} for name, g in {"low": 2.0, "high": 7.0}.items()}
    terms = make_terms(subject.pipe, [3], both, both, calls)
    assert [term.name for term in terms] == ["3 @ low", "3 @ high"] and Task(
        subject.pipe, subject.teacher, terms
    ).guidance_scale == pytest.approx(14**0.5)
    config = LearningConfig(optimizer="least_squares", batch_size=2, difference=1e-6)
    problem = Problem(subject.pipe, student, terms, config=config, loss=latent_mse)
    for k, term in enumerate(terms):
        columns = columns_of(problem, k)
        monkey = pytest.MonkeyPatch()
        with monkey.context() as patch:  # not by the table's numbers
            patch.setattr(ContinuousStudent, "local", lambda self, n: (self, None))
            direct = columns_of(problem, k)
        scale = direct[1:].norm(dim=1).max()
        torch.testing.assert_close(columns[1:] / scale, direct[1:] / scale, rtol=0, atol=1e-4)
        plain, slopes = direct[1:].unflatten(0, (3, 2, COUNT)).unbind(1)
        assert float(slopes.norm(dim=-1).max()) > 0.1 * scale
        factor = math.log((term.guidance_scale or 1) / G0)
        torch.testing.assert_close(slopes, factor * plain, rtol=0, atol=1e-4 * float(scale))
        with frozen(subject.pipe):
            student.apply()
            batch_loss(subject.pipe, student, 3, pairs, term.call, latent_mse).backward()
        assert student.coefficients.grad is not None
        plain, slopes = student.coefficients.grad.split(COUNT, dim=1)
        torch.testing.assert_close(slopes, factor * plain)
        assert float(plain.norm()) > 0
        student.coefficients.grad = None


SCALES = {"weak": {"guidance_scale": 1.5}, "strong": {"guidance_scale": 9.0}}
SQUARES = LearningConfig(optimizer="least_squares", init="adams", batch_size=2, updates=3)


@pytest.fixture(scope="module")
def made() -> Any:
    """A pipeline, two training and held-out pairs at each of two guidance scales, and the calls."""
    subject = fresh("StableDiffusionPipeline")
    pairs: tuple[dict[str, Any], ...] = ({}, {})
    calls = {name: {**subject.call, **own} for name, own in SCALES.items()}
    for name, call in calls.items():
        for kept, samples in zip(pairs, (range(2), range(20, 22))):
            kept[name] = make_pairs(subject.pipe, subject.teacher, subject.inputs(samples), samples, call=call)
    return subject, *pairs, calls


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["least_squares", "adamw"])
def test_learned_at_two_scales_it_is_better_at_both(made: Any, optimizer: Any) -> None:
    subject, train, held_out, calls = made
    pipe = copy.copy(subject.pipe)
    config = replace(SQUARES, optimizer=optimizer, updates=6 if optimizer == SQUARES.optimizer else 16, lr=0.1)
    terms = make_terms(pipe, [2, 3], train, held_out, calls)
    table = distill(Task(pipe, subject.teacher, terms, config, continuous=True)).continuous
    assert table.guidance_scale == pytest.approx(13.5**0.5) and bool(table.coefficients[:, COUNT:].any())
    made_of = table.provenance
    assert made_of["variants"] == SCALES and "guidance_scale" not in made_of["call"]
    assert made_of["pairs"] == {"train": 4, "held_out": 4}
    assert [*made_of["held_out_error"]] == ["2 @ weak", "2 @ strong", "3 @ weak", "3 @ strong"]
    solver = subject.solver().with_continuous(table)
    for name, error in made_of["held_out_error"].items():
        n, variant = int(name[0]), name[4:]
        assert error["after"] < 0.98 * error["before"], (name, made_of["held_out_error"])
        again = endpoint_error(pipe, solver, n, held_out[variant], calls[variant])
        assert again == pytest.approx(error["after"], rel=1e-6)


def test_a_lift_learns_it_too_and_one_that_does_not_follow_it_can(made: Any) -> None:
    subject, train, held_out, calls = made
    pipe = copy.copy(subject.pipe)
    options: dict[str, Any] = {"solver": "spanlift", "continuous": True, "operator": {"width": 8}}
    config = LearningConfig(updates=6, batch_size=2, lr=1e-2, evaluate_every=3)
    base = subject.solver("euler")
    alone = (train["strong"], held_out["strong"])
    terms = make_terms(pipe, [2], *alone, calls["strong"])
    plain = distill(Task(pipe, subject.teacher, terms, config, base=base, **options))
    assert plain.continuous_lift is not None and plain.continuous_lift.guidance_scale is None
    squares = replace(SQUARES, updates=1)
    terms = make_terms(pipe, [2], train, held_out, calls)
    found = distill(Task(pipe, subject.teacher, terms, squares, base=plain, **options))
    lift = found.continuous_lift
    assert lift is not None and lift.guidance_scale == pytest.approx(13.5**0.5)
    assert bool(lift.coefficients[:, COUNT:].any()) and lift.coefficients.shape == (2, 2 * COUNT)
    errors = lift.provenance["held_out_error"]
    assert [*errors] == ["2 @ weak", "2 @ strong"] and all(e["after"] < e["before"] for e in errors.values())
    with pytest.raises(ValueError, match="are for one call: set continuous"):
        distill(Task(pipe, subject.teacher, terms, config, base=base, solver="spanlift"))


@pytest.mark.slow
def test_a_run_writes_what_it_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["distill", "--model", str(EMOJI), "--output", str(tmp_path), "--continuous", "--optimizer", "least_squares"]
    told += [
        "--steps",
        "2",
        "--variants",
        json.dumps({"1": {}, "6": {"guidance_scale": 6}}),
        "--guidance-scale",
        "1",
        "--init",
        "adams",
        "--pairs",
        "2",
        "--held-out",
        "1",
    ]
    told += ["--prompts", str(EMOJI_PROMPTS), "--teacher-steps", "4", "--updates", "1", "--pictures", "1"]
    assert main([*told, "--dry-run"]) == 0
    assert "6 pairs" in capsys.readouterr().out
    assert main(told) == 0
    assert "2 @ 6 steps: held-out error" in capsys.readouterr().out
    assert len([*(tmp_path / "cache").glob("*/key.json")]) == 2, "pairs of each call"
    solver = DyWeightScheduler.from_pretrained(tmp_path)
    assert solver.continuous is not None and solver.continuous.guidance_scale == pytest.approx(6**0.5)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "from dywspan import DyWeightScheduler, bind" in card and "pipe = bind(DiffusionPipeline" in card
    assert "guidance_scale=6, num_inference_steps=2)" in card and "(samples-2.png)" in card
    assert "| 2 @ 1 " in card and "for 2 and any other number of steps" in card
    assert main(["inspect", "--full", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "(delta u) log(g/g0)" in shown and "g0 = 2.44949" in shown


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"continuous": False}, "are learned together by continuous"),
        ({"variants": {"a": {"height": 8}, "b": {"height": 8}}}, "must name calls, each by other arguments"),
        ({"variants": {"a": 2}}, "must name calls"),
        ({"variants": [2, 4]}, "must be dict"),
        ({"late_starts": ["1/2"]}, "leave out variants"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DistillConfig(**{**RANGE, **settings})
    assert DistillConfig(**RANGE).matters["variants"] == RANGE["variants"]


VARIANTS = {"weak": {"guidance_scale": 2.0}, "strong": {"guidance_scale": 8.0}}
RANGE: dict[str, Any] = {"model": "m", "output": "o", "continuous": True, "variants": VARIANTS}


@pytest.mark.parametrize(
    ("model", "own", "said"),
    [
        (
            EMOJI,
            {"guidance_scale": 0.5},
            "StableDiffusionPipeline guides by 1 in all of them. Give scales that it follows",
        ),
        (EMOJI_FLOW, {"true_cfg_scale": 3.0}, "FluxPipeline guides by 1 in all of them. .* a negative prompt"),
        (EMOJI, {"true_cfg_scale": 2}, r"cannot be called with \['true_cfg_scale'\]"),
    ],
    ids=["too little", "no negative prompt", "no such argument"],
)
def test_a_variant_that_cannot_be_is_found_before_anything_is_computed(
    model: Path, own: dict[str, Any], said: str
) -> None:
    variants = {"plain": {name: 1.0 for name in own}, "other": own}
    config = DistillConfig(**RANGE | {"model": str(model), "variants": variants, "prompts": ["a", "b"]})
    with pytest.raises(ValueError, match=said):
        prepare(load_pipeline(config.model, device="cpu"), replace(config, pairs=1, held_out=1))


@pytest.mark.slow
@pytest.mark.parametrize("flow", [False, True], ids=["SD", "FLUX"])
def test_sizes_are_learned_together(flow: bool, tmp_path: Path) -> None:
    """Each on its own latents and, for flow networks, its own shift; no guidance scale is followed."""
    own: dict[str, Any] = {
        "model": str(EMOJI_FLOW if flow else EMOJI),
        "output": str(tmp_path),
        "prompts": str(EMOJI_PROMPTS),
        "steps": [3],
    }
    own |= {"continuous": True, "init": "adams", "pairs": 8, "held_out": 4, "teacher_steps": 12, "pictures": 0}
    own |= {"optimizer": "least_squares", "updates": 2, "batch_size": 8}
    sizes = {"small": {"height": 32, "width": 32}, "large": {"height": 64, "width": 48}}
    call = {"max_sequence_length": 28} if flow else {"guidance_scale": 1.0}
    solver = run(DistillConfig(**own, variants=sizes, call=call))
    assert solver is not None and solver.continuous is not None and solver.continuous.guidance_scale is None
    made_of = solver.continuous.provenance
    assert made_of["variants"] == sizes and made_of["call"] == call
    assert made_of["pairs"] == {"train": 16, "held_out": 8}
    assert {*made_of["held_out_error"]} == {"3 @ small", "3 @ large"}
    ratios = [e["after"] / e["before"] for e in made_of["held_out_error"].values()]
    assert math.prod(ratios) < 0.95, ratios
    folders = [file.parent for file in tmp_path.glob("cache/*/key.json")]
    made = [safetensors.torch.load_file(file)["targets"] for folder in folders for file in folder.glob("*.safetensors")]
    assert {targets.numel() for targets in made} == {4 * 8 * 8, 4 * 16 * 12}
