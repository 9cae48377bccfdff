"""The command line itself: what it imports, how it helps, and the commands that learn nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import dywspan
import dywspan.distill
from dywspan import DyWeightScheduler, SolverTable, names, shipped
from dywspan.app.config import CompareConfig
from dywspan.cli import main
from dywspan.commands import BENCH, COMMANDS, doctor
from dywspan.commands.app import APP
from dywspan.commands.learn import DISTILL, TUNE
from dywspan.commands.measure import EVALUATE
from dywspan.core.layout import LAYOUTS
from dywspan.distill.config import DistillConfig
from dywspan.distill.losses import LATENT
from dywspan.evaluate.baselines import BASELINES
from dywspan.evaluate.config import QualityConfig
from dywspan.evaluate.metrics import METRICS
from dywspan.pipelines.features import FEATURES
from dywspan.schedulers.apply import KINDS
from dywspan.settings import Groups
from dywspan.tuning.config import TuneConfig

ROOT = Path(__file__).parent.parent
ALL = {(name,): record for name, record in COMMANDS.items()}
ALL |= {("bench", name): record for name, record in BENCH.items()}
GRID = {"name": "flow", "shift": 3.0}

# ------------------------------------------------------------------------------------------------------------- imports

QUICK = [["--help"], ["--version"], ["bench", "--help"], ["list"], ["nonsense"]]
QUICK += [[name, "--help"] for name in COMMANDS if name != "bench"]


def test_helps_versions_and_lists_import_no_torch() -> None:
    script = f"""
import sys
from dywspan.cli import main
for arguments in {QUICK}:
    try:
        main(arguments)
    except SystemExit:
        pass
    heavy = {{"torch", "diffusers", "transformers", "numpy"}} & {{*sys.modules}}
    assert not heavy, (arguments, heavy)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"dywspan {dywspan.__version__}" in done.stdout and "| examples/emoji-sd-solvers " in done.stdout


@pytest.mark.parametrize("package", [dywspan, dywspan.distill], ids=lambda package: package.__name__)
def test_type_checkers_see_the_names_that_are_imported_late(package: Any) -> None:
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (seen,) = (node for node in tree.body if isinstance(node, ast.If))
    late = {a.name: node for node in seen.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert late.keys() == {*package.__all__} - {"__version__"} and {*package.__all__} <= {*dir(package)}
    for name, node in late.items():
        home = f"{package.__name__}.{node.module}" if node.level == 1 else node.module
        assert getattr(package, name) is getattr(sys.modules[home], name)


def test_a_name_that_is_not_there_is_said_as_of_any_module() -> None:
    with pytest.raises(AttributeError, match="module 'dywspan' has no attribute 'SpanLifScheduler'"):
        dywspan.SpanLifScheduler  # noqa: B018 # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ImportError, match="cannot import name 'nothing' from 'dywspan'"):
        from dywspan import nothing  # noqa: F401 # pyright: ignore[reportAttributeAccessIssue]


# ---------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_explains_itself(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and shown.startswith(f"usage: dywspan {' '.join(words)} ")
    assert ALL[words].help[1:] in " ".join(shown.split())
    # Defaults that say nothing are left out.
    assert "default: None" not in shown and "default: False" not in shown and "default: [" not in shown


GROUPED: dict[str, tuple[Groups, type]] = {
    "distill": (DISTILL, DistillConfig),
    "tune": (TUNE, TuneConfig),
    "eval": (EVALUATE, QualityConfig),
    "app": (APP, CompareConfig),
}


@pytest.mark.parametrize("command", GROUPED)
def test_every_setting_is_in_a_group_and_rare_ones_are_under_help_advanced(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    groups, kind = GROUPED[command]
    common, rare = ([name for group in groups.values() for name in group[i].split()] for i in (0, 1))
    assert sorted(common + rare) == sorted(f.name for f in fields(kind)), "each once"
    found = []
    for option in ("--help", "--help-advanced"):
        with pytest.raises(SystemExit):
            main([command, option])
        found.append({*re.findall(r"^  --([a-z-]+)", capsys.readouterr().out, re.M)})
    short, long = ({name.replace("-", "_") for name in shown} for shown in found)
    assert {*common} <= short and not {*rare} & short and {*common, *rare} <= long


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["distill", "--stepz", "3"], "unrecognized arguments: --stepz 3; did you mean --steps?"),
        (["push", "here", "me/there", "--privat3"], "unrecognized arguments: --privat3; did you mean --private?"),
        (["tune", "model", "--steps", "few"], "argument --steps: invalid int value: 'few'"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    usage, error = capsys.readouterr().err.strip().rsplit("\n", 1)
    assert end.value.code == 2 and said in error and usage.startswith(f"usage: dywspan {arguments[0]} ")


class Mistake(Exception):
    """A mistake in the program, not one that a user can mend."""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("a\n  long\n\nstory"), 2, "dywspan: a long story\n"),
        (OSError(), 2, "dywspan: OSError\n"),
        (torch.OutOfMemoryError("no room"), 2, "dywspan: no room\n"),
        (KeyboardInterrupt(), 130, "dywspan: interrupted\n"),
        (
            ModuleNotFoundError("No module named 'yaml'"),
            2,
            "dywspan: No module named 'yaml'. This command needs more packages: pip install 'dywspan[train,eval]'; "
            "`dywspan doctor` lists them\n",
        ),
        (ModuleNotFoundError("FID needs x: pip install x."), 2, "dywspan: FID needs x: pip install x.\n"),
    ],
)
def test_errors_are_one_line(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "doctor", lambda _: (_ for _ in ()).throw(error))
    assert main(["doctor"]) == code
    assert capsys.readouterr().err == said


def test_mistakes_in_the_program_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "doctor", lambda _: (_ for _ in ()).throw(Mistake()))
    with pytest.raises(Mistake):
        main(["doctor"])


# ----------------------------------------------------------------------------------------------------------- artefacts


def solver(provenance: dict[str, Any] | None = None) -> DyWeightScheduler:
    table = SolverTable(torch.tensor([[1.0, 0.0], [1.5, -0.5]]), torch.ones(2), GRID, provenance=provenance or {})
    return DyWeightScheduler(prediction_type="flow_prediction").with_tables([table])


RUN: dict[str, Any] = {
    "base_model": "org/model",
    "pipeline": "FluxPipeline",
    "call": {"height": 64},
    "loss": "latent_mse",
    "learning": {"optimizer": "adam", "updates": 30, "batch_size": 4},
    "pairs": {"train": 120, "held_out": 8},
    "teacher": {"scheduler": "DyWeightScheduler", "solver": "ipndm", "steps": 20},
    "held_out_error": {"before": 0.25, "after": 0.125},
}


def test_inspect_begins_with_what_it_is_for_and_how_it_was_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    solver(RUN).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    kind, *lines = capsys.readouterr().out.splitlines()
    facts = [line.strip() for line in lines[: lines.index("")]]
    assert kind == "DyWeightScheduler" and facts == [
        "for         2 steps",
        "model       org/model",
        "FluxPipeline",
        "called with height=64",
        "network     flow_prediction; replaces a FlowMatchEulerDiscreteScheduler",
        "learned by  adam, 30 updates of 4 pairs, 120 pairs in all, loss latent_mse, teacher ipndm with 20 steps",
    ]
    (row,) = (line for line in lines if line.startswith("| 2 "))
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["2", "0.25", "0.125", "latent_mse", "120"]
    assert not any("sigma~" in line for line in lines), "that is under --full"


@pytest.mark.parametrize(
    ("provenance", "said"),
    [({}, "learned by  not said"), ({"source": "cifar10.pkl"}, "learned by  nothing: taken from cifar10.pkl")],
)
def test_inspect_says_what_an_artefact_does_not(
    provenance: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    solver(provenance).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert said in capsys.readouterr().out


def test_inspect_of_a_damaged_provenance_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solver({**RUN, "learning": "by heart"}).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 2
    assert f"{tmp_path}: the record of how it was learned is damaged" in capsys.readouterr().err


def listed(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, list[str]], str]:
    """The lines of ``dywspan list`` by artefact, and what it says besides."""
    shown = capsys.readouterr()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.out.splitlines() if "| " in line]
    return {name: rest for name, *rest in rows[1:]}, shown.err


def test_list_finds_what_ships_and_what_lies_in_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    solver(RUN).save_pretrained("runs/deep/flow")
    solver().save_pretrained("runs/deep/flow/.spare")
    solver().save_pretrained("elsewhere")
    for name, text in (("damaged", "{"), ("odd", '{"_class_name": "DyWeightScheduler", "tables": 3}'), ("other", "{}")):
        Path(name).mkdir()
        Path(name, "scheduler_config.json").write_text(text, encoding="utf-8")
    assert main(["list", "runs", "elsewhere", "damaged", "odd", "other", "runs/deep"]) == 0
    found, said = listed(capsys)
    own = {name: rest for name, rest in found.items() if "examples" not in name}
    assert own == {
        "runs/deep/flow": ["DyWeightScheduler", "org/model", "2 steps"],
        "elsewhere": ["DyWeightScheduler", "not said", "2 steps"],
    }
    assert re.findall(r"dywspan: \S*?(\w+)/scheduler_config.json cannot be read", said) == ["damaged", "odd"]
    examples = {Path(name).name: rest for name, rest in found.items() if "examples" in name}
    shipped = {p.parent.name for p in (ROOT / "examples").rglob("scheduler_config.json")}
    assert examples.keys() == shipped - {"scheduler"}, "those of pipelines are no solvers"
    assert examples["emoji-sd-spanlift"] == ["SpanLiftScheduler", "examples/emoji-sd", "1, 2, 3, 4, 5, 7 steps"]
    assert examples["emoji-flow-timelift"][2].endswith("9 steps, TimeLift for 1, 2, 3, 4, 5, 7")
    assert examples["emoji-sd-any-lift"][2] == "any number of steps"


def test_help_names_what_the_registries_have() -> None:
    assert {*names.LAYOUTS} == {*LAYOUTS} and {*names.FEATURES} == {*FEATURES} and {*names.LOSSES} == {*LATENT}
    assert (*BASELINES,) == names.BASELINES and (*METRICS,) == names.METRICS


def test_demo_shows_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for default in ("examples/emoji-sd", "4", "24", "demo/demo.json", "latent_rmse feature_distance"):
        assert f"(default: {default})" in shown
    assert "those that ship with the model)" in shown and "default: 1000" not in shown


def test_list_knows_every_class_of_artefact() -> None:
    assert shipped._PARTS.keys() == KINDS.keys()


# -------------------------------------------------------------------------------------------------------------- doctor


def test_doctor_says_what_runs_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name in ("timm", "lpips") else real(name) or "1.0")
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"^torch +{re.escape(real('torch') or '')}$", shown, re.M)
    assert re.search(r"^cpu +\d+ cores", shown, re.M)
    assert re.search(r"^\| timm +\| missing +\| features", shown, re.M)
    assert re.search(r"^\| distill --features timm:NAME +\| no: pip install timm +\|$", shown, re.M)
    assert re.search(r"^\| eval --metrics lpips.*\| no: pip install lpips +\|$", shown, re.M)
    assert re.search(r"^\| tune +\| yes +\|$", shown, re.M)


def test_doctor_knows_the_packages_of_all_extras() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = "".join(re.findall(r"^(?:train|features|eval|app) = \[(.*?)\]\n", text, re.M | re.S))
    packages = {*re.findall(r'"([\w-]+)[^"]*"', re.sub(r'"dywspan\[\w+\]"', "", extras))}
    assert len(packages) > 10 and packages == doctor.OPTIONAL.keys()
    needed = re.findall(r"^dependencies = \[(.*?)\]", text, re.M)[0]
    assert {*re.findall(r'"(\w+)', needed)} == {*doctor.NEEDED}
    assert {name for use in doctor.USES for name in use.packages} == {*doctor.OPTIONAL}
