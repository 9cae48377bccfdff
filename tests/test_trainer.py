"""Whole distillations, told by YAML files and options, as a user runs them."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from hub_server import TOKEN, Hub, Repo
from PIL import Image
from test_hub import client
from test_inputs import pipeline
from test_spanlift_hub import load, numbers
from tiny import build, pixel_unet, sd_betas
from torch import Tensor

from dywspan import DyWeightScheduler, SpanLiftScheduler
from dywspan.artifact import lift_to_json, table_to_json
from dywspan.cli import main
from dywspan.commands.learn import DISTILL
from dywspan.distill import gradients, trainer
from dywspan.distill.config import DistillConfig
from dywspan.distill.gradients import batch_loss
from dywspan.distill.progress import endpoint_error
from dywspan.distill.setup import prepare
from dywspan.distill.student import TableStudent
from dywspan.pipelines import encoders, processes
from dywspan.pipelines.pairs import Pairs
from dywspan.pipelines.rollout import load_pipeline, sample
from dywspan.pipelines.teacher import Teacher
from dywspan.settings import add_arguments, make_config, read_config

ROOT = Path(__file__).parent.parent
MINIMAL = {"model": "some/model", "output": "somewhere"}


def parse(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_arguments(parser, DistillConfig, DISTILL)
    return vars(parser.parse_args(arguments))


def configure(*arguments: str, **settings: Any) -> DistillConfig:
    return make_config({**MINIMAL, **settings, **parse(*arguments)}, DistillConfig)


@pytest.fixture
def yaml_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# ------------------------------------------------------------------------------------------------ settings


def test_every_setting_has_an_option_and_a_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help-advanced")
    shown = "".join(capsys.readouterr().out.split())  # lines break at hyphens too
    for field in fields(DistillConfig):
        assert f"--{field.name.replace('_', '-')}" in shown, field.name
        assert "".join(field.metadata["help"].split()) in shown, field.name
    assert "(default:8)" in shown and "(default:None)" not in shown


def test_an_option_not_given_is_the_default() -> None:
    assert parse() == {}
    config = configure()
    for field in fields(DistillConfig):
        default = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]
        assert getattr(config, field.name) == MINIMAL.get(field.name, default)


def test_options_override_the_file_which_overrides_the_defaults(yaml_file: Callable[[str], Path]) -> None:
    path = yaml_file("model: a\noutput: b\nupdates: 7\nlr: 2\nrecompute: false\nsteps: [3]\nloss: l1\n")
    config = make_config(parse("--config", str(path), "--lr", "0.5", "--recompute", "--steps", "4", "5"), DistillConfig)
    assert (config.updates, config.loss) == (7, "l1")  # of the file
    assert (config.lr, config.recompute, config.steps) == (0.5, True, [4, 5])  # of the command line
    assert (config.batch_size, config.init) == (8, "ipndm")  # of neither
    assert make_config(parse("--config", str(path)), DistillConfig).recompute is False


def test_lists_and_mappings_on_the_command_line() -> None:
    config = configure(
        *("--steps", "3", "5", "7", "--trackers", "a", "b", "--call", '{"height": 64, "negative_prompt": "x"}'),
        *("--grid", '{"name": "flow", "shift": 3}', "--mixed-precision", "no", "--no-time-scaling"),
    )
    assert config.steps == [3, 5, 7] and config.trackers == ["a", "b"]
    assert config.call == {"height": 64, "negative_prompt": "x"} and config.grid == {"name": "flow", "shift": 3}
    assert config.mixed_precision == "no" and not config.time_scaling and config.time_shifting


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--call", '{"height": 64'], """argument --call: '{"height": 64' is not JSON"""),
        (["--steps", "three"], "argument --steps: invalid int value: 'three'"),
        (["--solver", "euler"], "invalid choice: 'euler'"),
        (["--lr", "fast"], "argument --lr: invalid float value"),
        (["--batchsize", "3"], "unrecognized arguments: --batchsize"),
    ],
)
def test_options_that_cannot_be_read(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "setting", "value"),
    [
        ("lr: 1e-3", "lr", 1e-3),
        ("lr: 1", "lr", 1.0),
        ("grid: {name: polynomial, sigma_max: 1e+1}", "grid", {"name": "polynomial", "sigma_max": 10.0}),
        ("call: {guidance_scale: 4.5, eta: .5}", "call", {"guidance_scale": 4.5, "eta": 0.5}),
        ("mixed_precision: no", "mixed_precision", "no"),
        ("prompts: [no, on, 7 cats]", "prompts", ["no", "on", "7 cats"]),
        ("prompts: file.txt", "prompts", "file.txt"),
        ("recompute: False", "recompute", False),
        ("seed: -3", "seed", -3),
        ("cache: 1.2.3", "cache", "1.2.3"),
        ("micro_batch_size: null", "micro_batch_size", None),
    ],
)
def test_yaml_means_what_it_looks_like(text: str, setting: str, value: Any, yaml_file: Callable[[str], Path]) -> None:
    read = getattr(make_config({**MINIMAL, "config": yaml_file(text)}, DistillConfig), setting)
    assert read == value and type(read) is type(value)


def test_the_shipped_files_are_read() -> None:
    files = sorted((ROOT / "training" / "configs").glob("*.yaml"))
    assert files
    for file in files:
        assert make_config({"config": file}, DistillConfig).model


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batchsize: 4", "unknown setting 'batchsize'; did you mean 'batch_size'?"),
        ("batch-size: 4", "did you mean 'batch_size'?"),
        ("teacher_step: 4", "did you mean 'teacher_steps'?"),
        ("zzz: 4", "unknown setting 'zzz'."),
        ("[model, output]", "must hold settings"),
        ("", "must hold settings"),
        ("model: {", "is not YAML"),
    ],
)
def test_files_that_hold_no_settings(text: str, said: str, yaml_file: Callable[[str], Path]) -> None:
    path = yaml_file(text)
    with pytest.raises(ValueError, match="(?s)" + str(path)) as error:
        read_config(path, DistillConfig)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"updates": "many"}, "updates='many' must be int"),
        ({"updates": 2.5}, "updates=2.5 must be int"),
        ({"updates": True}, "updates=True must be int"),
        ({"lr": "1e"}, "lr='1e' must be float or null"),
        ({"recompute": 1}, "recompute=1 must be bool"),
        ({"steps": 5}, "steps=5 must be list[int]: numbers of steps to learn for"),
        ({"steps": ["5"]}, "steps=['5'] must be list[int]"),
        ({"call": "height=64"}, "call='height=64' must be dict"),
        ({"prompts": {"prompt": "a"}}, "prompts={'prompt': 'a'} must be str or list or null"),
        ({"solver": "euler"}, "solver='euler' must be 'dyweight' or 'spanlift'"),
        ({"dtype": "half"}, "must be 'float32' or 'bfloat16' or 'float16': type of the pipeline's weights"),
        ({"output": ""}, "output is missing: directory of the artefact"),
        ({"steps": [0]}, "steps=[0] must name numbers of steps, each at least 1 and once"),
        ({"steps": [3, 5, 3]}, "steps=[3, 5, 3] must name"),
        ({"steps": []}, "steps=[] must name"),
        ({"steps": [3, 8], "teacher_steps": 7}, "teacher_steps=7 is fewer than the student's 8"),
        ({"updates": 0}, "updates=0 must be at least 1"),
        ({"batch_size": -1}, "batch_size=-1 must be at least 1: pairs in an update"),
        ({"micro_batch_size": 0}, "micro_batch_size=0 must be at least 1"),
        ({"pairs": 0}, "pairs=0 must be at least 1"),
        ({"held_out": 0}, "held_out=0 must be at least 1"),
        ({"pictures": -1}, "pictures=-1 must be at least 0"),
        ({"lr": 0}, "lr=0.0 must be above 0: peak learning rate"),
        ({"clip": float("nan")}, "clip=nan must be above 0"),
        ({"init": "heun"}, "Unknown init 'heun': use one of ['adams',"),
        ({"layout": "nchw"}, "Unknown layout 'nchw': use one of ['audio', 'image',"),
        ({"loss": "l2"}, "Unknown loss 'l2': use one of ['cauchy', 'huber', 'l1', 'mse', 'rmse']"),
        ({"solver": "spanlift", "path_substeps": 2}, "path_substeps supervises tables"),
        ({"on_the_fly": True, "path_substeps": 2}, "path_substeps needs teacher paths from the cache"),
        ({"optimizer": "least_squares", "path_substeps": 2}, "least_squares learns from endpoints"),
    ],
)
def test_settings_that_cannot_work_are_named_with_the_rule(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        configure(**settings)
    assert said in str(error.value)


def test_the_command_needs_a_model() -> None:
    with pytest.raises(ValueError, match="model is missing: pipeline: a directory or a Hub id"):
        trainer.run(configure(model=""))


def test_guidance_scale_is_short_for_the_calls(yaml_file: Callable[[str], Path]) -> None:
    config = configure("--guidance-scale", "4", call={"height": 64})
    assert config.call == {"height": 64, "guidance_scale": 4.0} and config.guidance_scale is None
    assert configure("--call", '{"guidance_scale": 4.0, "height": 64}').matters == config.matters
    path = str(yaml_file("guidance_scale: 3\ncall: {height: 64}"))
    assert configure("--config", path).call == {"height": 64, "guidance_scale": 3.0}
    assert configure("--config", path, "--guidance-scale", "5").call == {"height": 64, "guidance_scale": 5.0}
    assert configure("--config", path, "--call", '{"guidance_scale": 6}').call == {"guidance_scale": 6}


def test_what_does_not_change_the_result_does_not_keep_a_run_from_its_checkpoints() -> None:
    here = configure(output="a", recompute=True, steps=[3], pictures=1)
    assert here.matters == configure(output="b", recompute=False, steps=[3, 5], pictures=4).matters
    for change in ({"lr": 1e-3}, {"seed": 1}, {"batch_size": 4}, {"loss": "l1"}, {"call": {"height": 8}}):
        assert configure(**change).matters != here.matters


def test_a_batch_must_divide_by_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    state = argparse.Namespace(process_index=1, num_processes=3)
    monkeypatch.setattr(processes, "_state", lambda: state)
    assert list(processes.share(range(6))) == [1, 4]
    with pytest.raises(ValueError, match="batch_size=8 must be a multiple of the number of processes, 3"):
        processes.share(range(8))


# ------------------------------------------------------------------------------------------------ whole runs

TINY: dict[str, Any] = {
    "pairs": 4,
    "held_out": 4,
    "teacher_steps": 12,
    "updates": 6,
    "batch_size": 4,
    "lr": 3e-2,
    "evaluate_every": 2,
    "recompute": False,
    "pictures": 0,
}


def options(settings: dict[str, Any]) -> list[str]:
    """As on a command line."""
    result = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            result.append(f"--{option}" if value else f"--no-{option}")
        else:
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            result += [f"--{option}", *map(str, values)]
    return result


def learn(model: Path, output: Path, **settings: Any) -> int:
    return main(["distill", *options({**TINY, "model": model, "output": output, **settings})])


def held_out_error(model: Path, output: Path, n: int, **settings: Any) -> float:
    """Of what lies in ``output``, on the held-out pairs of the run that made it."""
    config = make_config({**TINY, "model": str(model), "output": str(output), "steps": [n], **settings}, DistillConfig)
    setup = prepare(load_pipeline(config.model, device="cpu"), config)
    kind = SpanLiftScheduler if config.solver == "spanlift" else DyWeightScheduler
    _, held_out = setup.pairs(setup.path_teacher(n, config.path_substeps) if config.path_substeps else setup.teacher)
    return endpoint_error(setup.pipe, kind.from_pretrained(output), n, held_out, config.call, loss=setup.loss)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*_: Any) -> None:
        raise AssertionError("a mistake must be found before anything is computed")

    monkeypatch.setattr(Teacher, "endpoints", computed)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional pipeline on disk."""
    import diffusers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "pixels"
    scheduler = diffusers.DDPMScheduler(clip_sample=False, **{k: v for k, v in sd_betas().items() if "beta" in k})
    diffusers.DDPMPipeline(unet=pixel_unet(), scheduler=scheduler).save_pretrained(folder)
    return folder


TRACKERS: dict[str, Any] = {"trackers": ["tensorboard"]} if importlib.util.find_spec("tensorboard") else {}


@pytest.fixture(scope="module")
def learned(pixels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artefact of a run without prompts, for two numbers of steps."""
    output = tmp_path_factory.mktemp("runs") / "learned"
    assert learn(pixels, output, steps=[2, 3], pictures=2, **TRACKERS) == 0
    return output


def test_one_artefact_holds_every_number_of_steps_and_reproduces_its_errors(pixels: Path, learned: Path) -> None:
    tables = DyWeightScheduler.from_pretrained(learned).tables
    assert sorted(tables) == [2, 3]
    for n, table in tables.items():
        error = table.provenance["held_out_error"]
        assert error["after"] < 0.999 * error["before"]
        assert held_out_error(pixels, learned, n) == pytest.approx(error["after"], rel=1e-5)
        assert table.provenance["pairs"] == {"train": 4, "held_out": 4}
        assert table.provenance["pipeline"] == "DDPMPipeline"


def test_the_card_says_what_was_measured_and_its_code_runs_as_written(
    learned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (learned / "README.md").read_text(encoding="utf-8")
    for n, table in DyWeightScheduler.from_pretrained(learned).tables.items():
        error = table.provenance["held_out_error"]
        cells = [str(n), f"{error['before']:.5g}", f"{error['after']:.5g}", "latent_mse", "4"]
        assert re.search(r"\| " + r" +\| ".join(map(re.escape, cells)) + r" +\|", card)
    shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)", card)
    assert sorted(shown) == ["samples-2.png", "samples-3.png", "solver.png"]
    for name in shown:
        with Image.open(learned / name) as picture:
            assert picture.convert("L").getextrema() == pytest.approx((0, 255), abs=60), f"{name} is blank"
    assert "lr: 0.03" in card and "updates: 6" in card
    namespace = run_usage(card, learned, monkeypatch)
    assert isinstance(namespace["pipe"].scheduler, DyWeightScheduler)
    assert len(namespace["result"].images) == 1 and len(namespace["pipe"].scheduler.timesteps) == 3


def run_usage(card: str, output: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    monkeypatch.chdir(output.parent)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    return namespace


def test_pictures_show_teacher_base_and_learned_solver(learned: Path) -> None:
    with Image.open(learned / "samples-3.png") as picture:
        left = picture.width - 2 * 98  # of the labels
        assert left > 60 and picture.height == 44 + 3 * 98
        cells = [
            [picture.crop((left + j * 98, 44 + i * 98, left + 96 + j * 98, 140 + i * 98)).tobytes() for j in range(2)]
            for i in range(3)
        ]
    assert all(len(set(cell)) > 64 for row in cells for cell in row), "no picture is blank"
    assert len({cell for row in cells for cell in row}) == 6, "and none is another's"


def test_trackers_get_every_loss(learned: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(learned / "dywspan")).Reload()
    for n, table in DyWeightScheduler.from_pretrained(learned).tables.items():
        losses, held_out = events.Scalars(f"loss/{n}"), events.Scalars(f"held_out/{n}")
        assert [e.step for e in losses] == [6 * (n - 2) + i for i in range(1, 7)], "steps never go back"
        assert losses[-1].value < losses[0].value
        assert min(e.value for e in held_out) == pytest.approx(table.provenance["held_out_error"]["after"], rel=1e-5)
        pictures = events.Images(f"samples/{n}")
        assert [e.step for e in pictures] == sorted({e.step for e in pictures}) and pictures[-1].height == 44 + 3 * 98
    rates = [e.value for e in events.Scalars("lr")]
    assert max(rates) == pytest.approx(3e-2)


def test_a_second_run_adds_to_the_artefact(pixels: Path, learned: Path, tmp_path: Path) -> None:
    output = tmp_path / "more"
    shutil.copytree(learned, output)
    assert learn(pixels, output, steps=[4], pictures=1) == 0
    before, after = (DyWeightScheduler.from_pretrained(folder).tables for folder in (learned, output))
    assert sorted(after) == [2, 3, 4]
    for n in (2, 3):
        assert table_to_json(after[n]) == table_to_json(before[n])
        assert (output / f"samples-{n}.png").read_bytes() == (learned / f"samples-{n}.png").read_bytes()
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "for 2, 3, 4 steps" in card and all(f"samples-{n}.png" in card for n in (2, 3, 4))
    assert after[4].provenance["held_out_error"]["after"] < after[4].provenance["held_out_error"]["before"]


@pytest.mark.parametrize(
    ("settings", "holds"),
    [
        ({"afs": True}, lambda t: t.afs and len(t.weights) == 3),
        ({"time_shifting": False}, lambda t: not t.time_shifting and bool((t.time_scale != 1).any())),
        ({"time_scaling": False}, lambda t: bool((t.time_scale == 1).all())),
        ({"bounded": 0.5, "lr": 1.0}, lambda t: bool(((t.time_scale - 1).abs() < 0.5).all()) and t.time_scale[1] != 1),
        ({"order": 1}, lambda t: t.weights.shape == (2, 1)),
        ({"init": "euler", "loss": "l1"}, lambda t: t.provenance["loss"] == "latent_l1"),
        ({"optimizer": "adam", "micro_batch_size": 3, "recompute": True}, lambda t: True),
        ({"grid": {"name": "logsnr", "sigma_min": 0.03, "sigma_max": 14}}, lambda t: t.grid["name"] == "logsnr"),
        ({"teacher": "DPMSolverMultistepScheduler"}, lambda t: t.provenance["teacher"]["scheduler"].startswith("DPM")),
        ({"path_substeps": 4}, lambda t: t.provenance["teacher"]["steps"] == 8),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_every_way_of_learning_lowers_the_error_and_the_artefact_reproduces_it(
    settings: dict[str, Any], holds: Callable[[Any], bool], pixels: Path, tmp_path: Path
) -> None:
    assert learn(pixels, tmp_path, steps=[2], **settings) == 0
    table = DyWeightScheduler.from_pretrained(tmp_path).tables[2]
    error = table.provenance["held_out_error"]
    assert holds(table) and error["after"] < error["before"]
    assert held_out_error(pixels, tmp_path, 2, **settings) == pytest.approx(error["after"], rel=1e-5)


def test_afs_saves_the_first_evaluation(pixels: Path, tmp_path: Path) -> None:
    assert learn(pixels, tmp_path, steps=[2], afs=True, updates=1) == 0
    pipe, calls = load_pipeline(str(pixels)), []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    pipe.scheduler = DyWeightScheduler.from_pretrained(tmp_path)
    pipe(num_inference_steps=2)
    assert len(pipe.scheduler.tables[2].weights) == 3 and len(calls) == 2


def test_a_path_ends_at_the_endpoint_and_starts_where_the_student_does(pixels: Path, tmp_path: Path) -> None:
    """With one substep, the teacher of an iPNDM start on the same grid is this start itself: every state agrees."""
    settings = {**TINY, "model": str(pixels), "output": str(tmp_path), "steps": [3], "afs": False}
    for substeps in (1, 4):
        config = make_config({**settings, "path_substeps": substeps}, DistillConfig)
        setup = prepare(load_pipeline(config.model, device="cpu"), config)
        teacher = setup.path_teacher(3, substeps)
        pairs, _ = setup.pairs(teacher)
        assert isinstance(pairs, Pairs)
        assert teacher.num_inference_steps == 3 * substeps and pairs[:].targets.shape == (4, 3, 3, 8, 8)
        seen: list[torch.Tensor] = []
        keep = lambda i, x: seen.append(teacher.scheduler.plan.state_after(i, x))  # noqa: B023, E731
        with torch.no_grad():
            end, _ = sample(setup.pipe, teacher.scheduler, 3 * substeps, pairs.inputs, pairs.seeds, {}, watch=keep)
        torch.testing.assert_close(pairs[:].targets[:, -1], end)
        torch.testing.assert_close(pairs[:].targets[:, :-1], torch.stack(seen[substeps - 1 : -1 : substeps], 1))
        untrained = setup.untrained(3)
        untrained.set_timesteps(3)
        torch.testing.assert_close(teacher.scheduler.sigmas[::substeps], untrained.sigmas, msg="on the student's grid")
        student = TableStudent(untrained, untrained.tables[3])
        student.apply()
        with torch.no_grad():
            value = batch_loss(setup.pipe, student, 3, pairs[:], {}, setup.loss)
            of_the_end = setup.loss(setup.pipe, sample(setup.pipe, untrained, 3, pairs.inputs, pairs.seeds, {})[0], end)
        if substeps == 1:
            # Not to rounding: a classical solver starts from noise of variance 1 + sigma_0^2, as diffusers' do.
            assert float(value) < 1e-4 * float(end.square().mean())
        else:
            assert float(value) > 1.01 * float(of_the_end) > 0, "the states on the way count"


RECKLESS: dict[str, Any] = {"steps": [2], "time_scaling": False, "time_shifting": False, "evaluate_every": 1}


def test_patience_ends_a_run_that_gets_no_better(pixels: Path, tmp_path: Path) -> None:
    assert learn(pixels, tmp_path, updates=9, lr=3.0, patience=2, **RECKLESS) == 0
    (file,) = (tmp_path / "state").rglob("*.safetensors")
    error = DyWeightScheduler.from_pretrained(tmp_path).tables[2].provenance["held_out_error"]
    assert 2 <= int(file.stem.removeprefix("update-")) < 9 and error["after"] <= error["before"]


def test_pairs_on_the_fly_are_not_kept(pixels: Path, tmp_path: Path) -> None:
    assert learn(pixels, tmp_path, steps=[2], on_the_fly=True) == 0
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 4, "the held-out ones"
    provenance = DyWeightScheduler.from_pretrained(tmp_path).tables[2].provenance
    assert provenance["pairs"] == {"train": 24, "held_out": 4}
    assert provenance["held_out_error"]["after"] < provenance["held_out_error"]["before"]


def test_a_dry_run_prints_the_plan_and_leaves_no_trace(
    pixels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(pixels)
    assert learn(pixels, Path("output"), steps=[2, 3], dry_run=True, push_to_hub="me/solvers", seed=3, **TRACKERS) == 0
    plan = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in plan.splitlines() if line.startswith("| ")
    ]
    numbers = {row[0]: row[1:3] for row in rows[1:]}
    assert numbers["teacher"] == ["8 pairs", str(8 * 12)]
    for n in (2, 3):
        assert numbers[f"{n} steps, learning"] == ["24 samples", str(24 * n)]
    assert int(numbers["total"][1]) == sum(int(row[1]) for part, row in numbers.items() if part != "total")
    assert "seed: 3" in plan and re.search(r"weights \d+\.\d\d GiB, and \d+\.\d\d GiB for 4 samples of 2 steps", plan)
    assert contents(tmp_path) == {} and list(tmp_path.iterdir()) == [] and contents(pixels) == before


# ------------------------------------------------------------------------------------------------ any number of steps

ANY: dict[str, dict[str, Any]] = {
    "adam": {"continuous": True, "steps": [2, 4], "optimizer": "adam", "updates": 12},
    "least_squares": {"continuous": True, "steps": [2, 4], "optimizer": "least_squares", "updates": 3},
}


@pytest.fixture(scope="module", params=ANY)
def continuous(request: pytest.FixtureRequest, pixels: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The artefact of a run that learned one function from two numbers of steps, and its settings."""
    output = tmp_path_factory.mktemp("runs") / request.param
    assert learn(pixels, output, pictures=1, **ANY[request.param]) == 0
    return output, ANY[request.param]


@pytest.mark.slow
def test_one_function_is_learned_from_several_counts_and_samples_at_any(pixels: Path, continuous: Any) -> None:
    folder, settings = continuous
    scheduler = DyWeightScheduler.from_pretrained(folder)
    assert scheduler.tables == {} and scheduler.continuous.base == "ipndm" and scheduler.continuous.order == 2
    errors = scheduler.continuous.provenance["held_out_error"]
    assert list(errors) == ["2", "4"]
    for n, error in errors.items():
        assert error["after"] < 0.99 * error["before"]
        again = held_out_error(pixels, folder, int(n), **{**settings, "steps": [int(n)]})
        assert again == pytest.approx(error["after"], rel=1e-5)
    (state,) = (folder / "state").iterdir()
    assert state.name.startswith("2-4-"), "learned together"
    pipe = load_pipeline(str(pixels))
    pipe.scheduler = scheduler
    for n in (1, 3, 11):
        assert len(pipe(num_inference_steps=n).images) == 1 and len(scheduler.timesteps) == n


def test_its_card_names_what_it_was_learned_from_and_its_code_runs(
    continuous: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = continuous
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "`DyWeightScheduler` for 2, 4 and any other number of steps" in card and "continuous: true" in card
    for n, error in DyWeightScheduler.from_pretrained(folder).continuous.provenance["held_out_error"].items():
        cells = [n, f"{error['before']:.5g}", f"{error['after']:.5g}", "latent_mse", "4"]
        assert re.search(r"\| " + r" +\| ".join(map(re.escape, cells)) + r" +\|", card)
    for name in ("samples-2.png", "samples-4.png", "solver.png"):
        assert f"({name})" in card and (folder / name).exists()
    assert len(run_usage(card, folder, monkeypatch)["result"].images) == 1


@pytest.mark.slow
def test_a_function_half_learned_is_gone_on_with(pixels: Path, continuous: Any, tmp_path: Path) -> None:
    """From its first checkpoint, as after a kill: bit for bit the same."""
    folder, settings = continuous
    output = tmp_path / "again"
    assert learn(pixels, output, **settings, checkpoint_every=1, keep_checkpoints=99, cache=folder / "cache") == 0
    (state,) = (output / "state").iterdir()
    files = sorted(state.glob("*.safetensors"))
    assert 1 < len(files) <= settings["updates"], "of least squares where a Jacobian is computed anew"
    for file in files[1:]:
        file.unlink()
    (output / "scheduler_config.json").unlink()
    assert learn(pixels, output, **settings, checkpoint_every=1, cache=folder / "cache") == 0
    whole, rest = (DyWeightScheduler.from_pretrained(f).continuous for f in (folder, output))
    assert torch.equal(whole.coefficients, rest.coefficients)
    assert whole.provenance["held_out_error"] == rest.provenance["held_out_error"]


@pytest.mark.slow
def test_a_function_and_tables_lie_in_one_artefact(
    pixels: Path, learned: Path, continuous: Any, tmp_path: Path
) -> None:
    folder, settings = continuous
    output = tmp_path / "both"
    shutil.copytree(learned, output)
    assert learn(pixels, output, **settings, cache=folder / "cache") == 0
    tables, both = DyWeightScheduler.from_pretrained(learned).tables, DyWeightScheduler.from_pretrained(output)
    own = DyWeightScheduler.from_pretrained(folder).continuous
    assert torch.equal(both.continuous.coefficients, own.coefficients)
    assert {n: table_to_json(t) for n, t in both.tables.items()} == {n: table_to_json(t) for n, t in tables.items()}
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "for 2, 3, 4 and any other number of steps" in card
    assert f"{tables[2].provenance['held_out_error']['after']:.5g}" in card, "the table's, which is what samples"
    assert learn(pixels, output, steps=[5], updates=1) == 0, "and a table beside the function"
    after = DyWeightScheduler.from_pretrained(output)
    assert sorted(after.tables) == [2, 3, 5] and torch.equal(after.continuous.coefficients, own.coefficients)


@pytest.mark.parametrize("optimizer", ANY)
def test_the_plan_of_a_function_counts_what_learning_it_takes(
    optimizer: str, pixels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ANY[optimizer]
    assert learn(pixels, tmp_path / "out", **settings, dry_run=True) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    plan = {row[0]: (row[1], int(row[2])) for row in rows[1:]}
    for n, tails in ((2, 4), (4, 19)):  # of K = 2, by hand: 1 + 0 weights' calls, 2 + 1 of s; 3 + 2 * (2 + 1), 4 + ...
        if optimizer == "adam":  # they take turns
            assert plan[f"{n} steps, learning"] == ("24 samples", 24 * n)
        else:
            assert plan[f"{n} steps, learning"] == ("12 samples", 12 * (2 * n + tails))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ spanlift

LIFTED: dict[str, Any] = {
    "solver": "spanlift",
    "steps": [2, 3],
    "shared": True,
    "operator": {"width": 4, "blocks": 1},
    "lr": 1e-2,
}


@pytest.fixture(scope="module")
def lifted(pixels: Path, learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared operator on the learned tables."""
    output = tmp_path_factory.mktemp("runs") / "lifted"
    assert learn(pixels, output, base=learned, pictures=1, **LIFTED) == 0
    return output


def test_a_shared_operator_on_learned_tables(pixels: Path, learned: Path, lifted: Path) -> None:
    scheduler = SpanLiftScheduler.from_pretrained(lifted)
    assert list(scheduler.operators) == ["shared"] and sorted(scheduler.lifts) == [2, 3]
    assert scheduler.operators["shared"].stem.out_channels == 4
    for n, lift in scheduler.lifts.items():
        error, base = lift.provenance["held_out_error"], DyWeightScheduler.from_pretrained(learned).tables[n]
        assert error["before"] == pytest.approx(base.provenance["held_out_error"]["after"], rel=1e-5)
        assert error["after"] < error["before"]
        settings = {**LIFTED, "steps": [2, 3], "base": str(learned)}
        assert held_out_error(pixels, lifted, n, **settings) == pytest.approx(error["after"], rel=1e-4)
        assert table_to_json(scheduler.tables[n]) == table_to_json(base)


@pytest.mark.slow
def test_more_steps_leave_a_shared_operator_as_it_is(
    pixels: Path, learned: Path, lifted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second run shares its operator among its own steps; a run of single ones on a shared one keeps each."""
    output = tmp_path / "more"
    settings: dict[str, Any] = {**LIFTED, "base": "euler", "pictures": 0}
    assert learn(pixels, output, **settings) == 0
    error = held_out_error(pixels, output, 3, **{**settings, "steps": [2, 3]})
    assert learn(pixels, output, **{**settings, "steps": [4]}) == 0
    assert {n: lift.operator for n, lift in SpanLiftScheduler.from_pretrained(output).lifts.items()} == {
        **dict.fromkeys((2, 3), "shared"),
        4: "shared-2",
    }
    assert held_out_error(pixels, output, 3, **{**settings, "steps": [2, 3]}) == error
    single = {"solver": "spanlift", "steps": [2, 3], "base": lifted, "lr": 1e-3, "updates": 2}
    assert learn(pixels, tmp_path / "single", **single) == 0
    scheduler = SpanLiftScheduler.from_pretrained(tmp_path / "single")
    assert {n: lift.operator for n, lift in scheduler.lifts.items()} == {2: "shared", 3: "shared-2"}
    capsys.readouterr()


def test_a_spanlift_artefact_is_gone_on_with(
    pixels: Path, learned: Path, lifted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its scalars by least squares, whatever size of operator the settings would make."""
    settings = {"solver": "spanlift", "optimizer": "least_squares", "steps": [2], "updates": 2, "pictures": 0}
    assert learn(pixels, tmp_path / "on", base=lifted, **settings) == 0
    before, after = (SpanLiftScheduler.from_pretrained(folder) for folder in (lifted, tmp_path / "on"))
    error = after.lifts[2].provenance["held_out_error"]
    assert error["before"] == pytest.approx(before.lifts[2].provenance["held_out_error"]["after"], rel=1e-4)
    assert error["after"] <= error["before"] and not torch.equal(after.lifts[2].alpha, before.lifts[2].alpha)
    assert held_out_error(pixels, tmp_path / "on", 2, base=str(lifted), **settings) == pytest.approx(error["after"])
    for wrong, said in {learned: "must be a SpanLift artefact", "euler": "must be a SpanLift artefact"}.items():
        assert learn(pixels, tmp_path / "not", base=wrong, **settings) == 2
        assert said in capsys.readouterr().err
    assert learn(pixels, lifted, base=lifted, **settings) == 2
    assert "base and output are both" in capsys.readouterr().err


def test_the_card_of_a_lifted_solver_runs_as_written(lifted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (lifted / "README.md").read_text(encoding="utf-8")
    namespace = run_usage(card, lifted, monkeypatch)
    assert isinstance(namespace["pipe"].scheduler, SpanLiftScheduler) and len(namespace["result"].images) == 1
    assert "![The learned numbers](solver.png)" in card and (lifted / "solver.png").exists()


@pytest.mark.slow
def test_operators_are_added_to_those_there_are(pixels: Path, learned: Path, lifted: Path, tmp_path: Path) -> None:
    output = tmp_path / "more"
    shutil.copytree(lifted, output)
    assert learn(pixels, output, base=learned, **{**LIFTED, "steps": [2], "shared": False}) == 0
    before, after = (SpanLiftScheduler.from_pretrained(folder) for folder in (lifted, output))
    assert {n: lift.operator for n, lift in after.lifts.items()} == {2: "2", 3: "shared"}
    assert lift_to_json(after.lifts[3]) == lift_to_json(before.lifts[3])
    for name, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], value)


@pytest.mark.slow
def test_operators_for_tables_that_came_later_are_added_too(
    pixels: Path, learned: Path, lifted: Path, tmp_path: Path
) -> None:
    table, output = DyWeightScheduler.from_pretrained(learned).tables[2], tmp_path / "more"
    more = replace(table, weights=table.weights[[0, 1, 1, 1]], time_scale=table.time_scale[[0, 1, 1, 1]])
    shutil.copytree(lifted, output)
    DyWeightScheduler.from_pretrained(learned).with_tables([more]).save_pretrained(tmp_path / "grown")
    assert learn(pixels, output, base=tmp_path / "grown", **{**LIFTED, "steps": [4], "shared": False}) == 0
    after, before = (SpanLiftScheduler.from_pretrained(folder) for folder in (output, lifted))
    assert sorted(after.lifts) == [2, 3, 4] and sorted(after.tables) == [2, 3, 4]
    assert lift_to_json(after.lifts[3]) == lift_to_json(before.lifts[3])
    changed = replace(table, time_scale=1.01 * table.time_scale)
    DyWeightScheduler.from_pretrained(learned).with_tables([changed]).save_pretrained(tmp_path / "changed")
    assert learn(pixels, output, base=tmp_path / "changed", **{**LIFTED, "steps": [2], "shared": False}) == 2


@pytest.mark.slow
def test_the_base_alone_of_a_lifted_solver_is_a_base(lifted: Path, tmp_path: Path, pixels: Path) -> None:
    """Its configuration still names the lifts it had."""
    solver = SpanLiftScheduler.from_pretrained(lifted)
    base = DyWeightScheduler.from_config(solver.config)
    base.save_pretrained(tmp_path / "base")
    settings = {**LIFTED, "steps": [2], "updates": 2}
    assert learn(pixels, tmp_path / "out", base=tmp_path / "base", **settings) == 0
    assert sorted(SpanLiftScheduler.from_pretrained(tmp_path / "out").lifts) == [2]


def test_a_pipeline_with_another_scheduler_is_another_subject(
    pixels: Path, learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No checkpoint of the former is gone on with, no artefact of it added to, no table of it a base."""
    other = tmp_path / "other"
    shutil.copytree(pixels, other)
    file = other / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text())
    keys = []
    for changes in ({}, {"beta_end": 0.03}, {"prediction_type": "v_prediction"}):
        file.write_text(json.dumps(settings | changes))
        config = configure(output=str(tmp_path / "none"), steps=[2], teacher_steps=4)
        keys.append(prepare(load_pipeline(str(other), device="cpu"), config).key([2]))
    assert len({*keys}) == 3
    before = contents(learned)
    assert learn(other, learned, steps=[4]) == 2
    assert "holds solvers of another pipeline, or of its former scheduler" in (said := capsys.readouterr().err)
    assert "'prediction_type': ('epsilon', 'v_prediction')" in said and contents(learned) == before
    assert learn(other, tmp_path / "lift", base=learned, **LIFTED) == 2
    assert "was learned for Epsilon networks, and" in capsys.readouterr().err
    file.write_text(json.dumps(settings | {"beta_end": 0.03}))
    assert learn(other, tmp_path / "lift", base=learned, **LIFTED) == 2
    assert "with other ['log_alphas']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"base": "euler"}, "holds operators that differ in ['solver'"),
        ({"order": 3}, "holds operators that differ in ['operator.order']: choose another output"),
        ({"operator": {"width": 8, "blocks": 1}}, "holds operators that differ in ['operator.width']"),
        ({"solver": "dyweight"}, "holds a SpanLiftScheduler: choose another output for a DyWeightScheduler"),
        ({"steps": [4]}, "No table for num_inference_steps=4: this solver was learned for [2, 3] steps"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_does_not_fit_the_artefact_is_refused_before_anything_is_computed(
    settings: dict[str, Any],
    said: str,
    pixels: Path,
    learned: Path,
    lifted: Path,
    capsys: pytest.CaptureFixture[str],
    nothing_computed: None,
) -> None:
    before = contents(lifted)
    assert learn(pixels, lifted, **{**LIFTED, "base": learned, **settings}) == 2
    assert said in capsys.readouterr().err
    assert contents(lifted) == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"teacher": "Euler"}, "Unknown teacher 'Euler': use one of ['adams'"),
        ({"teacher": "UNet2DModel"}, "Unknown teacher 'UNet2DModel'"),
        ({"call": {"hight": 8}}, "DDPMPipeline cannot be called with ['hight'] here: it takes"),
        ({"prompts": "p.txt"}, "DDPMPipeline cannot be called with ['prompt'] here"),
        ({"prompts": "missing.txt"}, "there is no such file"),
        ({"grid": {"name": "linear"}}, "linear"),
        ({"features": "nonsense"}, "nonsense"),
        ({"trackers": ["nonsense"]}, "trackers=['nonsense'] are not installed, or not Accelerate's"),
        ({"trackers": ["dvclive"]}, "dvclive"),
        ({"solver": "spanlift", "operator": {"widths": 4}}, "operator"),
        ({"solver": "spanlift", "operator": {"width": -1}}, "does not describe a SpanLift operator"),
        ({"solver": "spanlift", "layout": "video"}, "layout"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be at least 0"),
        ({"optimizer": "least_squares", "loss": "l1"}, "l1' is no sum of squares"),
        ({"solver": "spanlift", "layout": "packed"}, "layout='packed' is not that of DDPMPipeline"),
        ({"config": "missing.yaml"}, "missing.yaml"),
        ({"solver": "spanlift", "base": "nowhere"}, "nowhere"),
        ({"model": "nowhere"}, "nowhere"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_mistakes_end_in_one_line_before_anything_is_computed(
    settings: dict[str, Any],
    said: str,
    pixels: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    nothing_computed: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a\n" * 8, encoding="utf-8")
    assert main(["distill", *options({**TINY, "model": pixels, "output": "out", "steps": [2], **settings})]) == 2
    error = capsys.readouterr().err
    assert said in error and error.splitlines()[-1].startswith("dywspan: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layout": "packed"}, "layout='packed' is not that of StableDiffusionPipeline"),
        ({"layout": "packed", "latent_size": [64]}, "latent_size=[64] must be height and width"),
    ],
)
def test_a_loss_that_cannot_decode_is_found_out_before_the_teacher_runs(
    settings: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], nothing_computed: None
) -> None:
    (tmp_path / "p.txt").write_text("lime, noto\n" * 8, encoding="utf-8")
    asked = {"prompts": tmp_path / "p.txt", "features": "encoder", "steps": [2], **settings}
    assert learn(ROOT / "examples" / "emoji-sd", tmp_path / "out", **asked) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("name", "layout"), [("LTXPipeline", "packed_video"), ("FluxPipeline", "packed")])
def test_packed_tokens_of_any_size_can_be_learned_on(name: str, layout: str) -> None:
    """Only a SpanLift solver is told their height and width: no other base is asked."""
    tiny = build(name)
    base = DyWeightScheduler.from_config(tiny.pipe.scheduler.config, solver="euler")
    config = configure(solver="spanlift", layout=layout, steps=[2])
    call = tiny.inputs([0]) | ({"height": 24, "width": 40} if layout == "packed" else {})
    setup: Any = SimpleNamespace(config=config, pipe=tiny.pipe, base=base, inputs=[{}], call=call)
    setup.untrained = lambda steps: base
    trainer._check_sample(setup)
    setup.config = replace(config, layout="image")
    with pytest.raises(ValueError, match="layout='image' is not that of"):
        trainer._check_sample(setup)


def test_a_loss_that_is_not_finite_ends_in_one_line(
    pixels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert learn(pixels, tmp_path, lr=1e30, **RECKLESS) == 2
    assert "dywspan: The loss is not finite at update" in capsys.readouterr().err


@pytest.mark.parametrize(
    "evaluate_every", [pytest.param(1, marks=pytest.mark.slow), 9]
)  # found out on the held-out pairs, or while learning
def test_an_update_to_levels_below_zero_is_taken_back(
    evaluate_every: int, pixels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert learn(pixels, tmp_path, lr=30.0, steps=[2], evaluate_every=evaluate_every) == 0
    said = capsys.readouterr().out
    assert said.count("made no solver and is taken back") == 1 and "Lower lr" in said and "must be positive" in said
    table = DyWeightScheduler.from_pretrained(tmp_path).tables[2]
    error, spent = table.provenance["held_out_error"], table.provenance["evaluations"]
    assert error["after"] <= error["before"]
    assert spent["student"] == 6 * 4 * 2 and spent["teacher"] == 8 * 12, "of those taken back nothing was asked"


@pytest.mark.parametrize("fails_at", [0, 1, 4])
def test_what_else_is_wrong_is_not_taken_for_such_an_update(
    fails_at: int, pixels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, loss = itertools.count(), gradients.batch_loss

    def wrong(*given: Any) -> Tensor:
        if next(calls) == fails_at:
            raise ValueError("something else")
        return loss(*given)

    monkeypatch.setattr(gradients, "batch_loss", wrong)
    assert learn(pixels, tmp_path, steps=[2]) == 2
    said = capsys.readouterr()
    assert "dywspan: something else" in said.err and "made no solver" not in said.out


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_gradient_that_is_not_finite_ends_in_one_line(
    precision: str, pixels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, loss = itertools.count(), gradients.batch_loss

    def steep(*given: Any) -> Tensor:
        value = loss(*given)
        return value + (value - value.detach()).abs().sqrt() if next(calls) >= 2 else value

    monkeypatch.setattr(gradients, "batch_loss", steep)
    assert learn(pixels, tmp_path, steps=[2], updates=30, evaluate_every=30, mixed_precision=precision) == 2
    said, update = capsys.readouterr().err, {"no": 2, "fp16": 19}[precision]  # 2^16 is halved 17 times
    assert f"dywspan: The gradient is not finite at update {update} of the 2-step solver, though the loss is " in said


@pytest.mark.slow
def test_gradients_in_half_precision_are_scaled_and_gone_on_with(pixels: Path, tmp_path: Path) -> None:
    """Also after a stop: the scale is part of a checkpoint."""
    half: dict[str, Any] = {"steps": [2], "mixed_precision": "fp16", "checkpoint_every": 1, "keep_checkpoints": 9}
    assert learn(pixels, tmp_path / "whole", **half) == 0
    table = DyWeightScheduler.from_pretrained(tmp_path / "whole").tables[2]
    assert table.provenance["held_out_error"]["after"] < table.provenance["held_out_error"]["before"]
    shutil.copytree(tmp_path / "whole" / "state", tmp_path / "stopped" / "state")
    for file in (tmp_path / "stopped" / "state").rglob("update-*.safetensors"):
        if int(file.stem.removeprefix("update-")) > 3:
            file.unlink()
    assert learn(pixels, tmp_path / "stopped", **half) == 0
    again = DyWeightScheduler.from_pretrained(tmp_path / "stopped").tables[2]
    assert torch.equal(table.weights, again.weights) and torch.equal(table.time_scale, again.time_scale)


def test_sums_are_made_where_the_processes_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL knows GPUs only, and a solver's gradients are on the CPU."""
    state = SimpleNamespace(num_processes=2, device=torch.device("meta"))
    monkeypatch.setattr(processes, "_state", lambda: state)

    def reduce(value: Tensor, reduction: str) -> Tensor:
        assert value.device == state.device and reduction == "sum"
        return torch.full(value.shape, 2.0, dtype=value.dtype)

    monkeypatch.setattr("accelerate.utils.reduce", reduce)
    found = processes.total(torch.ones(3, dtype=torch.float64))
    assert found.device.type == "cpu" and found.tolist() == [2.0] * 3 and found.dtype == torch.float64


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", None])
def test_a_second_run_in_a_process_has_the_precision_it_asks_for(
    precision: str | None, pixels: Path, tmp_path: Path
) -> None:
    results = []
    for name, given in (("alone", None), ("before", "bf16"), ("after", precision)):
        asked = {} if given is None else {"mixed_precision": given}
        assert learn(pixels, tmp_path / name, steps=[2], **asked) == 0
        results.append(DyWeightScheduler.from_pretrained(tmp_path / name).tables[2])
    assert torch.equal(results[0].weights, results[2].weights)
    assert not torch.equal(results[0].weights, results[1].weights)


@pytest.fixture(autouse=True)
def _no_precision_is_left_behind() -> Iterator[None]:
    yield
    AcceleratorState._reset_state()


# ------------------------------------------------------------------------------------------------ inputs of a run


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional pipeline on disk, and labels beside it."""
    folder = tmp_path_factory.mktemp("models") / "dit"
    build("DiTPipeline").pipe.save_pretrained(folder)
    (folder / "labels.jsonl").write_text("".join(f'{{"class_labels": {k}}}\n' for k in range(8)), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "guidance_scale",
    [1.0, pytest.param(4.0, marks=pytest.mark.slow)],
)
def test_class_labels(guidance_scale: float, labelled: Path, tmp_path: Path) -> None:
    settings = {"prompts": str(labelled / "labels.jsonl"), "guidance_scale": guidance_scale}
    assert learn(labelled, tmp_path, steps=[2], pictures=1, **settings) == 0
    error = DyWeightScheduler.from_pretrained(tmp_path).tables[2].provenance["held_out_error"]
    assert error["after"] < error["before"]
    assert held_out_error(labelled, tmp_path, 2, **settings) == pytest.approx(error["after"], rel=1e-5)


def test_the_card_of_a_class_conditional_solver_runs_as_written(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, settings = tmp_path / "out", {"prompts": str(labelled / "labels.jsonl"), "guidance_scale": 1.0}
    assert learn(labelled, output, steps=[2], updates=1, **settings) == 0
    card = (output / "README.md").read_text(encoding="utf-8")
    assert len(run_usage(card, output, monkeypatch)["result"].images) == 1


@pytest.mark.slow
def test_prompts_are_encoded_once_and_then_the_text_encoder_may_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, call = pipeline("StableDiffusionPipeline")
    pipe.save_pretrained(tmp_path / "sd")
    settings = {"prompts": [f"cat {i}" for i in range(8)], "call": {**call, "guidance_scale": 3.0}, "steps": [2]}
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings | {"release_text_encoders": True}), encoding="utf-8")  # JSON is YAML
    calls: list[int] = []
    load = encoders.load_pipeline

    def counted(*args: Any, **kwargs: Any) -> Any:
        pipe = load(*args, **kwargs)
        pipe.text_encoder.register_forward_hook(lambda _, __, output: calls.append(len(output[0])))
        return pipe

    monkeypatch.setattr(encoders, "load_pipeline", counted)
    assert learn(tmp_path / "sd", tmp_path / "out", config=file, pictures=2) == 0
    # Each alone, and the first batch once more as it is; beside them the empty one for guidance.
    assert sum(calls) == 2 * (8 + 8)
    calls.clear()
    assert learn(tmp_path / "sd", tmp_path / "out", config=file, updates=8) == 0
    assert sum(calls) == 2 * 8, "the first batch alone"
    error = DyWeightScheduler.from_pretrained(tmp_path / "out").tables[2].provenance["held_out_error"]
    assert error["after"] < error["before"]
    plain = {**settings, "call": settings["call"]}
    assert held_out_error(tmp_path / "sd", tmp_path / "out", 2, **plain) == pytest.approx(error["after"], rel=1e-4)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "guidance_scale=3.0, num_inference_steps=2" in card
    assert len(run_usage(card, tmp_path / "out", monkeypatch)["result"].images) == 1


# ------------------------------------------------------------------------------------------------ publishing


@pytest.fixture(scope="module")
def published(
    pixels: Path, learned: Path, lifted: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Hub, dict[str, dict[str, Any]], Path]]:
    """The same command as ``lifted``'s with an upload, to a Hub that takes it and to one that does not."""
    folder = tmp_path_factory.mktemp("published")
    calls: dict[str, str] = {}
    for name, repository in (("taken", "me/lifted"), ("refused", "me/full")):
        shutil.copytree(lifted, folder / name)
        settings = {**TINY, **LIFTED, "model": str(pixels), "base": str(learned), "output": str(folder / name)}
        settings |= {"push_to_hub": repository, "pictures": 1}
        calls[name] = f"str(__import__('{trainer.__name__}', fromlist=['run']).run({CONFIGURE}(**{settings!r})))"
    calls["pulled"] = load("'me/lifted'")
    with Hub() as hub:
        hub.repos["me/full"] = Repo(full=True)
        hub.repos["me/full"].commit()
        yield hub, client(hub, folder / "home", calls, HF_TOKEN=TOKEN), folder


CONFIGURE = "__import__('dywspan.distill.config', fromlist=['DistillConfig']).DistillConfig"
UPLOADED = {
    "scheduler_config.json",
    "spanlift.safetensors",
    "README.md",
    "solver.png",
    "samples-2.png",
    "samples-3.png",
}


@pytest.mark.slow
def test_an_artefact_its_card_and_its_pictures_arrive_in_one_repository(published: Any) -> None:
    hub, results, folder = published
    assert "error" not in results["taken"], results["taken"]
    assert set(hub.repos["me/lifted"].files) == UPLOADED
    for name, content in hub.repos["me/lifted"].files.items():
        assert content == (folder / "taken" / name).read_bytes(), name
    assert len(hub.repos["me/lifted"].history) == 2, "made, and all of it in one commit"
    assert 'SpanLiftScheduler.from_pretrained("me/lifted")' in hub.repos["me/lifted"].files["README.md"].decode()
    assert results["pulled"].get("value") == numbers(SpanLiftScheduler.from_pretrained(folder / "taken"))


def test_a_failed_upload_loses_nothing(published: Any, lifted: Path) -> None:
    hub, results, folder = published
    assert results["refused"]["os"] and results["refused"]["seconds"] < 60, results["refused"]
    message = results["refused"]["message"]
    for part in ("upload to me/full failed", "No space left", "Nothing is lost", str(folder / "refused"), "hf upload"):
        assert part in message
    assert hub.repos["me/full"].files == {}
    assert {name for name in UPLOADED if (folder / "refused" / name).exists()} == UPLOADED
    assert numbers(SpanLiftScheduler.from_pretrained(folder / "refused")) == numbers(
        SpanLiftScheduler.from_pretrained(lifted)
    )


# ------------------------------------------------------------------------------------------------ processes


def python(*arguments: object) -> str:
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_module_is_the_command() -> None:
    shown = python("-m", "dywspan.distill", "--help")
    assert "Learn a solver" in shown and "--teacher-steps" in shown


def test_accelerate_launches_the_script(pixels: Path, tmp_path: Path) -> None:
    settings = {**TINY, "model": str(pixels), "output": str(tmp_path / "out"), "steps": [2], "pictures": 1}
    (tmp_path / "run.yaml").write_text(json.dumps(settings), encoding="utf-8")
    launch = ["-m", "accelerate.commands.launch", "--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--cpu"]
    shown = python(*launch, "training/distill.py", "--config", tmp_path / "run.yaml", "--updates", 2)
    table = DyWeightScheduler.from_pretrained(tmp_path / "out").tables[2]
    error = table.provenance["held_out_error"]
    assert f"2 steps: held-out error {error['before']:.4g} -> {error['after']:.4g}, saved to" in shown
    assert table.provenance["learning"]["updates"] == 2 and (tmp_path / "out" / "samples-2.png").exists()
