"""The commands, run as a user runs them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from dywspan import DyWeightScheduler, SolverTable
from dywspan.artifact import table_to_json
from dywspan.cli import main
from dywspan.evaluate import overhead

ROOT = Path(__file__).parent.parent
GRID = {"name": "flow", "shift": 3.0}


def _artefact(path: Path) -> Path:
    weights = torch.tensor([[1.25, 0.0], [1.5, -0.625]], dtype=torch.float64)
    table = SolverTable(weights, torch.tensor([1.0, 0.75], dtype=torch.float64), GRID)
    DyWeightScheduler(prediction_type="flow_prediction", tables={"2": table_to_json(table)}).save_pretrained(path)
    return path


def test_inspect_prints_weights_and_calibrated_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(_artefact(tmp_path))]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    header, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    second = dict(zip(header, rows[1]))
    # sigma_1 = 3t/(1 + 2t) = 0.75 at t = 1/2; sigma~_1 = 1 + 1.25 * (0.75 - 1) = 0.6875; tau = 0.75 * sigma~_1
    assert second["w[i]"] == "1.5000" and second["w[i-1]"] == "-0.6250" and second["sum"] == "0.8750"
    assert second["sigma~"] == "0.6875" and second["tau"] == "0.5156" and second["timestep"] == "515.6250"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "nowhere/at/all"], "nowhere/at/all"),
        (["convert", "empty", "out"], "No .pt or .pkl file"),
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
    show = [
        "demo",
        "--solvers",
        solvers,
        "--spanlift",
        tmp_path / "none",
        "--steps",
        "2",
        "--samples",
        "2",
        "--columns",
        "2",
    ]
    output = _run(*show, "--output", tmp_path / "demo.png", "--json", results)
    rows = json.loads(results.read_text())["rows"]
    assert [r["solver"] for r in rows][-1] == "DyWeight (learned)" and all(r["nfe"] == 2 for r in rows)
    assert all(f"{r['latent_mse']:.3f} / {1e3 * r['feature_distance']:.2f}" in output for r in rows)
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.height > 6 * 96  # the reference and five solvers


def test_the_example_script_draws_an_image(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, ROOT / "examples" / "swap_one_line.py", "red heart, noto", tmp_path / "x.png"], check=True
    )
    with Image.open(tmp_path / "x.png") as image:
        red, green, _ = image.convert("RGB").resize((1, 1)).getpixel((0, 0))
    assert red > green + 20, "a red heart is red"


def test_the_digits_example_learns(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    script, small = str(ROOT / "examples" / "digits.py"), ["--steps", "3", "--pairs", "32", "--held-out", "64"]
    (line,) = _python(script, *small, "--updates", "6").splitlines()
    before, after = (float(word) for word in re.findall(r"0\.\d+", line))
    assert line.startswith("3 steps, 32 pairs: iPNDM(3M)") and after < 0.3 * before


def test_import_needs_no_extra() -> None:
    extras = ["transformers", "accelerate", "matplotlib"]
    _python("-c", f"import sys; sys.modules.update(dict.fromkeys({extras})); import dywspan, dywspan.cli")


def test_bench_overhead_counts_no_host_reads_in_our_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "_denoiser_seconds", lambda x, device: 1.0)
    assert main(["bench", "overhead", "--json", str(tmp_path / "o.json")]) == 0
    rows = {r["scheduler"].split(",")[0]: r for r in json.loads((tmp_path / "o.json").read_text())["rows"]}
    assert rows["DyWeight"]["syncs"] == rows["SpanLift"]["syncs"] == 0 < rows["DPM-Solver++(2M)"]["syncs"]
    for row in rows.values():
        assert row["percent_of_denoiser"] == pytest.approx(row["us_per_step"] / 1e4)


def _run(*arguments: object) -> str:
    return _python("-m", "dywspan.cli", *map(str, arguments))


def _python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
