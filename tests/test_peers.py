"""Other learned solvers as tables of few numbers: each map is the method that it stands for, and all learn alike."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from test_solver_trainer import own_pipeline
from torch import Tensor
from torch.nn.functional import pad

from dywspan import DyWeightScheduler
from dywspan.core.bases import BASES
from dywspan.core.grid import make_grid
from dywspan.core.prediction import EDM, Epsilon, Flow, Prediction
from dywspan.core.step import rollout
from dywspan.core.table import SolverTable
from dywspan.evaluate.rivals import judging

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "peers"))
maps, methods, bench, cases, runs, peers, report = (
    importlib.import_module(name) for name in ("maps", "methods", "bench", "cases", "learning", "peers", "report")
)

VP = Epsilon(torch.linspace(0.9999, 0.005, 1000, dtype=torch.float64))
NETWORKS: dict[str, tuple[Prediction, dict[str, Any]]] = {
    "vp": (VP, {"name": "discrete", "sigma_min": 0.0, "sigma_max": 10.0}),
    "edm": (EDM(), {"name": "polynomial", "sigma_min": 0.002, "sigma_max": 80.0}),
    "flow": (Flow(), {"name": "flow", "shift": 3.0}),
}
PEERS = [name for name, method in methods.METHODS.items() if isinstance(method, methods.Peer)]
MULTISTEP = [name for name in PEERS if methods.METHODS[name].most == 1]
X = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)


def slope(x: Tensor, t: Any) -> Tensor:
    """dx/dt of a small nonlinear ODE."""
    return torch.sin(x) * torch.tensor([1.0, 0.5, -0.3], dtype=torch.float64) + torch.cos(torch.as_tensor(t))


def end(table: SolverTable, prediction: Prediction) -> Tensor:
    """Where a table takes ``X``."""
    return rollout(table.schedule(prediction), lambda x, sigma, tau: slope(x, tau), X)


def ground(kind: str, stages: Sequence[int], base: str = "dpmpp") -> Any:
    prediction, grid = NETWORKS[kind]
    levels = make_grid(grid, len(stages), prediction)

    def rows(t: Tensor) -> Tensor:
        return BASES[base](t, prediction.signal(t), 2)

    return maps.Ground(levels, prediction, rows, pad(rows(levels), (0, max(0, 3 - rows(levels).shape[1]))), stages)


def student(name: str, kind: str, evaluations: int, base: str = "dpmpp", moved: float = 0.0) -> Any:
    """At its start, or with its numbers moved by this deviation."""
    peer = methods.METHODS[name]
    made = methods.PeerStudent(None, peer, ground(kind, peer.stages(evaluations), base))
    with torch.no_grad():
        for value in made.parameters():
            value.add_(moved * torch.randn_like(value))
    return made


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("name", MULTISTEP)
def test_a_multistep_peer_starts_as_its_base(name: str, kind: str) -> None:
    for base in ("dpmpp", "unipc", "ipndm"):
        made = student(name, kind, 5, base)
        table, own = made.table(), made.ground
        assert torch.allclose(table.nominal(own.prediction), own.levels, rtol=1e-12, atol=0)
        width = max(table.weights.shape[1], own.weights.shape[1])
        found, known = (pad(w, (0, width - w.shape[1])) for w in (table.weights, own.weights))
        assert torch.allclose(found, known, rtol=0, atol=1e-12)
        assert torch.equal(table.time_scale, torch.ones(5, dtype=torch.float64))
        classical = SolverTable(own.weights, torch.ones(5), {"sigmas": own.levels.tolist()})
        assert torch.allclose(end(table, own.prediction), end(classical, own.prediction), rtol=1e-10)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("name", PEERS)
def test_every_number_counts_and_the_learned_table_is_plain(name: str, kind: str) -> None:
    for evaluations in (3, 5, 7):
        made = student(name, kind, evaluations, moved=0.05)
        table, prediction = made.table(), made.ground.prediction
        assert len(table.weights) == table.num_inference_steps == evaluations
        assert sum(len(v) for v in made.theta.values()) == bench.numbers(
            made.peer, evaluations, made.ground.weights.shape[1]
        )
        gradients = torch.autograd.grad(end(table, prediction).square().sum(), made.parameters())
        assert all(bool((g != 0).all()) for g in gradients), dict(zip(made.theta, gradients))
        plain = methods.plain(table, {})
        assert type(plain) is SolverTable and torch.allclose(end(plain, prediction), end(table, prediction), rtol=1e-12)


@pytest.mark.parametrize("name", ["LD3-like", "BezierFlow-like", "S4S-Alt-like", "EPD-like"])
def test_the_gradients_are_those_of_differences(name: str) -> None:
    made = student(name, "vp", 5, moved=0.05)
    for value in made.parameters():
        (gradient,) = torch.autograd.grad(end(made.table(), VP).sum(), value)
        for k in range(len(value)):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    value[k] += sign * 1e-5
                    ends.append(float(end(made.table(), VP).sum()))
                    value[k] -= sign * 1e-5
            assert float(gradient[k]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("evaluations", "steps"), [(3, 2), (4, 2), (5, 3)])
def test_amed_is_the_midpoint_formula(evaluations: int, steps: int) -> None:
    made = student("AMED-like", "flow", evaluations, moved=0.3)
    own, points, scales = made.ground, maps.shares_of(made.theta["points"]), [*made.theta["scales"]]
    x = X
    for k, (t, after) in enumerate(pairwise(own.levels)):
        d = slope(x, t)
        if own.stages[k] == 2:
            m = after + points[k] * (t - after)
            d = scales[k] * slope(x + (m - t) * d, m)
        x = x + (after - t) * d
    assert len(own.stages) == steps and torch.allclose(end(made.table(), own.prediction), x, rtol=1e-12)


def test_epd_is_two_looks_from_one_state_and_its_leftovers_are_shorter_steps() -> None:
    made = student("EPD-like", "edm", 3, moved=0.3)
    (t, after), theta = made.ground.levels, made.theta
    shares, (mix,) = maps.shares_of(theta["points"]), (maps.GAIN * theta["mixes"]).sigmoid()
    a = after + shares[0] * (t - after)
    b = after + shares[1] * (a - after)
    d = slope(X, t)
    looks = [slope(X + (m - t) * d, s * m) for m, s in zip((a, b), theta["times"])]
    x = X + theta["scales"][0] * (after - t) * ((1 - mix) * looks[0] + mix * looks[1])
    assert torch.allclose(end(made.table(), made.ground.prediction), x, rtol=1e-11)
    assert [maps.split(n, 3) for n in (3, 5, 7)] == [(3,), (3, 2), (3, 3, 1)]


def test_s4s_rows_sum_to_one_and_s4s_alt_moves_one_group_at_a_time() -> None:
    assert torch.allclose(student("S4S-like", "vp", 5, moved=1.0).table().weights.sum(1), torch.ones(5).double())
    made = student("S4S-Alt-like", "vp", 5)
    made.block = 2
    moving = []
    for update in range(6):
        made.turn(update)
        moved = torch.autograd.grad(end(made.table(), VP).sum(), made.parameters(), allow_unused=True)
        moving.append({name for name, g in zip(made.theta, moved) if g is not None})
    assert moving == [{"weights"}] * 2 + [{"levels", "times"}] * 2 + [{"weights"}] * 2


def test_dc_solver_interpolates_what_it_remembers() -> None:
    weights, times = torch.tensor([[1.0, 0, 0], [1.5, -0.5, 0], [1.5, -0.5, 0]]).double(), torch.tensor([9.0, 5, 2])
    first, second = 0.25, -0.5
    found = maps.compensated(torch.tensor([first, second]), weights, times.double())
    newer = torch.tensor([first, 1 - first, 0])  # e_1 at 5 + 0.25 * 4, over d_0, d_1
    at = 2 + second * 3
    lagrange = [(at - b) * (at - c) / ((a - b) * (a - c)) for a, b, c in ((2, 5, 9), (5, 2, 9), (9, 2, 5))]
    newest = lagrange[0] * torch.tensor([0, 0, 1.0]) + lagrange[1] * newer + lagrange[2] * torch.tensor([1.0, 0, 0])
    assert torch.allclose(found[1], (1.5 * newer + torch.tensor([-0.5, 0, 0]))[[1, 0, 2]].double())
    assert torch.allclose(found[2], (1.5 * newest - 0.5 * newer).flip(0).double(), atol=1e-6)


def test_levels_fall_whatever_the_numbers() -> None:
    levels = make_grid(NETWORKS["edm"][1], 6, EDM())
    for size in (0.1, 3.0, 100.0):
        moved = maps.falling(size * torch.randn(5, dtype=torch.float64), levels)
        curved = maps.bezier(min(size, 3.0) * torch.randn(maps.CONTROLS, dtype=torch.float64), levels)
        for found in (moved, curved):
            assert bool((found.diff() < 0).all()) and torch.equal(found[[0, -1]], levels[[0, -1]])


@pytest.mark.parametrize(
    ("optimum", "fails", "rates"),
    [
        (0.06, 1.0, [0.003, 0.01, 0.03, 0.09, 0.27]),
        (0.01, 0.02, [0.003, 0.01, 0.03]),  # the best is none of the ends
        (1e-9, 1.0, [0.003, 0.01, 0.03, 0.001, 0.00033]),  # five are enough
    ],
)
def test_a_best_rate_at_an_end_asks_for_more(optimum: float, fails: float, rates: list[float]) -> None:
    learning = runs.Learning(None, runs.Effort(most=5), Path(), print)

    def run(method: Any, rate: float | None, base: Any) -> Any:
        error = 9.0 if rate is None else abs(math.log(rate / optimum))
        return runs.Run({"held_out": None if (rate or 0) > fails else error, "lr": rate}, Path())

    learning.run = run
    best, tried = learning.best(replace(methods.METHODS["LD3-like"], squares=False))
    assert [own.facts["lr"] for own in tried] == rates
    assert best.facts["lr"] == min(rates, key=lambda rate: abs(math.log(rate / optimum)))
    best, tried = learning.best(methods.METHODS["LD3-like"])
    assert tried[-1].facts["lr"] is None and (best.facts["lr"] is None) == (optimum < 1e-6)


def test_methods_are_learned_measured_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "TEACHER_STEPS", 8)
    pipe = own_pipeline()
    pipe.set_progress_bar_config(disable=True)
    case = cases.Case("tiny", tmp_path, prompted=False, operator={"width": 8})
    effort = runs.Effort(12, 4, updates=2, squares_updates=2, checks=1, batch_size=4, most=3, samples=4)
    names = ["DyWeight", "S4S-Alt-like", "DLMS-like", "EPD-like", "DC-Solver-like", "SpanLift"]
    lines = list[str]()

    def compared() -> list[dict[str, Any]]:
        opened = cases.Opened(case, pipe, tmp_path / "samples")
        made = bench.Bench(opened, 3, effort.pairs, effort.held_out, tmp_path / "chosen")
        learning = runs.Learning(made, effort, tmp_path / "3", lines.append)
        return peers.compared(made, learning, peers.Measuring(opened, effort.samples, tmp_path / "errors"), names)

    rows = compared()
    assert [row["method"] for row in rows] == [*names, peers.CLASSICAL]
    assert len(lines) == 5 * 4 + 3 and all("held-out" in line for line in lines)
    by_name = {row["method"]: row for row in rows}
    assert all(row["paired"]["against"] == "DyWeight" for row in rows[1:]) and "paired" not in rows[0]
    assert (by_name["DC-Solver-like"]["pairs"], by_name["EPD-like"]["sequential"]) == (10, 2)
    assert all(len(row["tried"]) >= 3 and row["evaluations"] > 0 for row in rows[:-1])
    assert by_name["SpanLift"]["evaluations"] > by_name["DyWeight"]["evaluations"]

    # A learned table is an artefact like any other.
    (file, *_) = sorted((tmp_path / "3" / "epd-like").glob("*/run.json"))
    solver = runs.Run(json.loads(file.read_text()), file.parent).solver()
    assert solver.tables[3].provenance["peer"] == "EPD-like" and solver.tables[3].weights.shape == (3, 3)
    opened = cases.Opened(case, pipe, tmp_path / "samples")
    with judging(pipe, opened.pairs(cases.FRESH, 4), {}) as arena:
        assert bool(arena.errors(solver, 3, range(4)).isfinite().all())

    monkeypatch.setattr(runs, "learn", None)  # nothing is learned a second time,
    monkeypatch.setattr(peers, "judging", None)  # nor chosen, nor measured
    monkeypatch.setattr(bench, "judging", None)
    assert compared() == rows
    shown = report.tables(rows, "tiny")
    assert all(f"| {name}" in shown for name in [*names, peers.CLASSICAL]) and shown.count("\n\n") == 1
    with pytest.raises(ValueError, match="'other' was not measured"):
        report.tables(rows, "other")


def test_a_galaxy_network_is_opened_or_how_to_make_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "TEACHER_STEPS", 4)
    case = replace(cases.CASES["hsc64"], folder=tmp_path / "hsc64")
    with pytest.raises(FileNotFoundError, match=r"galaxies\.py build"), cases.opened(case, tmp_path):
        pass
    galaxies = sys.modules["score_network"]  # which opening has imported
    network = galaxies.ScoreNetwork(sample_size=8, hidden=4, width=4, hidden_width=4, depth=1)
    DDPMPipeline(network, galaxies.scheduler()).save_pretrained(case.folder)
    with cases.opened(case, tmp_path / "samples") as own:
        assert own.pairs(cases.TRAIN, 2).endpoints.shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("host", "n", "fits"),
    [
        (FlowMatchEulerDiscreteScheduler(), 5, True),
        (FlowMatchEulerDiscreteScheduler(), 3, False),  # none was published
        (DDPMScheduler(), 5, True),
        (DDPMScheduler(beta_schedule="scaled_linear"), 5, False),
        (DDPMScheduler(trained_betas=[0.01] * 1000), 5, False),
    ],
)
def test_published_tables_are_measured_where_they_fit(host: Any, n: int, fits: bool) -> None:
    own = DyWeightScheduler.from_config(host.config)
    found = peers.published(SimpleNamespace(opened=SimpleNamespace(own=own), prediction=own.host.prediction, n=n))
    assert [*found] == [peers.PUBLISHED] * fits and all(n in solver.tables for solver in found.values())


def test_the_document_names_every_method_as_it_is() -> None:
    text = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    lines = {cells[0]: cells for line in text.splitlines() if len(cells := re.split(r" *\| *", line.strip("| "))) == 4}
    for name, method in methods.METHODS.items():
        _, paper, _, count = lines[name]
        assert method.paper in paper
        if (numbers := [bench.numbers(method, n) for n in (3, 5, 7)]) != [None] * 3:
            assert count == ", ".join(map(str, numbers)), name


def test_rows_of_other_subjects_stay(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    old = [{"subject": "emoji-flow", "nfe": 3, "method": "old"}, {"subject": "emoji-sd", "nfe": 3, "method": "old"}]
    file.write_text(json.dumps({"rows": old, "versions": {"dywspan": "0"}}))
    new = [{"subject": "emoji-sd", "nfe": 3, "method": "new"}]
    assert [row["method"] for row in peers.merged(file, new)] == ["new", "old"]
    args = SimpleNamespace(methods=[*methods.METHODS], steps=[3, 5], subjects=["emoji-sd"])
    assert peers.budget(args, runs.Effort()) > 10**5
