"""Rivals at their best: every classical solver on every grid, chosen on samples that nothing is measured on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from test_quality import LEARNED, ROOT, config

from dywspan import DyWeightScheduler, SolverTable
from dywspan.core.table import InvalidSolverError
from dywspan.evaluate import quality, rivals, task
from dywspan.evaluate.baselines import BEST, find_solvers
from dywspan.evaluate.quality import run
from dywspan.evaluate.report import read_results, table
from dywspan.pipelines.arena import Arena
from dywspan.pipelines.classical import Classical
from dywspan.pipelines.rollout import sample


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples to judge all on, four for the finalists."""
    monkeypatch.setattr(rivals, "SELECT", (2, 4))
    monkeypatch.setattr(rivals, "FINALISTS", 2)


@pytest.mark.slow
def test_the_best_classical_solver_is_chosen_on_other_samples(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judged: dict[str, list[float]] = {}
    seen: set[int] = set()
    errors = Arena.errors

    def watched(self: Arena, scheduler: Any, steps: int, places: Any) -> Any:
        found = errors(self, scheduler, steps, places)
        seen.update(self.seeds[i] for i in places)
        key = json.dumps(scheduler.config["tables"], default=str)
        judged.setdefault(key, []).append(float(found.mean()))
        return found

    monkeypatch.setattr(Arena, "errors", watched)
    changes: dict[str, Any] = {"samples": 3, "steps": [3], "metrics": ["latent_rmse"], "gap_from": "best-classical"}
    changes |= {"solvers": ["best-classical", "ipndm-2m", LEARNED]}
    results = run(config(tmp_path, **changes))
    assert seen == {3, 4, 5, 6}, "the samples after the measured ones"
    finals = [own[1] for own in judged.values() if len(own) == 2]
    assert len(judged) > 20 and len(finals) == 2
    first = sorted(own[0] for own in judged.values())
    assert {own[0] for own in judged.values() if len(own) == 2} == {*first[:2]}
    best, plain, learned = results["rows"]
    assert best["solver"].endswith(" (best classical)") and best["line"] == "best classical" and not best["learned"]
    (kept,) = (tmp_path / "cache" / "best-classical").iterdir()
    chosen = json.loads(kept.read_text())
    assert best["solver"].startswith(chosen["solver"]) and chosen["among"] == len(judged)
    (won,) = [key for key, own in judged.items() if own[1:] == [min(finals)]]
    assert json.loads(won)["3"]["weights"] == chosen["table"]["weights"]
    assert learned["paired_classical"]["latent_rmse"]["against"] in (best["solver"], plain["solver"])
    assert "gap_closed" in plain and "gap_closed" not in best
    assert all(row["guidance_scale"] == 1.0 for row in results["rows"])
    shown = table(read_results(tmp_path / "results.json"))
    assert "| best classical " in shown and f"best classical: {chosen['solver']} (3 NFE)" in shown
    # The row is what the chosen table samples, and what was chosen stays.
    judged.clear()
    ready = task.prepare(config(tmp_path, **changes))
    (cell,) = quality._best(ready, ready.config.call)
    assert isinstance(cell.scheduler, DyWeightScheduler) and cell.solver == best["solver"] and not judged
    pairs = quality.make_pairs(ready.pipe, ready.teacher, ready.inputs, ready.seeds, call=ready.config.call)
    with torch.no_grad():
        end, _ = sample(ready.pipe, cell.scheduler, 3, ready.inputs, ready.seeds, ready.config.call)
    rmse = (end - pairs.endpoints).square().flatten(1).mean(1).sqrt().mean()
    assert best["latent_rmse"] == pytest.approx(float(rmse), rel=1e-3)


class Judged(Arena):
    """An arena whose endpoints are known, by solver and sample, as distances to targets of 0; it counts what it was
    asked.
    """

    def __init__(self, ends: dict[int, list[float]]) -> None:
        self.ends, self.asked = ends, list[tuple[int, int]]()
        self.targets = {i: torch.zeros(1) for i in range(4)}

    def endpoints(self, scheduler: Any, steps: int, places: Sequence[int]) -> torch.Tensor:
        own = scheduler.tables[2].provenance["number"]
        self.asked.append((own, len(places)))
        if own == 3:
            raise InvalidSolverError("its levels are none that the network knows")
        return torch.tensor([[float(self.ends[own][i])] for i in places])


def test_few_samples_leave_some_of_which_more_samples_choose(few: None) -> None:
    table = SolverTable(torch.ones(2, 1).double(), torch.ones(2).double(), {"name": "flow"})
    among = [Classical("it", str(i), replace(table, provenance={"number": i})) for i in range(4)]
    arena: Any = Judged({0: [3, 3, 3, 3], 1: [1, 1, 9, 9], 2: [2, 2, 2, 2]})
    arena.inputs = [{}] * 4
    pipe: Any = SimpleNamespace(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    assert rivals.best_classical(pipe, arena, 2, among) is among[2]
    assert arena.asked == [(0, 2), (1, 2), (2, 2), (3, 2), (1, 4), (2, 4)]


def test_the_choice_takes_the_prompts_after_the_measured_ones_or_these_again(few: None, tmp_path: Path) -> None:
    (tmp_path / "six.txt").write_text("".join(f"prompt {i}\n" for i in range(6)))
    for samples, expected in ((2, [2, 3, 4, 5]), (3, [0, 1, 2, 0])):
        own = config(tmp_path, prompts=str(tmp_path / "six.txt"), samples=samples)
        others = task._others(own, [{"prompt": f"prompt {i}"} for i in range(samples)])
        assert [inputs["prompt"] for inputs in others] == [f"prompt {i}" for i in expected]


def test_choices_are_one_line_of_a_table_and_named_below_it() -> None:
    (best,) = find_solvers(["best-classical"])
    assert best.name == BEST and best.name not in [solver.name for solver in find_solvers(["all"])]
    chosen = {3: "UniP(2M), rho 5", 4: "iPNDM(2M), AYS", 5: "UniP(2M), rho 5"}
    rows: list[dict[str, Any]] = [{"solver": f"{name} ({BEST})", "line": BEST, "nfe": n} for n, name in chosen.items()]
    rows += [{"solver": "Euler", "nfe": n} for n in chosen]
    rows = [{**row, "error": 2.0, "interval": {"error": [1.0, 3.0]}} for row in rows]
    shown = table({"rows": rows, "metrics": {"error": {"lower_is_better": True}}})
    lines = [line.split("|")[1].strip() for line in shown.splitlines() if line.startswith("| ")]
    assert lines == ["solver", BEST, "Euler"]
    assert "best classical: UniP(2M), rho 5 (3, 5 NFE); iPNDM(2M), AYS (4 NFE)" in shown


@pytest.mark.weekly
@pytest.mark.slow
def test_shipped_solvers_are_better_than_classical_ones_by_more_than_chance(tmp_path: Path) -> None:
    model = ROOT / "examples" / "emoji-flow"
    learned = [f"{model}-{kind}" for kind in ("solvers", "spanlift")]
    call = DyWeightScheduler.from_pretrained(learned[0]).tables[3].provenance["call"]
    changes: dict[str, Any] = {"model": str(model), "call": call, "samples": 16, "batch_size": 16}
    changes |= {"steps": [3], "teacher_steps": 12, "metrics": ["latent_rmse"], "gap_from": None}
    rows = run(config(tmp_path, **changes, solvers=["unipc", "ipndm-2m", *learned]))["rows"]
    assert [row["learned"] for row in rows] == [False] * 2 + [True] * 2
    for row in rows[-2:]:
        found = row["paired_classical"]["latent_rmse"]
        assert found["high"] < 0 and found["wins"] > 0.6, row
