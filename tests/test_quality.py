"""An evaluation gives the same numbers however it is run, at the cost it says, and its reports say what it measured."""

from __future__ import annotations

import copy
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build, pixel_unet

from dywspan import DyWeightScheduler, SolverTable, SpanLiftScheduler
from dywspan.artifact import table_to_json
from dywspan.cli import main
from dywspan.core.continuous import ContinuousTable
from dywspan.evaluate import quality, task
from dywspan.evaluate.baselines import (
    BASELINES,
    BEST,
    SLUGS,
    Cell,
    Solver,
    find_solvers,
    make_cell,
    make_cells,
    of_diffusers,
    of_ours,
)
from dywspan.evaluate.config import QualityConfig
from dywspan.evaluate.images import find_images
from dywspan.evaluate.metrics import METRICS
from dywspan.evaluate.pictures import plots
from dywspan.evaluate.quality import evaluate, run, with_gaps
from dywspan.evaluate.report import by_variant, number, read_results, table
from dywspan.evaluate.statistics import Metric, Sample, interval
from dywspan.pipelines.decode import to_images
from dywspan.pipelines.pairs import make_pairs
from dywspan.pipelines.replay import Meter
from dywspan.pipelines.rollout import load_pipeline, sample
from dywspan.pipelines.teacher import Teacher
from dywspan.settings import make_config

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "emoji-sd"
PROMPTS = ROOT / "examples" / "prompts" / "emoji-held-out.txt"
FOLDER = tempfile.TemporaryDirectory()  # kept until the process ends
LEARNED = str(Path(FOLDER.name) / "emoji-sd-solvers")
shipped = DyWeightScheduler.from_pretrained(ROOT / "examples" / "emoji-sd-solvers")
some = [shipped.tables[n] for n in (3, 4, 5, 7)]
DyWeightScheduler.from_config(shipped.config, tables=None).with_tables(some).save_pretrained(LEARNED)
SETTINGS: dict[str, Any] = {
    "model": str(MODEL),
    "prompts": str(PROMPTS),
    "call": {"height": 32, "width": 32, "guidance_scale": 1.0},
    **dict(samples=7, batch_size=2, teacher_steps=6, steps=[2, 3], solvers=["DDIM", "Heun", LEARNED]),
    **dict(metrics=["latent_mse", "feature_distance"], gap_from="DDIM"),
}


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**SETTINGS, "output": str(folder / "results.json"), "cache": str(folder / "cache"), **changes}


def config(folder: Path, **changes: Any) -> QualityConfig:
    return QualityConfig(**settings(folder, **changes))


def start(folder: Path, processes: int = 1, **changes: Any) -> subprocess.Popen[bytes]:
    """The command in processes of its own; YAML files may be JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quality.yaml").write_text(json.dumps(settings(folder, **changes)))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] * (processes > 1)
    arguments = [*launcher, "-m", "dywspan.cli", "eval", "--config", str(folder / "quality.yaml")]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def rows_files(folder: Path) -> dict[str, int]:
    """Every finished batch, and when it was written."""
    files = (file for file in folder.glob("cache/*/*/*.safetensors") if "pairs" not in file.parts)
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that ran to its end undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run(config(folder))
    return folder


def measured(folder: Path) -> list[dict[str, Any]]:
    return read_results(folder / "results.json")["rows"]


# --------------------------------------------------------------------------------------- the same numbers every time


def test_a_cell_is_known_by_what_was_learned_for_its_own_count() -> None:
    """So that the cache keeps what an artefact's other tables do not change."""
    lifted = SpanLiftScheduler.from_pretrained(ROOT / "examples" / "emoji-sd-spanlift")
    for whole in (shipped, lifted):
        few = copy.deepcopy(whole)
        kept = {name: {"3": few.config[name]["3"]} for name in ("tables", "lifts") if few.config.get(name)}
        few.register_to_config(**kept)
        if whole is lifted:
            few.operators = {"3": few.operators["3"]}
        one, other = (Cell("learned", scheduler, 3, 3).describe() for scheduler in (whole, few))
        assert one == other and one["config"]["tables"] == kept["tables"]
        assert len(one["operators"]) == (whole is lifted)
        assert one != Cell("learned", whole, 4, 4).describe() and not one["config"].get("lifts", {}).keys() - {"3"}


def test_rows_are_those_of_samples_made_by_hand(tmp_path: Path) -> None:
    pipe, call = load_pipeline(str(MODEL), device="cpu"), {"height": 32, "width": 32, "guidance_scale": 2.0}
    inputs, seeds = [{"prompt": p} for p in ("red heart, noto", "lime, twemoji", "handshake, noto")], [5, 6, 9]
    ours = lambda **solver: DyWeightScheduler.from_config(pipe.scheduler.config, **solver)  # noqa: E731
    reference = make_pairs(pipe, Teacher(ours(solver="ipndm"), 5), inputs, seeds, call=call, batch_size=3)
    metrics = [METRICS[name](pipe) for name in ("latent_mse", "psnr")]
    options: dict[str, Any] = {"call": call, "batch_size": 2, "reference": reference}
    rows = evaluate(pipe, ours(solver="euler"), 2, inputs, seeds, metrics, cache=tmp_path, **options)
    for i in range(3):  # one by one
        with torch.no_grad():
            end, output = sample(pipe, ours(solver="euler"), 2, inputs[i : i + 1], seeds[i : i + 1], call, decode=True)
            target = reference[i : i + 1].endpoints
            # The pipeline's own images are its decoder's, on 8-bit levels.
            levels = torch.tensor(list(output.images[0].tobytes())).reshape(32, 32, 3).movedim(-1, 0)
            mine = (to_images(pipe, end)[0] * 255).round()
            psnr = -10 * (to_images(pipe, end) - to_images(pipe, target)).square().mean().log10()
        assert (levels - mine).abs().max() <= 1 and (levels != mine).float().mean() < 0.01
        assert float(rows["latent_mse"][i]) == pytest.approx(float((end - target).square().mean()), rel=1e-4)
        assert float(rows["psnr"][i]) == pytest.approx(float(psnr), abs=0.05)
    # The reference's images are decoded once for all solvers, and are the same ones.
    shown: dict[int, torch.Tensor] = {}
    for solver in ("euler", "adams"):
        before = evaluate(pipe, ours(solver=solver), 2, inputs, seeds, metrics, **options)
        kept = evaluate(pipe, ours(solver=solver), 2, inputs, seeds, metrics, shown=shown, **options)
        assert torch.equal(kept["psnr"], before["psnr"]) and sorted(shown) == [0, 1]
        assert all(levels.dtype == torch.uint8 for levels in shown.values())
    # In lower precision the samples are others: they must not be found in the cache of these.
    lower = evaluate(pipe, ours(solver="euler"), 2, inputs, seeds, metrics, cache=tmp_path, precision="bf16", **options)
    assert not torch.equal(lower["latent_mse"], rows["latent_mse"])
    assert torch.allclose(lower["latent_mse"], rows["latent_mse"], rtol=0.2)
    # For distances of latents alone nothing is decoded.
    pipe.vae = None
    again = evaluate(pipe, ours(solver="euler"), 2, inputs, seeds, metrics[:1], model="m", **options)
    assert torch.equal(again["latent_mse"], rows["latent_mse"])


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_numbers(whole: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    deadline = time.monotonic() + 900
    while len(rows_files(tmp_path)) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = rows_files(tmp_path)
    assert 5 <= len(before) < len(rows_files(whole)), "killed in the middle"
    run(config(tmp_path))
    assert measured(tmp_path) == measured(whole)
    after = rows_files(tmp_path)
    assert {name: after[name] for name in before} == before, "nothing was made twice"


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(whole: Path, tmp_path: Path) -> None:
    process = start(tmp_path, processes=2)
    code, log = process.wait(timeout=900), (tmp_path / "log").read_text()
    assert code == 0, log[-3000:]
    assert log.count("Written to") == 1, "the processes do not know of each other"
    assert measured(tmp_path) == measured(whole)
    assert rows_files(tmp_path).keys() == rows_files(whole).keys()


def test_what_is_added_computes_only_itself(whole: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, int]] = []

    def watched(pipe: Any, scheduler: Any, steps: int, *args: Any, **kwargs: Any) -> Any:
        asked.append((type(scheduler).__name__, steps))
        return sample(pipe, scheduler, steps, *args, **kwargs)

    monkeypatch.setattr(quality, "sample", watched)
    monkeypatch.setattr(task, "_decoding", lambda pipe, config, *_: config)  # takes one sample beforehand
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    more = run(config(tmp_path, solvers=["DDIM", "Euler", LEARNED], steps=[2, 3, 6]))
    made = {("EulerDiscreteScheduler", 2), ("EulerDiscreteScheduler", 3), ("EulerDiscreteScheduler", 6)}
    assert {*asked} == made | {("DDIMScheduler", 6)} and len(asked) == 4 * 4  # of four batches each
    own = lambda row: {k: v for k, v in row.items() if not k.startswith("paired")}  # noqa: E731  (rivals may be new)
    known = {(row["solver"], row["nfe"]): own(row) for row in measured(whole)}
    assert all(own(row) == known[key] for row in more["rows"] if (key := (row["solver"], row["nfe"])) in known)
    asked.clear()
    run(config(tmp_path, samples=3, solvers=["DDIM"]))
    assert len(asked) == 2 * 1, "of three samples, the batch of two was there"


def test_a_damaged_file_is_made_again(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    name = next(iter(rows_files(tmp_path)))
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    run(config(tmp_path))
    assert f"{tmp_path / name} is damaged" in capsys.readouterr().out and (tmp_path / name).read_bytes() == data
    assert measured(tmp_path) == measured(whole)


# ------------------------------------------------------------------------------------------------------ equal cost


def _edm() -> diffusers.EDMEulerScheduler:
    return diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)


def _edm_pixels(pipeline: type) -> Any:
    torch.manual_seed(0)
    pipe = pipeline(unet=pixel_unet().eval(), scheduler=_edm())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _inputs(name: str) -> tuple[Any, dict[str, Any]]:
    return build(name).pipe, build(name).inputs([0])


OURS = {"RES(2M)", "CAB-2", "CAB-3", "Adams(2M)", "Adams(3M)", "iPNDM(2M)", "iPNDM(3M)", "iPNDM(4M)"}
FOR_ALL = OURS | {"Euler", "Heun", "DPM-Solver-2", "DEIS", "DPM-Solver++(2M)", "DPM-Solver++(3M)", "UniPC"}
# Tiny pipeline -> (it and its arguments, solvers that fit only some, the schedulers that diffusers has for it).
KINDS: dict[str, tuple[Callable[[], tuple[Any, dict[str, Any]]], set[str], dict[str, str]]] = {
    "epsilon": (
        lambda: _inputs("StableDiffusionPipeline"),
        {"DDIM", "PNDM", "DPM-Solver++(2M), Karras", "DPM-Solver++(2M), AYS"},
        {"Euler": "EulerDiscreteScheduler", "Heun": "HeunDiscreteScheduler", "UniPC": "UniPCMultistepScheduler"},
    ),
    "flow": (
        lambda: _inputs("StableDiffusion3Pipeline"),
        {"NeuralSolver"},
        {"Euler": "FlowMatchEulerDiscreteScheduler", "Heun": "FlowMatchHeunDiscreteScheduler"},
    ),
    "edm": (
        lambda: (_edm_pixels(diffusers.ConsistencyModelPipeline), {}),
        set(),
        {"Euler": "EDMEulerScheduler", "DPM-Solver++(2M)": "EDMDPMSolverMultistepScheduler"},
    ),
    # Its noise is never scaled, as EDM's schedulers need it: only ours, which see that, fit.
    "edm, raw": (
        lambda: (_edm_pixels(diffusers.DDPMPipeline), {}),
        set(),
        {"Euler": "DyWeightScheduler", "DPM-Solver++(2M)": "DyWeightScheduler"},
    ),
    "packed flow": (lambda: _inputs("FluxPipeline"), {"NeuralSolver"}, {"Euler": "FlowMatchEulerDiscreteScheduler"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_solver_that_fits_a_pipeline_costs_what_it_says(kind: str) -> None:
    make, only, classes = KINDS[kind]
    pipe, call = make()
    cells: dict[str, Cell] = {}
    for solver in find_solvers(["all"]):
        try:
            cells[solver.name] = make_cell(pipe, solver, 5, {}, call)
        except ValueError as error:
            assert solver.name in str(error)
    assert {*cells} == FOR_ALL | only
    assert classes.items() <= {name: type(cell.scheduler).__name__ for name, cell in cells.items()}.items()
    # Two evaluations a step, the last into sigma = 0 one: three steps. PNDM takes its second step twice.
    odd = {name: cell.num_inference_steps for name, cell in cells.items() if cell.num_inference_steps != 5}
    assert odd == {name: n for name, n in {"Heun": 3, "DPM-Solver-2": 3, "PNDM": 4}.items() if name in cells}
    branches = 2 if kind == "epsilon" else 0  # guidance: two samples a call
    for name, cell in cells.items():
        with torch.no_grad(), Meter(pipe).running() as meter:
            end, _ = sample(pipe, cell.scheduler, cell.num_inference_steps, [{}], [0], call)
        branches = branches or meter.counts["student"] // 5
        assert meter.counts["student"] == 5 * branches and bool(end.isfinite().all()), name


def test_a_cost_that_cannot_be_met_is_an_empty_cell(whole: Path) -> None:
    result = read_results(whole / "results.json")
    assert {(r["solver"], r["nfe"], r["num_inference_steps"]) for r in result["rows"]} == {
        *(("DDIM", 2, 2), ("DDIM", 3, 3), ("Heun", 3, 2), ("DyWeight (learned)", 3, 3))
    }
    assert result["notes"] == [
        "Heun, 2 evaluations: no number of steps costs 2 evaluations",
        "DyWeight (learned), 2 evaluations: learned for [3, 4, 5, 7] steps",
    ]


def test_one_row_is_one_scheduler() -> None:
    make, _, _ = KINDS["flow"]
    pipe, call = make()

    def long_only(pipe: Any, n: int) -> Any:
        if n < 6:
            raise ValueError("6 steps at least")
        return of_diffusers("FlowMatchEulerDiscreteScheduler")(pipe, n)

    euler = of_ours("euler")
    cells, refused = make_cells(pipe, Solver("it", (long_only, euler)), [3, 6], {}, call)
    assert [type(cell.scheduler).__name__ for cell in cells] == ["DyWeightScheduler"] * 2 and not refused
    cells, refused = make_cells(pipe, Solver("it", (long_only,)), [3, 6], {}, call)
    assert [cell.nfe for cell in cells] == [6] and refused == ["it, 3 evaluations: 6 steps at least"]


def _quiet(scheduler: Any) -> Any:
    """One that starts from a third of the noise."""
    scheduler.init_noise_sigma = 0.3
    return scheduler


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (of_diffusers("EulerDiscreteScheduler", prediction_type="epsilon"), "strays by"),  # the network says v
        (of_diffusers("EulerDiscreteScheduler", beta_end=0.02), "strays by"),  # and knows other noise levels
        (of_diffusers("FlowMatchEulerDiscreteScheduler"), "init_noise_sigma"),
        (lambda pipe, n: _quiet(of_diffusers("DDIMScheduler")(pipe, n)), "times the noise"),
    ],
)
def test_a_scheduler_that_means_another_network_does_not_fit(scheduler: Any, reason: str) -> None:
    pipe = load_pipeline(str(MODEL), device="cpu")
    with pytest.raises(ValueError, match=reason):
        make_cell(pipe, Solver("it", (scheduler,)), 4, {"prompt": "lime, noto"}, {"height": 32, "width": 32})


def test_every_solver_has_a_name_to_type() -> None:
    assert len(SLUGS) == len({*BASELINES, BEST}) and all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", own) for own in SLUGS)
    assert {"dpmpp-2m-ays", "dpmpp-3m", "ipndm-3m", "dpm-2", "unipc"} <= SLUGS.keys()
    typed, shown = (find_solvers(names) for names in (["dpmpp-2m-ays", "ipndm-3m"], [*map(SLUGS.get, SLUGS)]))
    assert [solver.name for solver in typed] == ["DPM-Solver++(2M), AYS", "iPNDM(3M)"] and typed[1] in shown


def test_published_grids_are_met_where_they_are_published() -> None:
    pipe, call = _inputs("StableDiffusionPipeline")
    cell = make_cell(pipe, Solver("AYS", BASELINES["DPM-Solver++(2M), AYS"]), 10, {}, call)
    published = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]
    assert cell.scheduler.sigmas.tolist() == pytest.approx(published)
    longer = make_cell(pipe, Solver("AYS", BASELINES["DPM-Solver++(2M), AYS"]), 20, {}, call).scheduler.sigmas
    assert longer[::2].tolist() == pytest.approx(published)
    assert float(longer[1]) == pytest.approx((published[0] * published[1]) ** 0.5)
    shorter = make_cell(pipe, Solver("AYS", BASELINES["DPM-Solver++(2M), AYS"]), 5, {}, call).scheduler.sigmas
    assert shorter.tolist() == pytest.approx([*published[:-1:2], 0.0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layout": "packed"}, "layout='packed' is not that of StableDiffusionPipeline"),
        ({"latent_size": [64]}, r"latent_size=\[64\] must be height and width"),
    ],
)
def test_what_cannot_be_decoded_is_found_out_before_the_reference(
    changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "make_pairs", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(ValueError, match=said):
        run(config(tmp_path, metrics=["psnr"], solvers=["DDIM"], **changes))


def test_what_is_no_number_is_named_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = quality.sample
    monkeypatch.setattr(quality, "sample", lambda *a, **k: (broken(*a, **k)[0] * torch.nan, None))
    with pytest.raises(ValueError, match=r"DDIM, 2: latent_mse is no number on batch 1 of 4"):
        run(config(tmp_path, metrics=["latent_mse"], solvers=["DDIM"], gap_from=None))
    assert not [f for f in (tmp_path / "cache").glob("*/*/*.safetensors") if "pairs" not in f.parts]


def test_artefacts_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(LEARNED, tmp_path / name / "solvers")
    names = [str(tmp_path / name / "solvers") for name in ("a", "b")]
    shutil.copytree(LEARNED, tmp_path / "other")
    found = [solver.name for solver in find_solvers([*names, str(tmp_path / "other")])]
    assert found == [*(f"DyWeight, {name}" for name in names), "DyWeight, other"]


def test_no_classical_solver_wastes_its_last_evaluation() -> None:
    """A grid of spacing "leading" starts below all noise and ends with a step of next to nothing."""
    pipe, call = _inputs("StableDiffusionPipeline")
    pipe.scheduler = diffusers.PNDMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="leading", steps_offset=1, skip_prk_steps=True
    )
    for name in ("DDIM", "Euler", "DEIS", "DPM-Solver++(2M)", "UniPC", "iPNDM(2M)", "Adams(2M)"):
        times = make_cell(pipe, Solver(name, BASELINES[name]), 5, {}, call).scheduler.timesteps
        assert float(times[0]) > 990 and float(times[-1]) > 150, name


# ---------------------------------------------------------------------------------------------------------- reports


def test_every_number_has_its_interval_and_the_file_says_all(whole: Path) -> None:
    result = read_results(whole / "results.json")
    assert {"command", "versions", "device", "settings", "metrics", "reference", "notes", "rows"} <= result.keys()
    assert result["metrics"]["feature_distance"] == {"lower_is_better": True, "network": "encoder"}
    assert result["settings"]["samples"] == 7 and result["reference"]["steps"] == 6
    for row in result["rows"]:
        for name in SETTINGS["metrics"]:
            low, high = row["interval"][name]
            assert low < row[name] < high
    starts = {row["nfe"]: row for row in result["rows"] if row["solver"] == "DDIM"}
    for row in result["rows"]:
        assert ("gap_closed" in row) == (row["solver"] != "DDIM")
        for name, share in row.get("gap_closed", {}).items():
            assert share == pytest.approx(1 - row[name] / starts[row["nfe"]][name])


def test_the_table_says_what_the_file_says(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "table", str(whole / "results.json"), "--metrics", "latent_mse"]) == 0
    printed = capsys.readouterr().out
    assert "feature_distance" not in printed
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("| ")]
    header, *table_rows = lines[: 1 + 3]
    shown = {(r[0], column): cell for r in table_rows for column, cell in zip(header[1:], r[1:]) if cell}
    rows = {(r["solver"], f"{r['nfe']} NFE"): r for r in measured(whole)}
    assert shown.keys() == rows.keys()
    best = {n: min(r["latent_mse"] for r in rows.values() if r["nfe"] == n) for n in (2, 3)}
    for key, row in rows.items():
        value, bounds = shown[key].strip("*").split(" ", 1)
        low, high = row["interval"]["latent_mse"]
        assert float(value) == pytest.approx(row["latent_mse"], abs=0.06 * (high - low))
        if bounds.startswith("±"):
            assert float(bounds[1:]) == pytest.approx((high - low) / 2, rel=0.06)
        else:
            assert [*map(float, bounds.strip("()").split("-"))] == pytest.approx([low, high], abs=0.06 * (high - low))
        paired = row.get("paired", {}).get("latent_mse")  # of one that has no rival: none
        apart = paired is None or not paired["low"] <= 0 <= paired["high"]
        is_best = row["latent_mse"] == best[row["nfe"]]
        assert shown[key].startswith("**") == (is_best and apart) and shown[key].startswith("*") >= (not apart)
    header, *gaps = lines[4:]
    assert {r[0]: r[-1] for r in gaps}["Heun"] == f"{rows['Heun', '3 NFE']['gap_closed']['latent_mse']:.0%}"
    assert main(["bench", "table", str(whole / "results.json"), "--metrics", "latent_mse", "--no-intervals"]) == 0
    bare = capsys.readouterr().out
    assert "±" not in bare and all(value.strip("*").split(" ")[0] in bare for value in shown.values())


def test_numbers_are_shown_to_the_digits_that_are_certain() -> None:
    show = lambda value, low, high: number({"m": value, "interval": {"m": [low, high]}}, "m")  # noqa: E731
    assert show(0.062049, 0.0600, 0.0642) == "0.0620 ±0.0021"
    assert show(24.553, 24.1, 25.0) == "24.55 ±0.45" and show(123.4, 100.0, 150.0) == "123 ±25"
    assert show(0.0, 0.0, 0.0) == "0.0000 ±0.0000"
    assert show(0.0093, 0.0041, 0.0168) == "0.0093 (0.0041-0.0168)", "not symmetric"


def test_a_share_of_the_gap_is_measured_from_base_to_reference() -> None:
    clip = Metric("clip", lambda s: s.images, lower_is_better=False)
    rows = [{"solver": s, "nfe": n, "clip": v} for s, n, v in [("reference", 50, 30.0), ("A", 3, 20.0), ("B", 3, 27.5)]]
    assert with_gaps(rows, "A", [clip])[2]["gap_closed"] == {"clip": 0.75}
    paired = replace(clip, name="clip", lower_is_better=True, needs=("reference_latents",))
    assert with_gaps(rows, "A", [paired])[2]["gap_closed"] == {"clip": 1 - 27.5 / 20}
    assert "gap_closed" not in with_gaps([*rows, {"solver": "B", "nfe": 4, "clip": 28.0}], "A", [clip])[3]


def test_plots_and_sheets_are_drawn(whole: Path, tmp_path: Path) -> None:
    drawn = plots(read_results(whole / "results.json"), tmp_path / "pictures" / "q.png")
    assert [file.name for file in drawn] == ["q-latent_mse.png", "q-feature_distance.png"]
    run(
        config(
            whole, output=str(tmp_path / "sheet.json"), plot=str(tmp_path / "sheet.png"), picture_steps=[3], pictures=2
        )
    )
    with Image.open(tmp_path / "sheet-samples-3.png") as sheet:
        assert sheet.height > 5 * 128 > sheet.height - 128, "the reference, two solvers and their error maps"
        assert sheet.width > 2 * 128
    assert (tmp_path / "sheet-latent_mse.png").exists()


# ---------------------------------------------------------------------------------------------- commands, mistakes


def test_images_already_there_give_the_numbers_of_their_samples(tmp_path: Path) -> None:
    """Ten images and more: names without leading zeros must still meet their prompts."""
    pipe = load_pipeline(str(MODEL), device="cpu")
    inputs, seeds, call = [{"prompt": "lime, noto"}] * 12, range(12), {"height": 32, "width": 32, "guidance_scale": 1.0}
    with torch.no_grad():
        images = to_images(pipe, sample(pipe, pipe.scheduler, 2, inputs, seeds, call)[0])
    for folder, part in (("mine", images[:6]), ("theirs", images[6:])):
        (tmp_path / folder).mkdir()
        for i, image in enumerate(part):
            levels = (image * 255).round().byte().movedim(0, -1).numpy()
            Image.fromarray(levels).save(tmp_path / folder / f"{i + 6}.png")
    options = {"fid": {"reference": str(tmp_path / "theirs"), "features": "encoder"}}
    result = tmp_path / "fid.json"
    arguments = ["eval", "--images", str(tmp_path / "mine"), "--metrics", "fid", "--model", str(MODEL)]
    assert (
        main([*arguments, "--metric-options", json.dumps(options), "--output", str(result), "--batch-size", "4"]) == 0
    )
    (row,) = read_results(result)["rows"]
    metric = METRICS["fid"](pipe, **options["fid"])
    rows = metric.rows(Sample(images[:6]))
    assert row[metric.name] == pytest.approx(metric.value(rows), rel=1e-4) and row["samples"] == 6
    assert row["interval"][metric.name] == pytest.approx([*interval(metric, rows)], rel=1e-3)
    assert [f.name for f in find_images(str(tmp_path / "mine"))] == [f"{i}.png" for i in (6, 7, 8, 9, 10, 11)]


@pytest.mark.slow
def test_variants_of_the_call_are_compared_each_alone(whole: Path, tmp_path: Path) -> None:
    """Each has its own reference: what has the call of another run has its rows, and is shown as it is."""
    variants = {"as it is": {}, "with guidance 3": {"guidance_scale": 3.0}}
    results = run(
        config(tmp_path, variants=variants, plot=str(tmp_path / "pictures" / "results.png"), picture_steps=[2])
    )
    alone = by_variant(read_results(tmp_path / "results.json"))
    assert [*alone] == [*variants] and alone["as it is"]["rows"] == measured(whole)
    other = alone["with guidance 3"]["rows"]
    assert [row["solver"] for row in other] == [row["solver"] for row in measured(whole)]
    assert all(a["latent_mse"] != b["latent_mse"] for a, b in zip(other, measured(whole)))
    assert table(results) == "\n\n".join(f"### {name}\n\n{table(part)}" for name, part in alone.items())
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        f"results-{name}-{what}.png"
        for name in ("as-it-is", "with-guidance-3")
        for what in ("latent_mse", "feature_distance", "samples-2")
    }
    with pytest.raises(ValueError, match="must be arguments of the call by name"):
        config(tmp_path, variants={"a": 3})
    with pytest.raises(ValueError, match="no_such_argument"):
        run(config(tmp_path, variants={**variants, "b": {"no_such_argument": 1}}))


def test_a_solver_for_every_number_of_steps_says_which_it_was_not_learned_on(tmp_path: Path) -> None:
    own = DyWeightScheduler.from_config(load_pipeline(str(MODEL), device="cpu").scheduler.config)
    function = ContinuousTable.initial(2, {"name": "discrete", "sigma_min": 0.0, "sigma_max": 14.6})
    learned = own.with_continuous(replace(function, provenance={"held_out_error": {"3": {}}}))
    learned.save_pretrained(tmp_path / "any")
    run(config(tmp_path, samples=2, solvers=["DDIM", str(tmp_path / "any")], metrics=["latent_mse"]))
    by_cell = {(row["learned"], row["nfe"]): row for row in measured(tmp_path)}
    assert by_cell[True, 2]["held_out"] is True and by_cell[True, 3]["held_out"] is False
    assert "held_out" not in by_cell[False, 2]


def _wrong(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "torn" / "a.png")
    data = (tmp_path / "torn" / "a.png").read_bytes()
    (tmp_path / "torn" / "b.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "mixed").mkdir()
    for n in (8, 9):
        Image.new("RGB", (n, 8)).save(tmp_path / "mixed" / f"{n}.png")
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    (tmp_path / "typo.yaml").write_text("model: m\nstep: [3]\n")
    table = SolverTable(torch.ones(5, 1).double(), torch.ones(5).double(), {"name": "flow"})
    DyWeightScheduler(prediction_type="flow_prediction", tables={"5": table_to_json(table)}).save_pretrained(
        tmp_path / "flow"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--metrics", "latent_mze"], "Unknown metric 'latent_mze'; did you mean 'latent_mse'?"),
        (["--solvers", "DDMI"], "Unknown solver 'DDMI': did you mean 'ddim'?"),
        (["--solvers", "no/such/artefact"], "no/such/artefact"),
        (["--solvers", "NeuralSolver"], "none is published for networks whose noise starts at sigma 14.61"),
        (["--solvers", "DDIM", "--gap-from", "euler"], "gap_from='euler' is not among the solvers"),
        (["--solver", LEARNED, "--steps", "6"], "learned for [3, 4, 5, 7] steps. Drop it"),
        (["--solver", "flow"], "learned for Flow networks, and this one is of kind Velocity"),
        (["--prompts", "none.txt"], "there is no such file"),
        (["--prompts", "few.txt"], "has 2 prompts, samples=4 are needed: lower samples, or set repeat_prompts"),
        (["--steps", "3", "3"], "must name at least one, and each once"),
        (["--steps", "60"], "must lie between 1 and the reference's 50"),
        (["--samples", "1"], "samples=1 must be at least 2"),
        (["--metric-options", '{"psnr": {"net": 1}}', "--metrics", "psnr"], "psnr does not take ['net']"),
        (["--metric-options", '{"psrn": {}}'], "Unknown metric 'psrn'; did you mean 'psnr'?"),
        (["--config", "typo.yaml"], "unknown setting 'step'; did you mean 'steps'?"),
        (["--images", "nowhere"], "there is no such directory"),
        (["--images", "empty", "--metrics", "fid"], "holds 0 images, at least 2 are needed"),
        (["--images", "torn", "--metrics", "fid"], "b.png is not an image that can be read"),
        (["--images", "mixed", "--metrics", "fid"], "several sizes: 8 x 8 (8.png), 9 x 8 (9.png). Resize them"),
        (["--images", "mixed", "--batch-size", "1", "--metrics", "psnr"], "psnr needs ['reference_images']"),
    ],
)
def test_mistakes_are_found_before_anything_is_sampled(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("make_pairs", "evaluate", "measure"):
        monkeypatch.setattr(quality, name, lambda *args, **kwargs: pytest.fail("it began to compute"))
    _wrong(tmp_path)
    given = ["--model", str(MODEL), "--prompts", str(PROMPTS), "--samples", "4"]
    assert main(["eval", *(given if "--images" not in arguments else []), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_prompts_are_repeated_with_new_noise_if_asked(tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("lime, noto\nred heart, noto\n")
    changes: dict[str, Any] = {"prompts": str(tmp_path / "two.txt"), "samples": 4, "repeat_prompts": True}
    ready = task.prepare(config(tmp_path, **changes, solvers=["DDIM"], steps=[2], gap_from=None))
    assert [own["prompt"] for own in ready.inputs] == ["lime, noto", "red heart, noto"] * 2 and len({*ready.seeds}) == 4


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "quality").glob("*.yaml")), ids=lambda f: f.stem)
def test_the_shipped_settings_are_those_of_the_recorded_results(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = make_config({"config": str(file)}, QualityConfig)
    assert settings.gap_from in (None, *(solver.name for solver in find_solvers(settings.solvers)))
    pipeline, joined = Path(settings.model).name, not settings.output.startswith("docs/")
    # The three levers of both pipelines are in one file, see examples/studies/three_levers.py.
    results = read_results("docs/results/timelift.json" if joined else settings.output)
    made = results["settings"][pipeline] if joined else results["settings"]
    recorded = {name: made[name] for name in ("model", "prompts", "samples", "batch_size")}
    assert recorded == {name: getattr(settings, name) for name in recorded}
    rows = [row for row in results["rows"] if row.get("pipeline", pipeline) == pipeline]
    assert {row["nfe"] for row in rows} >= {*settings.steps}


def test_the_command_end_to_end(tmp_path: Path) -> None:
    """What the page on evaluation types, in its own process; like COCO's, the reference's images differ in size."""
    (tmp_path / "val2014").mkdir()
    for i in range(4):
        levels = np.random.RandomState(i).randint(0, 256, (40 + 9 * i, 70, 3), dtype=np.uint8)
        Image.fromarray(levels).save(tmp_path / "val2014" / f"{i}.jpg")
    options = {"kid": {"reference": "val2014", "size": 64, "features": "encoder"}}  # Inception's weights are not here
    arguments = ["eval", "--model", str(MODEL), "--solver", "ddim", LEARNED, "--steps", "3", "--samples", "3"]
    arguments += ["--prompts", str(PROMPTS), "--guidance-scale", "1", "--teacher-steps", "4"]
    arguments += ["--metrics", "kid", "latent_mse", "--metric-options", json.dumps(options)]
    done = subprocess.run(
        [sys.executable, "-m", "dywspan.cli", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = read_results(tmp_path / "evaluation.json")
    assert table(result) in done.stdout and re.search(r"DyWeight \(learned\)", done.stdout)
    assert result["settings"]["call"] == {"guidance_scale": 1.0}
    assert result["metrics"]["kd_encoder"]["reference"] == "4 images of val2014, 64 x 64"
    assert all(row["interval"]["kd_encoder"][0] < row["kd_encoder"] for row in result["rows"] if row["nfe"] == 3)
