"""The artefact: a page of JSON that survives every trip, and that says what is wrong with it when damaged."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dywspan
from dywspan import DyWeightScheduler, SolverTable
from dywspan.artifact import (
    compact,
    read_continuous,
    read_lifts,
    release,
    table_from_json,
    table_to_json,
    warn_if_newer,
)

ROOT = Path(__file__).parents[1]
NAME = "scheduler_config.json"
GRID = {"name": "polynomial", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}


def table(n: int, order: int, seed: int = 0, afs: bool = False) -> SolverTable:
    """Random numbers of every size, with rows that keep the levels positive."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(n, order, generator=generator, dtype=torch.float64)
    weights *= torch.ones(n, order).tril()
    weights[:, 0] += 1 - weights.sum(1)
    scale = torch.rand(n, generator=generator, dtype=torch.float64) + 0.5
    return SolverTable(weights, scale, GRID, afs, {"base": "some/model", "note": "[1-5] é 漢", "loss": 1e-300})


def same(a: SolverTable, b: SolverTable) -> bool:
    numbers = torch.equal(a.weights, b.weights) and torch.equal(a.time_scale, b.time_scale)
    return numbers and a.grid == b.grid and a.afs is b.afs and a.provenance == b.provenance


# ------------------------------------------------------------------ round trips

doubles = st.floats(-1e6, 1e6)
positive = st.floats(min_value=5e-324, max_value=1e6)


@given(st.data())
def test_every_double_survives(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 6))
    order = data.draw(st.integers(1, n))
    rows = [data.draw(st.lists(doubles, min_size=min(i + 1, order), max_size=min(i + 1, order))) for i in range(n)]
    weights = torch.tensor([row + [0.0] * (order - len(row)) for row in rows], dtype=torch.float64)
    scale = torch.tensor(data.draw(st.lists(positive, min_size=n, max_size=n)), dtype=torch.float64)
    source = SolverTable(weights, scale, GRID, data.draw(st.booleans()))
    text = compact(json.dumps(table_to_json(source), indent=2))
    back = table_from_json(json.loads(text))
    assert same(back, source)
    assert str(back.weights.tolist()) == str(source.weights.tolist())  # the sign of zero too


def test_save_and_load(tmp_path: Path) -> None:
    tables = [table(3, 2), table(5, 3, 1), table(9, 9, 2), table(12, 1, 3), table(7, 3, 4, afs=True)]
    made = DyWeightScheduler(beta_schedule="scaled_linear").with_tables(tables)
    assert sorted(made.tables) == [3, 5, 6, 9, 12]  # with AFS, 7 steps are 6 evaluations
    made.save_pretrained(tmp_path)
    loaded = DyWeightScheduler.from_pretrained(tmp_path)
    assert loaded.tables.keys() == made.tables.keys()
    assert all(same(loaded.tables[n], made.tables[n]) for n in made.tables)
    assert loaded.config["beta_schedule"] == "scaled_linear"
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / NAME).read_bytes() == (tmp_path / NAME).read_bytes()


def test_runs_the_same_after_loading(tmp_path: Path, network: Any) -> None:
    made = DyWeightScheduler().with_tables([table(5, 3)])
    made.save_pretrained(tmp_path)
    loaded = DyWeightScheduler.from_pretrained(tmp_path)
    copied = copy.deepcopy(loaded)
    pickled = pickle.loads(pickle.dumps(loaded))
    noise = torch.randn(2, 4, 4, 4)
    results = [sample(s, noise, network) for s in (made, loaded, copied, pickled)]
    assert float(results[0].std()) > 0.01
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_a_copy_in_the_middle_of_a_run_does_not_disturb_it(network: Any) -> None:
    scheduler = DyWeightScheduler().with_tables([table(5, 3)])
    noise = torch.randn(1, 4, 4, 4)
    expected = sample(scheduler, noise, network)
    scheduler.set_timesteps(5)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        other = pickle.loads(pickle.dumps(copy.deepcopy(scheduler)))
        other.step(network(x, t), other.timesteps[0], x)
        x = scheduler.step(network(x, t), t, x).prev_sample
    assert torch.equal(x, expected)
    assert torch.equal(sample(other, noise, network), expected)


def sample(scheduler: DyWeightScheduler, noise: torch.Tensor, network: Any, n: int = 5) -> torch.Tensor:
    scheduler.set_timesteps(n)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x


# ------------------------------------------------------------------ a page a person can read


def test_one_row_of_the_table_is_one_line(tmp_path: Path) -> None:
    source = table(4, 3)
    DyWeightScheduler().with_tables([source]).save_pretrained(tmp_path)
    lines = [line.strip().rstrip(",") for line in (tmp_path / NAME).read_text().splitlines()]
    for i in range(4):
        assert json.dumps(source.weights[i, : i + 1].tolist()) in lines
    assert f'"time_scale": {json.dumps(source.time_scale.tolist())}' in lines
    assert len(lines) < 60


def test_other_values_of_the_configuration_survive(tmp_path: Path) -> None:
    """What a pipeline's scheduler brings along: infinities, empty lists, texts that look like lists."""
    hidden = {
        "_class_name": "DPMSolverMultistepScheduler",
        "lambda_min_clipped": -math.inf,
        "ceiling": [math.inf, 1.0],
        "prompt": "a [1,  2] b [e] [-] \n[1,\n 2]",
        "empty": [],
        "texts": ["[0,  1]"],
    }
    made = DyWeightScheduler.from_config(hidden).with_tables([table(3, 2)])
    made.save_pretrained(tmp_path)
    loaded = DyWeightScheduler.from_pretrained(tmp_path)
    for key in hidden.keys() - {"_class_name"}:
        assert loaded.config[key] == hidden[key], key
    assert loaded.config["host_scheduler"] == "DPMSolverMultistepScheduler"


# ------------------------------------------------------------------ versions


def test_a_newer_file_says_upgrade() -> None:
    data = table_to_json(table(3, 2))
    with pytest.warns(UserWarning, match=r"\['gain'\].*pip install -U dywspan"):
        read = table_from_json({**data, "gain": [1.0, 1.0, 1.0]})
    assert same(read, table(3, 2))
    with pytest.warns(UserWarning, match=r"dywspan 99\.0, newer than the installed .*pip install -U dywspan"):
        DyWeightScheduler(dywspan_version="99.0", tables={"3": data})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version in ("0.0.1", dywspan.__version__):
            DyWeightScheduler(dywspan_version=version, tables={"3": data})


# ------------------------------------------------------------------ damage


def _damage(path: str, value: Any) -> Any:
    """A change of one entry of the table's JSON: "weights.1.0" = value."""

    def change(data: dict[str, Any]) -> None:
        *parents, last = (int(p) if p.isdigit() else p for p in path.split("."))
        node: Any = data
        for p in parents:
            node = node[p]
        if value is _REMOVED:
            del node[last]
        else:
            node[last] = value

    return change


_REMOVED = object()
DAMAGE = {
    "weights nan": ("weights.1.0", math.nan, "weights must be finite"),
    "weights inf": ("weights.2.1", -math.inf, "weights must be finite"),
    "weights text": ("weights.1.0", "1.5", "numbers only"),
    "weights null": ("weights.1.0", None, "numbers only"),
    "weights true": ("weights.1.0", True, "numbers only"),
    "weights huge": ("weights.1.0", 10**400, "too large"),
    "weights large": ("weights.1.0", 1e7, r"weights must be at most 1e\+06 in size"),
    "weights many": ("weights", [[1.0]] * 1001, "number of weights rows=1001 must be a whole number from 1 to 1000"),
    "scale large": ("time_scale.1", 1e7, r"time_scale must be at most 1e\+06"),
    "scale huge": ("time_scale.1", 10**400, "time_scale holds a number that is too large"),
    "weights flat": ("weights", [1.0, 2.0, 3.0], "non-empty list of non-empty rows"),
    "weights none": ("weights", [], "non-empty list of non-empty rows"),
    "weights missing": ("weights", _REMOVED, "at least 'weights' and 'grid'"),
    "row long": ("weights.0", [1.0, 0.0], r"weights row 0 must have 1 numbers \(K = 2\); it has 2"),
    "row short": ("weights.2", [1.0], "weights row 2 must have 2 numbers"),
    "scale negative": ("time_scale.1", -1.0, "time_scale must be positive"),
    "scale zero": ("time_scale.1", 0, "time_scale must be positive"),
    "scale nan": ("time_scale.0", math.nan, "time_scale must be finite"),
    "scale short": ("time_scale", [1.0, 1.0], r"one entry per step \(3\)"),
    "scale none": ("time_scale", [], r"one entry per step \(3\)"),
    "scale number": ("time_scale", 1.0, "numbers only"),
    "grid missing": ("grid", _REMOVED, "at least 'weights' and 'grid'"),
    "grid unknown": ("grid.name", "zigzag", "Unknown grid 'zigzag'"),
    "grid text": ("grid", "polynomial", "A grid is a mapping"),
    "grid parameter": ("grid.bend", 3.0, r"no parameter \['bend'\]"),
    "grid parameter missing": ("grid.sigma_max", _REMOVED, "sigma_max"),
    "grid parameter text": ("grid.sigma_max", "80", "Grid 'polynomial'"),
    "grid rho": ("grid.rho", 0, "Grid 'polynomial'"),
    "grid upside down": ("grid.sigma_max", 1e-4, "sigma_min=0.002 must be less than sigma_max=0.0001"),
    "grid misspelt": ("grid.rohs", 7.0, r"no parameter \['rohs'\]"),
    "grid two ways": ("grid.sigmas", [3.0, 2.0, 1.0, 0.0], "no other keys"),
    "grid below zero": ("grid", {"sigmas": [3.0, 2.0, 1.0, -1.0]}, "at 0 or above"),
    "grid short": ("grid", {"sigmas": [3.0, 2.0, 1.0]}, "3 steps has 4 levels"),
    "grid repeats": ("grid", {"sigmas": [3.0, 2.0, 2.0, 0.0]}, "decreasing"),
    "provenance text": ("provenance", "mine", "provenance must be a mapping"),
    "afs text": ("afs", "false", "afs must be true or false"),
    "afs key": ("afs", True, "holds a table for 2 network evaluations"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_table_is_named_when_loaded(tmp_path: Path, name: str) -> None:
    path, value, message = DAMAGE[name]
    DyWeightScheduler().with_tables([table(3, 2), table(4, 2)]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / NAME).read_text())
    _damage(path, value)(config["tables"]["3"])
    (tmp_path / NAME).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f'(?s)Damaged solver table "3": .*{message}'):
        DyWeightScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dywspan_version": 5}, "dywspan_version=5 must be a text"),
        ({"solver_order": 1.5}, "solver_order=1.5 must be a whole number"),
        ({"host_scheduler": "UNet2DModel"}, "'UNet2DModel' is not one of the schedulers"),
        ({"host_scheduler": "StableDiffusionPipeline"}, "'StableDiffusionPipeline' is not one of the schedulers"),
        ({"host_scheduler": "VaeImageProcessor"}, "'VaeImageProcessor' is not one of the schedulers"),
        ({"host_scheduler": ["DDIMScheduler"]}, r"\['DDIMScheduler'\] is not one of the schedulers"),
    ],
)
def test_other_damage_is_named_too(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DyWeightScheduler(**settings).set_timesteps(3)


@pytest.mark.parametrize("spacing", [{}, {"timestep_spacing": "trailing"}])
def test_a_configuration_of_an_older_release_has_its_classes_defaults(spacing: dict[str, Any], tmp_path: Path) -> None:
    """Not ours: a file without a key means what its class takes for it."""
    old = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_start": 0.0015, **spacing}
    (tmp_path / NAME).write_text(json.dumps(old))
    theirs = diffusers.DDPMScheduler.from_pretrained(tmp_path)
    theirs.set_timesteps(5)
    for ours in (
        DyWeightScheduler.from_pretrained(tmp_path, solver="euler"),
        DyWeightScheduler.from_config(theirs.config, solver="euler"),
    ):
        ours.set_timesteps(5)
        assert ours.timesteps.tolist() == pytest.approx(theirs.timesteps.tolist(), abs=1e-6)


@pytest.mark.parametrize("tables", [[1, 2], "5", 3])
def test_tables_of_another_kind(tables: Any) -> None:
    with pytest.raises(ValueError, match="tables must map numbers of steps to tables"):
        DyWeightScheduler(tables=tables)


@pytest.mark.parametrize("key", ["4", "03", "three", "", "9" * 5000, None, True, 3.0], ids=lambda k: str(k)[:9])
def test_a_table_under_the_wrong_key(key: Any) -> None:
    with pytest.raises(ValueError, match=r'Damaged solver table ".{0,90}": it holds a table for 3 network evaluations'):
        DyWeightScheduler(tables={key: table_to_json(table(3, 2))})


ENTRY = {"alpha": [1.0, 1.0], "beta": [0.5, 0.5]}


@pytest.mark.parametrize(
    ("key", "entry", "said"),
    [
        ("2", {**ENTRY, "alpha": [10**400, 1.0]}, "alpha holds a number that is too large"),
        ("2", {**ENTRY, "beta": [math.nan, 1.0]}, "alpha and beta must be finite"),
        ("2", {**ENTRY, "beta": [1e7, 1.0]}, r"beta must be at most 1e\+06"),
        ("2", {**ENTRY, "beta": [True, 1.0]}, "beta must hold numbers only"),
        ("2", {**ENTRY, "beta": {"0": 1.0}}, "beta must hold numbers only"),
        ("2", {"alpha": [1.0, 1.0]}, "at least 'alpha' and 'beta'"),
        ("2", [1.0, 1.0], "it is a mapping"),
        ("2", {**ENTRY, "operator": 3}, "operator=3 must be 1 to 64 letters"),
        ("2", {**ENTRY, "provenance": 0}, "provenance must be a mapping; got 0"),
        *((key, ENTRY, "the key must be a number of steps from 1 to 1000") for key in ("0", "-2", "02", "1001", "two")),
        ("9" * 5000, ENTRY, "the key must be a number of steps"),
        (None, ENTRY, "the key must be a number of steps"),
        (True, ENTRY, "the key must be a number of steps"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_a_damaged_lift_is_named(key: Any, entry: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f'(?s)Damaged SpanLift entry ".{{1,90}}": .*{said}') as caught:
        read_lifts({key: entry})
    assert len(str(caught.value)) < 400


def test_keys_that_are_dropped_are_said() -> None:
    with pytest.warns(UserWarning, match=r"SpanLift entry has keys .* \['operatr'\]"):
        read_lifts({"2": {**ENTRY, "operatr": "a"}})
    continuous = {"coefficients": [[0.0] * 8] * 3, "grid": GRID, "horizn": 20.0}
    with pytest.warns(UserWarning, match=r"Continuous table has keys .* \['horizn'\]"):
        read_continuous(continuous)


def test_provenance_is_free_json() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"": [deep, None, True, math.inf, 10**400]}
    assert table_from_json({**table_to_json(table(3, 2)), "provenance": deep}).provenance == deep
    assert read_lifts({"2": {**ENTRY, "provenance": deep}})[2].provenance == deep
    assert read_lifts({"2": {**ENTRY, "provenance": None}})[2].provenance == {}


@pytest.mark.parametrize("version", ["", "abc", "v1.0", "9" * 10_000, "1." * 40 + "0", 5, ["1.0"], {}, True], ids=str)
def test_what_is_no_version_is_said(version: Any) -> None:
    with pytest.raises(ValueError, match=r"(?s)dywspan_version=.{1,90} must be a text such as '") as caught:
        warn_if_newer(version)
    assert len(str(caught.value)) < 200


def test_versions_of_every_form() -> None:
    forms = {"1.2.3": (1, 2, 3), "0.43.0.dev0": (0, 43, 0), "1.0rc1": (1, 0), "2": (2,), "0.2+local.5": (0, 2)}
    assert {version: release(version) for version in forms} == forms
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_newer(None)
        warn_if_newer("0.0.1.dev0")
    with pytest.warns(UserWarning, match=r"written by dywspan 999999\.0rc1, newer"):
        warn_if_newer("999999.0rc1")


@pytest.mark.parametrize("keep", [0, 1, 100, -3])
def test_a_truncated_file(tmp_path: Path, keep: int) -> None:
    DyWeightScheduler().with_tables([table(3, 2)]).save_pretrained(tmp_path)
    text = (tmp_path / NAME).read_text()
    (tmp_path / NAME).write_text(text[:keep])
    with pytest.raises(OSError, match=f"{NAME}' is not a valid JSON file"):
        DyWeightScheduler.from_pretrained(tmp_path)


def test_levels_that_become_negative_are_refused_before_sampling() -> None:
    """Only the network's own schedule tells the levels, so this shows in set_timesteps."""
    overshoot = SolverTable(
        torch.tensor([[1.0], [2.0], [1.0]]).double(), torch.ones(3).double(), {"sigmas": [3, 2, 0.5, 0]}
    )
    scheduler = DyWeightScheduler().with_tables([overshoot])  # sigma~_2 = 2 + 2 (0.5 - 2) = -1
    with pytest.raises(
        ValueError, match=r"table for num_inference_steps=3 .*\[3\.0, 2\.0, -1\.0\]; all must be positive"
    ):
        scheduler.set_timesteps(3)


# ------------------------------------------------------------------ atomic writing


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = DyWeightScheduler().with_tables([table(3, 2)])
    old.save_pretrained(tmp_path)
    before = (tmp_path / NAME).read_bytes()
    new = DyWeightScheduler().with_tables([table(4, 2)])

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            new.save_pretrained(tmp_path)
    assert (tmp_path / NAME).read_bytes() == before
    assert os.listdir(tmp_path) == [NAME]

    unwritable = DyWeightScheduler.from_config({"thing": torch.float32, "host_scheduler": "DDIMScheduler"})
    with pytest.raises(TypeError, match="not JSON serializable"):
        unwritable.save_pretrained(tmp_path)
    assert (tmp_path / NAME).read_bytes() == before
    assert os.listdir(tmp_path) == [NAME]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    """The process dies between writing and renaming."""
    DyWeightScheduler().with_tables([table(3, 2)]).save_pretrained(tmp_path)
    before = (tmp_path / NAME).read_bytes()
    code = "import os, dywspan; os.replace = lambda *_: os._exit(9); dywspan.DyWeightScheduler().save_pretrained('.')"
    assert _python(code, tmp_path).returncode == 9
    assert (tmp_path / NAME).read_bytes() == before
    assert DyWeightScheduler.from_pretrained(tmp_path).tables.keys() == {3}


# ------------------------------------------------------------------ inside a saved pipeline


def _python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


RUN = """
import torch
from diffusers import StableDiffusionPipeline
torch.set_num_threads(1)
pipe = StableDiffusionPipeline.from_pretrained("pipe", text_encoder=None, tokenizer=None)
pipe.set_progress_bar_config(disable=True)
embeds = torch.linspace(-1, 1, 2 * 77 * pipe.unet.config.cross_attention_dim).reshape(2, 77, -1)
latents = pipe(prompt_embeds=embeds[:1], negative_prompt_embeds=embeds[1:], num_inference_steps=3, guidance_scale=2.0,
               generator=torch.Generator().manual_seed(0), output_type="latent").images
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with "pipe", saved with a learned solver inside, and the latents it makes in this process."""
    from diffusers import StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("saved")
    pipe = StableDiffusionPipeline.from_pretrained(
        ROOT / "examples" / "emoji-sd", text_encoder=None, tokenizer=None, safety_checker=None
    )
    learned = table(3, 2)
    grid = {"name": "discrete", "sigma_min": 0.03, "sigma_max": 14.0}
    learned = SolverTable(learned.weights, learned.time_scale, grid)
    pipe.scheduler = DyWeightScheduler.from_config(pipe.scheduler.config).with_tables([learned])
    pipe.save_pretrained(folder / "pipe")
    scope: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pipe.set_progress_bar_config(disable=True)
        exec(
            RUN.replace('StableDiffusionPipeline.from_pretrained("pipe", text_encoder=None, tokenizer=None)', "PIPE"),
            {"PIPE": pipe},
            scope,
        )
    torch.save(scope["latents"], folder / "latents.pt")
    return folder


def test_pipeline_records_the_package(saved: Path) -> None:
    index = json.loads((saved / "pipe" / "model_index.json").read_text())
    assert index["scheduler"] == ["dywspan", "DyWeightScheduler"]


@pytest.mark.slow
def test_saved_pipeline_in_a_fresh_process(saved: Path) -> None:
    done = _python("import dywspan\n" + RUN + "torch.save(latents, 'again.pt')\nprint(type(pipe.scheduler))", saved)
    assert done.returncode == 0, done.stderr
    assert "dywspan.DyWeightScheduler" in done.stdout
    expected = torch.load(saved / "latents.pt")
    assert float(expected.std()) > 0.01
    assert torch.equal(torch.load(saved / "again.pt"), expected)


@pytest.mark.slow
def test_saved_pipeline_without_the_import(saved: Path) -> None:
    """diffusers imports no foreign package by itself (since 0.41): the reader is told to ``import dywspan``."""
    done = _python(RUN, saved)
    if release(diffusers.__version__) < (0, 41):
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0 and "import dywspan" in done.stderr.splitlines()[-1]
