"""The commands, run as a user runs them."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dywspan import DyWeightScheduler, SolverTable
from dywspan.artifact import table_to_json
from dywspan.cli import main
from dywspan.core.continuous import ContinuousTable
from dywspan.evaluate import report

ROOT = Path(__file__).parent.parent
GRID = {"name": "flow", "shift": 3.0}


def _artefact(path: Path) -> Path:
    weights = torch.tensor([[1.25, 0.0], [1.5, -0.625]], dtype=torch.float64)
    table = SolverTable(weights, torch.tensor([1.0, 0.75], dtype=torch.float64), GRID)
    DyWeightScheduler(prediction_type="flow_prediction", tables={"2": table_to_json(table)}).save_pretrained(path)
    return path


def test_inspect_prints_weights_and_calibrated_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--full", str(_artefact(tmp_path))]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    header, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    second = dict(zip(header, rows[1]))
    # sigma_1 = 3t/(1 + 2t) = 0.75 at t = 1/2; sigma~_1 = 1 + 1.25 * (0.75 - 1) = 0.6875; tau = 0.75 * sigma~_1
    assert second["w[i]"] == "1.5000" and second["w[i-1]"] == "-0.6250" and second["sum"] == "0.8750"
    assert second["sigma~"] == "0.6875" and second["tau"] == "0.5156" and second["timestep"] == "515.6250"


def test_inspect_prints_a_function_and_tables_that_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = {"4": {"before": 0.25, "after": 0.125}}
    function = ContinuousTable.initial(2, GRID, base="euler", horizon=4.0)
    function.coefficients[0, 0], function.coefficients[2, 5] = 0.5, -0.75
    function = replace(function, provenance={"held_out_error": errors})
    own = DyWeightScheduler(prediction_type="flow_prediction").with_continuous(function)
    own.save_pretrained(tmp_path / "function")
    assert main(["inspect", "--full", str(tmp_path / "function"), "--plot", str(tmp_path / "solver.png")]) == 0
    said, _, shown = capsys.readouterr().out.partition("any number of steps, grid")
    assert (
        "DyWeightScheduler\n" in said
        and "any number of steps" in said
        and "euler(2M)" in shown
        and "halve at 4 steps" in shown
    )
    assert re.search(r"\| 4 +\| 0.25 +\| 0.125 ", said) and "shift" in shown
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if "|" in line]
    coefficients = {row[0]: dict(zip(rows[0], row)) for row in rows[2:5]}
    assert list(coefficients) == ["levels", "w, difference 1", "log s"]
    assert coefficients["levels"]["1"] == "0.5000" and coefficients["log s"]["first"] == "-0.7500"
    # f = 1 / (1 + 3 / 4): of three steps, the last is exp(f / 2) as long and s_0 = exp(-3/4 f^2)
    assert (longer := f"{math.exp(4 / 7 / 2):.4f}") in shown and f"{math.exp(-0.75 * (4 / 7) ** 2):.4f}" in shown
    with Image.open(tmp_path / "solver.png") as picture:
        assert picture.convert("L").getextrema() == pytest.approx((0, 255), abs=60)
    table = DyWeightScheduler.from_pretrained(_artefact(tmp_path / "table")).tables[2]
    own.with_tables([table]).save_pretrained(tmp_path / "both")
    assert main(["inspect", "--full", str(tmp_path / "both")]) == 0
    both = capsys.readouterr().out
    assert "2 and any other number of steps" in both and "1.5000" in both and longer not in both


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "nowhere/at/all"], "nowhere/at/all"),
        (["convert", "empty", "--output", "out"], "No .pt or .pkl file"),
        (["demo", "--model", "nothing/here"], "run in a clone"),
        (["distill", "--model", "m", "--prompts", "few.txt", "--output", "o"], "few.txt' has 1 prompts, 320 are"),
    ],
)
def test_mistakes_end_in_one_clear_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "few.txt").write_text("one\n\n", encoding="utf-8")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


@pytest.mark.slow
def test_distill_then_demo_in_processes_of_their_own(tmp_path: Path) -> None:
    """The two commands of the README, small: learn a table, then see it beside the classical solvers."""
    prompts = ROOT / "examples" / "prompts" / "emoji-train.txt"
    solvers = tmp_path / "solvers"
    learn = ["distill", "--model", ROOT / "examples" / "emoji-sd", "--prompts", prompts, "--output", solvers]
    learn += ["--steps", "2", "--pairs", "4", "--held-out", "4", "--teacher-steps", "6", "--guidance-scale", "4"]
    learn += ["--updates", "4", "--batch-size", "4", "--evaluate-every", "2", "--init", "euler", "--no-recompute"]
    _run(*learn)
    table = DyWeightScheduler.from_pretrained(solvers).tables[2]
    assert table.provenance["held_out_error"]["after"] < table.provenance["held_out_error"]["before"]
    assert table.provenance["call"] == {"guidance_scale": 4.0}
    results = tmp_path / "demo.json"
    show = ["demo", "--solvers", "euler", solvers, "--steps", "2", "--samples", "2", "--pictures", "2"]
    output = _run(*show, "--output", results)
    written = report.read_results(results)
    rows = written["rows"]
    assert [r["solver"] for r in rows] == ["Euler", "DyWeight (learned)"] and all(r["nfe"] == 2 for r in rows)
    assert report.table(written) in output and written["settings"]["call"] == {"guidance_scale": 4.0}
    with Image.open(tmp_path / "demo-samples-2.png") as picture:
        assert picture.height > 3 * 64 and picture.width > 2 * 64


@pytest.mark.slow
def test_the_demo_shows_the_flow_pipeline_as_its_solvers_were_learned(tmp_path: Path) -> None:
    """Its call is in the artefact; classical solvers that do not fit it are left out; the hardest prompts are drawn."""
    options = ["--steps", "3", "8", "--samples", "3", "--pictures", "2", "--output", str(tmp_path / "demo.json")]
    model = str(ROOT / "examples" / "emoji-flow")
    assert main(["demo", "--model", model, *options]) == 0
    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    errors = {row["solver"]: row["latent_rmse"] for row in rows if row["nfe"] == 3}
    assert [row["solver"] for row in rows if row["nfe"] == 8] == [*errors][:-1], "TimeLift was not learned for 8"
    assert [*errors] == ["DPM-Solver++(2M)", "UniPC", "DyWeight (learned)", "DyWeight + TimeLift (learned)"]
    assert errors["DyWeight + TimeLift (learned)"] < errors["DyWeight (learned)"] < errors["UniPC"]
    for n in (3, 8):
        with Image.open(tmp_path / f"demo-samples-{n}.png") as picture:
            assert picture.height > 3 * 64 and picture.width > 2 * 64


@pytest.mark.slow
def test_the_example_script_draws_an_image(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, ROOT / "examples" / "swap_one_line.py", "red heart, noto", tmp_path / "x.png"], check=True
    )
    with Image.open(tmp_path / "x.png") as image:
        red, green, _ = image.convert("RGB").resize((1, 1)).getpixel((0, 0))
    assert red > green + 20, "a red heart is red"


@pytest.mark.weekly
@pytest.mark.slow
def test_the_digits_example_learns(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    small = ["--steps", "3", "--pairs", "32", "--updates", "6", "--held-out", "64"]
    out = _python(str(ROOT / "examples" / "digits.py"), *small, "--select", "32", "--gradients", "480", "--seeds", "0")
    table = [line for line in out.splitlines() if line.startswith("|")]
    names, _, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    assert names == ["steps", "iPNDM(3M)", "Adam, 480 pairs", "least squares, 32 pairs"]
    before, *after = map(float, row[1:])
    assert row[0] == "3" and max(after) < 0.3 * before


@pytest.mark.weekly
@pytest.mark.slow
def test_the_example_for_any_number_of_steps_learns(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    script, picture = str(ROOT / "examples" / "any_steps.py"), tmp_path / "any.png"
    small = [
        "--pairs",
        "24",
        "--held-out",
        "64",
        "--updates",
        "6",
        "--fit",
        "3",
        "4",
        "6",
        "--show",
        "4",
        "5",
        "--tables",
        "5",
    ]
    lines = _python(script, *small, "--plot", str(picture)).splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line)
    shown = [dict(zip(header, row)) for row in rows]
    assert [(row["steps"], row["fitted"]) for row in shown] == [("4", "yes"), ("5", "")]
    for row, ratio in zip(shown, (0.7, 0.85)):
        assert float(row["continuous"]) < ratio * float(row["its error"])
    assert shown[0]["table for it alone"] == "" and float(shown[1]["table for it alone"]) < 0.1, "iPNDM(3M) has 0.15"
    with Image.open(picture) as image:
        assert image.convert("L").getextrema() == pytest.approx((0, 255), abs=60)


@pytest.mark.weekly
@pytest.mark.slow
def test_the_image_to_image_example_compares_at_equal_evaluations(tmp_path: Path) -> None:
    own = DyWeightScheduler.from_config(DyWeightScheduler.load_config(ROOT / "examples" / "emoji-sd" / "scheduler"))
    grid = {"name": "discrete", "sigma_min": 0.0, "sigma_max": 14.6}
    own.with_continuous(ContinuousTable.initial(2, grid)).save_pretrained(tmp_path)
    small = ["--samples", "2", "--batch-size", "2", "--calls", "2/4", "2/4"]
    _python(str(ROOT / "examples" / "img2img.py"), str(tmp_path), *small, "--output", str(tmp_path / "img2img.json"))
    rows = json.loads((tmp_path / "img2img.json").read_text())["rows"]
    assert len(rows) == 12 and rows[:6] == rows[6:], "no solver changes those after it"
    assert all((row["variant"], row["nfe"]) == ("strength 0.5", 2) for row in rows)
    errors = {row["solver"]: row["latent_mse"] for row in rows}
    assert 0 < errors["DyWeight (learned)"] < 10 * min(errors.values())


def test_import_needs_no_extra() -> None:
    extras = ["transformers", "accelerate", "matplotlib", "datasets"]
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({extras}))\nfrom dywspan import *; from dywspan.cli import main"
    )
    shown = _python("-c", f"{script}\nmain(['inspect', 'examples/emoji-sd-spanlift']); main(['list', 'examples'])")
    assert "SpanLiftScheduler\n" in shown and "| examples/emoji-sd-spanlift " in shown


def _run(*arguments: object) -> str:
    return _python("-m", "dywspan.cli", *map(str, arguments))


def _python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
