"""Solvers learned apart, in one artefact."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dywspan
from dywspan import DyWeightScheduler, SolverTable, SpanLiftScheduler
from dywspan.cli import main
from dywspan.core.continuous import ContinuousLift, ContinuousTable
from dywspan.core.operator import Lift
from dywspan.distill.merge import merge_artefacts
from dywspan.distill.output import SPARE
from dywspan.schedulers.merge import merge

GRID = {"name": "flow", "shift": 3.0}
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction"}
SIZE = {"kind": "spatial", "channels": 2, "order": 2, "width": 4}
MADE = {"base_model": "org/model", "call": {"guidance_scale": 4.0}, "pipeline": "StableDiffusion3Pipeline"}


def table(n: int, weight: float = 1.0, **provenance: Any) -> SolverTable:
    own = MADE | {"held_out_error": {"before": 0.5, "after": 0.25}} | provenance
    return SolverTable(torch.full((n, 1), weight).double(), torch.ones(n).double(), GRID, provenance=own)


def dyweight(*tables: SolverTable, **settings: Any) -> DyWeightScheduler:
    return DyWeightScheduler(**{**FLOW, **settings}).with_tables(tables)


def spanlift(*counts: int, seed: int = 0, beta: float = 0.5, continuous: bool = False, **settings: Any) -> Any:
    scheduler: Any = SpanLiftScheduler(
        **{
            **FLOW,
            "solver": "euler",
            "operator": {"kind": "spatial", "channels": 2, "order": 2, "width": 4},
            **settings,
        }
    )
    for n in counts:
        scheduler.lifts[n] = Lift(torch.ones(n), torch.full((n,), beta), operator="shared", provenance=MADE)
    if continuous:
        scheduler.continuous_lift = replace(ContinuousLift.initial(2), operator="shared")
    torch.manual_seed(seed)
    scheduler.initialize()
    for network in scheduler.operators.values():
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return scheduler


Save = Callable[..., str]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def save(name: str, scheduler: DyWeightScheduler) -> str:
        scheduler.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def numbers(scheduler: Any, n: int) -> torch.Tensor:
    return scheduler.tables[n].weights


def test_tables_and_functions_come_together_and_the_later_one_counts(save: Save, tmp_path: Path) -> None:
    function = ContinuousTable.initial(2, GRID, base="euler")
    other = replace(function, coefficients=function.coefficients + 0.5)
    a = save("a", dyweight(table(2), table(3)))
    b = save("b", dyweight(table(3, 0.5), table(5)).with_continuous(function))
    c = save("c", dyweight(table(5)).with_continuous(other))
    result, told = merge_artefacts([a, b, c], tmp_path / "new" / "out")
    assert told == [
        f"3 steps: that of {b} replaces an earlier one",
        f"any other number of steps: that of {c} replaces an earlier one",
    ], "the same table twice replaces nothing"
    loaded: Any = dywspan.load(tmp_path / "new" / "out")
    for scheduler in (result, loaded):
        assert [*scheduler.tables] == [2, 3, 5] and scheduler.continuous is not None
        assert torch.equal(numbers(scheduler, 3), table(3, 0.5).weights)
        assert torch.equal(scheduler.continuous.coefficients, other.coefficients)
    card = (tmp_path / "new" / "out" / "README.md").read_text()
    assert all(text in card for text in ("org/model", "Merged from", a, b, c, "prompt='...'", "guidance_scale=4.0"))
    assert "2, 3, 5 and any other number of steps" in card and 'from_pretrained("out")' in card
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out"]


def test_lifts_come_together_with_their_operators(save: Save, tmp_path: Path) -> None:
    a = save("a", spanlift(3, 5, seed=0))
    b = save("b", spanlift(5, 7, seed=1, continuous=True))
    _, told = merge_artefacts([a, b], tmp_path / "out")
    assert told == [f"5 steps: that of {b} replaces an earlier one"], "its operator is another"
    loaded: Any = dywspan.load(tmp_path / "out")
    assert [*loaded.lifts] == [3, 5, 7] and loaded.continuous_lift is not None and len(loaded.operators) == 2
    for source, counts in ((a, (3,)), (b, (5, 7))):
        own: Any = dywspan.load(source)
        for n in counts:
            mine, theirs = (s.operators[s.lifts[n].operator].state_dict() for s in (loaded, own))
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert merge({"a": loaded, "again": loaded})[1] == []


def test_the_others_are_added_to_a_source_that_is_the_output(save: Save, tmp_path: Path) -> None:
    for make in (dyweight, spanlift):
        parts = (table(2), table(3)) if make is dyweight else (2, 3)
        a, b = (save(f"{make.__name__}-{i}", make(part)) for i, part in enumerate(parts))  # type: ignore[arg-type]
        (Path(a) / "state").mkdir()
        (Path(a) / "state" / "kept").write_text("x")
        (Path(b) / "samples-3.png").write_bytes(b"picture")
        merge_artefacts([a, b], a)
        for folder in (Path(a), Path(a) / SPARE):
            loaded: Any = dywspan.load(folder)
            assert [*(loaded.tables if make is dyweight else loaded.lifts)] == [2, 3]
        assert (Path(a) / "state" / "kept").exists() and "samples-3.png" in (Path(a) / "README.md").read_text()
        assert not [*tmp_path.glob(".merge-*")]


def test_nothing_is_left_where_writing_fails(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [save("a", dyweight(table(2))), save("b", dyweight(table(3)))]
    monkeypatch.setattr("dywspan.distill.merge.write_card", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
    for output in (tmp_path / "out", Path(sources[0])):
        with pytest.raises(OSError, match="full"):
            merge_artefacts(sources, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert [*dywspan.load(sources[0]).tables] == [2]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: spanlift(3), "a holds a DyWeightScheduler and b a SpanLiftScheduler: merge solvers of one class"),
        (lambda: DyWeightScheduler(prediction_type="epsilon"), "a was learned for Flow networks and b for"),
        (lambda: dyweight(table(3), num_train_timesteps=500), r"differ in num_train_timesteps \(1000 and 500\)"),
        (lambda: dyweight(table(3), solver="euler"), "differ in solver"),
        (lambda: dyweight(table(3, base_model="org/other")), r"on \['org/model'\] and b on \['org/other'\]"),
    ],
)
def test_solvers_that_do_not_belong_together_are_refused(other: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        merge({"a": dyweight(table(2)), "b": other()})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"solver": "ipndm"}, r"different bases, in \['solver'\]"),
        ({"operator": SIZE | {"width": 8}}, "differ in operator"),
        ({"layout": "packed"}, r"differ in layout \('image' and 'packed'\)"),
    ],
)
def test_lifts_of_another_base_or_operator_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        merge({"a": spanlift(2), "b": spanlift(3, **change)})


def test_outputs_and_sources_that_cannot_be(save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save("a", dyweight(table(2))), save("b", dyweight(table(3)))
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.mkdir()
    (full / "file").touch()
    empty.mkdir()
    for arguments, said in (
        ([a, b, "-o", str(full)], f"{full} is there already and none of the sources"),
        ([a, b, "-o", str(full / "file")], "is there already"),
        ([a, "-o", str(empty)], "merging takes at least two"),
        ([a, b, f"{tmp_path}/./a", "-o", str(empty)], "is named twice"),
        ([a, str(tmp_path / "none"), "-o", str(empty)], "none"),
    ):
        assert main(["merge", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error
    assert not [*empty.iterdir()]
    assert main(["merge", a, b, "-o", str(empty)]) == 0 and [*dywspan.load(empty).tables] == [2, 3]


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(save: Save, tmp_path: Path) -> None:
    a, b = save("a", dyweight(table(2), table(3))), save("b", dyweight(table(3, 0.5)))
    run = subprocess.run(
        [sys.executable, "-m", "dywspan.cli", "merge", a, b, "-o", str(tmp_path / "out")],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"3 steps: that of {b} replaces an earlier one" in run.stdout
    assert f"{tmp_path / 'out'}: DyWeightScheduler for 2, 3 steps" in run.stdout
    assert [*dywspan.load(tmp_path / "out").tables] == [2, 3]
