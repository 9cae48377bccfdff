"""What learning costs is what the network was asked, wherever a run was stopped; and only like errors are compared."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_trainer import TINY, pixels  # noqa: F401  (a fixture)

from dywspan import DyWeightScheduler
from dywspan.bench.cost import learning_cost, plot
from dywspan.cli import main
from dywspan.core.table import SolverTable
from dywspan.distill import trainer
from dywspan.distill.config import DistillConfig
from dywspan.distill.progress import endpoint_error
from dywspan.distill.setup import HELD_OUT_SEED
from dywspan.distill.split import split_inputs
from dywspan.evaluate.report import read_results, table
from dywspan.pipelines.classical import default_grid
from dywspan.pipelines.pairs import make_pairs
from dywspan.pipelines.rollout import load_pipeline
from dywspan.pipelines.teacher import Teacher, find_teacher
from dywspan.settings import make_config

ROOT = Path(__file__).parent.parent
SQUARES = {"optimizer": "least_squares", "updates": 3, "batch_size": 2, "checkpoint_every": 1, "keep_checkpoints": 99}
ADAM = {"optimizer": "adamw", "updates": 4, "checkpoint_every": 1, "keep_checkpoints": 99}


def write(folder: Path, name: str, model: Path, **settings: Any) -> Path:
    """A file of settings; YAML files may be JSON."""
    path = folder / f"{name}.yaml"
    settings = {"model": str(model), "output": str(folder / name), "cache": str(folder / "cache"), **settings}
    path.write_text(json.dumps({**TINY, "pairs": 4, "held_out": 2, "steps": [2], **settings}))
    return path


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def both(pixels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A folder with both configurations, what they learned, and their cost, by the command."""
    folder = tmp_path_factory.mktemp("both")
    write(folder, "adam", pixels, **ADAM, steps=[2, 3], test=5)
    write(folder, "squares", pixels, **SQUARES, steps=[2, 3], test=5)
    files = ["--config", str(folder / "adam.yaml"), "--config", str(folder / "squares.yaml")]
    assert (
        main(
            [
                "bench",
                "distill",
                *files,
                "--held-out",
                "3",
                "--output",
                str(folder / "cost.json"),
                "--plot",
                str(folder / "cost.png"),
            ]
        )
        == 0
    )
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        ADAM,
        ADAM | {"recompute": True, "mixed_precision": "bf16"},
        ADAM | {"on_the_fly": True},
        SQUARES,
        SQUARES | {"continuous": True, "steps": [2, 4]},
    ],
    ids=["adamw", "recompute", "on_the_fly", "least_squares", "continuous"],
)
def test_evaluations_are_those_of_the_network(
    settings: dict[str, Any],
    pixels: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside what its first layer saw, and the gradients its last one got. What is replayed does not reach them."""
    asked: Counter[str] = Counter()

    def backward(module: Any, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: asked.update(backward=len(output)))

    def load(*arguments: Any, **named: Any) -> Any:
        pipe = load_pipeline(*arguments, **named)
        pipe.unet.conv_in.register_forward_hook(lambda _, inputs, output: asked.update(forward=len(output)))
        pipe.unet.conv_out.register_forward_hook(backward)
        return pipe

    monkeypatch.setattr(trainer, "load_pipeline", load)
    rows = learning_cost([write(tmp_path, "only", pixels, **settings)])
    assert len({row["evaluations"] for row in rows}) == 1, "learned together, one cost"
    row = rows[0]
    assert row["evaluations"] == asked["forward"] + asked["backward"]
    assert row["evaluations"] == row["teacher"] + row["learning"] + row["held_out"]
    fresh = settings.get("on_the_fly", False)
    pairs = 4 * 4 if fresh else 4
    assert row["pairs"] == pairs and row["teacher"] == (pairs + 2) * TINY["teacher_steps"]
    assert row["curve"][0][0] < row["teacher"] if fresh else row["curve"][0][0] > row["teacher"]
    assert (asked["backward"] == 0) == (settings["optimizer"] == "least_squares")
    assert all(row["evaluations_to_match"] is None for row in rows), "there is no other"


def test_a_curve_is_what_a_run_had_when_it_had_spent_so_much(both: Path) -> None:
    rows = read_results(both / "cost.json")["rows"]
    assert [(r["optimizer"], r["num_inference_steps"]) for r in rows] == [
        *(("adamw", 2), ("adamw", 3), ("least_squares", 2), ("least_squares", 3))
    ]
    for row in rows:
        spent, errors = zip(*row["curve"])
        error = DyWeightScheduler.from_pretrained(both / Path(row["config"]).stem).tables[row["num_inference_steps"]]
        error = error.provenance["held_out_error"]
        assert spent[0] == row["teacher"] + 3 * row["num_inference_steps"], "3 held-out pairs at the start"
        assert (spent[-1], errors[-1]) == (row["evaluations"], row["held_out_error"])
        assert [*spent] == sorted(set(spent)) and [*errors] == sorted(errors, reverse=True)
        assert (errors[0], errors[-1]) == (error["before"], error["after"]) and len(spent) > 2
    for row in rows:
        (other,) = (
            r["held_out_error"]
            for r in rows
            if r["num_inference_steps"] == row["num_inference_steps"] and r["optimizer"] != row["optimizer"]
        )
        matching = [spent for spent, error in row["curve"] if error <= other]
        assert row["evaluations_to_match"] == (min(matching) if matching else None)
    assert 2 <= sum(row["evaluations_to_match"] is not None for row in rows) < 4, "of two, one is the better"


def test_the_test_error_is_of_pairs_that_nothing_else_saw(both: Path, pixels: Path) -> None:  # noqa: F811
    """Of seeds after the three held-out ones, before and after; a run without test pairs learns the same numbers."""
    pipe = load_pipeline(str(pixels))
    teacher = find_teacher(pipe, "ipndm", TINY["teacher_steps"])
    seeds = range(HELD_OUT_SEED + 3, HELD_OUT_SEED + 8)
    pairs = make_pairs(pipe, teacher, [{}] * 5, seeds, call={})
    for row in read_results(both / "cost.json")["rows"]:
        solver, n = DyWeightScheduler.from_pretrained(both / Path(row["config"]).stem), row["num_inference_steps"]
        error = solver.tables[n].provenance["test_error"]
        assert error["pairs"] == 5 and row["test_error"] == error["after"] != row["held_out_error"]
        assert error["after"] == pytest.approx(endpoint_error(pipe, solver, n, pairs, {}), rel=1e-5)
        start = solver.with_tables([SolverTable.initial(n, 2, default_grid(solver), solver.host.prediction)])
        assert error["before"] == pytest.approx(endpoint_error(pipe, start, n, pairs, {}), rel=1e-3)


def test_a_finished_run_is_tested_when_that_is_asked_for_later(
    both: Path,
    pixels: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    def row(**settings: Any) -> dict[str, Any]:
        folder = tmp_path / "late"
        folder.mkdir(exist_ok=True)
        return learning_cost([write(folder, "squares", pixels, **SQUARES, held_out=3, **settings)])[0]

    untested, tested = row(), row(test=5)
    whole = read_results(both / "cost.json")["rows"][2]
    assert untested["test_error"] is None and tested["test_error"] == whole["test_error"]
    assert timeless([tested | {"test_error": None}]) == timeless([untested])
    assert (tested["evaluations"], tested["held_out_error"]) == (whole["evaluations"], whole["held_out_error"])


def test_a_finished_run_is_found_and_a_stopped_one_goes_on_to_the_same_cost(
    both: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*_: Any) -> None:
        raise AssertionError("the pairs are there")

    monkeypatch.setattr(Teacher, "endpoints", made)
    known = timeless(read_results(both / "cost.json")["rows"])
    paths = [both / "adam.yaml", both / "squares.yaml"]
    files = {path: path.stat().st_mtime_ns for path in both.glob("*/state/**/*.safetensors")}
    assert timeless(learning_cost(paths, held_out=3)) == known
    assert files == {path: path.stat().st_mtime_ns for path in both.glob("*/state/**/*.safetensors")}
    for state in both.glob("*/state/*"):
        for file in sorted(state.iterdir())[1:]:
            file.unlink()
    assert timeless(learning_cost(paths, held_out=3)) == known


def test_its_table_and_its_picture(both: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    results = read_results(both / "cost.json")
    assert results.keys() == {"command", "versions", "device", "rows"}
    assert main(["bench", "table", str(both / "cost.json"), "--steps", "3"]) == 0
    header, _, *lines = (
        [c.strip() for c in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()
    )
    rows = [row for row in results["rows"] if row["num_inference_steps"] == 3]
    assert "curve" not in header and len(lines) == len(rows) == 2
    for line, row in zip(lines, rows):
        shown = dict(zip(header, line))
        assert shown["evaluations"] == str(row["evaluations"]) and shown["optimizer"] == row["optimizer"]
        assert shown["evaluations_to_match"] == str(row["evaluations_to_match"] or "")
    assert table(results, ["pairs", "config"]).splitlines()[0].split() == ["|", "pairs", "|", "config", "|"]
    with pytest.raises(ValueError, match=r"metrics=\['fid'\], steps=None: there is \['optimizer',"):
        table(results, ["fid"])
    with pytest.raises(ValueError, match=r"steps=\[9\]"):
        table(results, steps=[9])
    with Image.open(both / "cost.png") as drawn:
        width = drawn.width
    plot(results["rows"][:1], tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as drawn:
        assert drawn.convert("L").getextrema() == pytest.approx((0, 255), abs=60) and drawn.width < width


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"teacher_steps": 8}, "squares.yaml differs from adam.yaml in ['teacher_steps'], so that their errors"),
        ({"held_out": 4}, "in ['held_out', 'held_out_prompts']"),
        ({"prompts": [{"batch_size": 1}] * 6}, "in ['held_out_prompts']"),
        ({"output": "adam"}, "each its own output"),
        ({"dry_run": True}, "dry_run=True learns nothing"),
        ({"optimiser": "adam"}, "unknown setting 'optimiser'; did you mean 'optimizer'?"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_computed(
    settings: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dywspan.bench.cost.run", lambda config: pytest.fail("it began to compute"))
    write(tmp_path, "adam", Path("model"), **ADAM, output="adam")
    write(tmp_path, "squares", Path("model"), **SQUARES | settings)
    assert main(["bench", "distill", "--config", "adam.yaml", "--config", "squares.yaml"]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "distill-cost.json").exists()


def test_the_embedded_pipelines_files_share_teacher_and_held_out_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files = [f"training/configs/emoji_sd_{name}.yaml" for name in ("adam", "least_squares")]
    gradients, squares = (make_config({"config": file}, DistillConfig) for file in files)
    (training, *others), (few, *same) = split_inputs(gradients), split_inputs(squares)
    assert same == others and few == training[: len(few)] and len(few) == 64
    shared = ("model", "call", "cache", "teacher", "teacher_steps", "teacher_order", "teacher_batch_size", "loss")
    shared += ("held_out", "test", "steps", "order", "init")
    assert [getattr(squares, key) for key in shared] == [getattr(gradients, key) for key in shared]
    assert squares.optimizer == "least_squares" and squares.mixed_precision == "no"
