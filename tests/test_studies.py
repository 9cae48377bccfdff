"""The studies of examples/studies, in small: what they integrate, project and claim, and that their runs can start."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dywspan import DyWeightScheduler
from dywspan.pipelines.pairs import Pairs
from dywspan.pipelines.rollout import load_pipeline, sample

ROOT = Path(__file__).parent.parent
STUDIES = ROOT / "examples" / "studies"


@pytest.fixture(autouse=True)
def _studies(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(STUDIES))
    monkeypatch.chdir(ROOT)
    yield


def script(name: str) -> Any:
    return importlib.import_module(name)


def test_a_claim_counts_what_holds_and_names_what_does_not() -> None:
    claim = script("claims").claim
    found = claim("a is below b", [("first", 1.0, 2.0), ("second", 3.0, 2.0), ("third", 2.0, 2.0)])
    assert (found["holds"], found["of"]) == (1, 3)
    assert found["exceptions"] == ["second: 3 and 2", "third: 2 and 2"]
    assert claim("no number", [("it", float("nan"), 1.0)])["holds"] == 0
    with pytest.raises(ValueError, match="Nothing to compare"):
        claim("nothing", [])


def test_the_white_box_solvers_integrate_the_odes() -> None:
    """Against Adams-Bashforth on y itself, with the matrix A."""
    odes, study = script("polynomial_odes"), script("white_box_odes")
    problems = odes.Problems.random([3, 12], 2, seed=0)
    steps, order = 9, 3

    def coupled(y: Tensor) -> Tensor:
        z = problems.enter @ y
        return problems.leave @ (problems.growth * z + problems.turn * z.roll(z.shape[1] // 2, 1))

    unit = torch.eye(odes.D, dtype=torch.float64).expand(2, -1, -1)
    matrix = coupled(unit)
    assert torch.allclose(problems.leave @ problems.enter @ unit, unit, atol=1e-10)
    assert 0.3 < float(-torch.linalg.eigvals(matrix).real.max()) < 0.5, "stable, about -0.5"
    exact, rates = problems.solution(steps)
    slopes, y = [*rates[: order - 1].flip(0)], exact[order - 1]
    for n in range(order - 1, steps):
        slopes = [rates[n] + matrix @ (y - exact[n]), *slopes][:order]
        y = y + sum(w * s for w, s in zip((23 / 12, -16 / 12, 5 / 12), slopes)) / steps
    run = study.Run(problems, steps, order)
    assert torch.allclose(run.error(run.classical), y - exact[-1], atol=1e-9)
    assert run.classical.shape[:2] == (steps - order + 1, order)


def test_the_white_box_observations_hold_in_small() -> None:
    odes, study = script("polynomial_odes"), script("white_box_odes")
    degrees, steps = [5, 20], [6, 12]
    rows = study.study(degrees, steps, odes.Problems.random(degrees, 3, seed=0), updates=40)
    assert len(rows) == 2 * (1 + 2 * 4 * len(steps))
    for found in study.observations(rows):
        assert found["holds"] == found["of"] > 0, found
    worse = [{**row, "error": row["error"] * (2 if row["solver"] == "optimised" else 1)} for row in rows]
    assert any(found["holds"] < found["of"] for found in study.observations(worse)), "they can fail"


def test_the_halvorsen_step_splits_as_spanlift_says() -> None:
    study = script("halvorsen")
    x = torch.tensor([study.START], dtype=torch.float64)
    coarse, fine = (study.integrate(x, 0.2, size) for size in (2e-3, 1e-3))
    assert torch.allclose(coarse, fine, atol=1e-7), "of high order: the exact step"
    _, moves, rows = study.measure(0.03, updates=60, count=32)
    found = {claim["claim"]: claim for claim in study.claims(rows)}
    assert [*moves] == ["Adams-Bashforth", "DyWeight", "SpanLift"] and len(found) == 4
    for name, claim in found.items():
        assert claim["holds"] >= claim["of"] * (1 if name.startswith("eq.") else 0.9), claim


@pytest.mark.parametrize(("name", "kind"), [("operators", "spanlift"), ("ablations", "dyweight")])
@pytest.mark.parametrize("steps", [3, 5])
def test_every_line_of_a_study_is_a_run_that_can_start(name: str, kind: str, steps: int, tmp_path: Path) -> None:
    study, runs, subjects = script(name), script("runs"), script("subjects")
    args = argparse.Namespace(steps=steps, updates=2, pairs=16, folder=tmp_path)
    for subject in subjects.SUBJECTS.values():
        lines = study.lines(subject, steps)
        configs = [runs.settings(args, kind, subject, line, own) for line, own in lines.items()]
        assert len({config.output for config in configs}) == len(lines) > 6
        different = [json.dumps(config.matters, default=str) + config.base for config in configs]
        assert len({*different}) == len(lines), "no line is another one again"


@pytest.mark.parametrize("name", ["emoji-flow", "emoji-sd"])
def test_the_small_form_tells_each_layer_a_time_of_its_own(name: str) -> None:
    study, subject = script("small_form"), script("subjects").SUBJECTS[name]
    pipe, call, seeds = load_pipeline(subject.model), dict(subject.call), [0, 1]
    solver, inputs = DyWeightScheduler.from_pretrained(f"{subject.model}-solvers"), [{"prompt": "a cat"}] * 2
    ends = lambda: sample(pipe, solver, 2, inputs, seeds, call)[0]  # noqa: E731
    with torch.no_grad():
        before = ends()
        paths = study.layers(pipe, solver, 2, inputs[:1], call)
        with study.told(pipe, paths, torch.zeros(2, len(paths))):
            assert torch.equal(ends(), before), "the network's own embedding"
        with study.told(pipe, paths, torch.full((2, len(paths)), 0.1)):
            target = ends()
        assert not torch.equal(target, before) and torch.equal(ends(), before), "nothing is left in the network"
    if name == "emoji-flow":
        return
    found, theta = study.learn(pipe, solver, 2, Pairs(inputs, seeds, target), call, updates=6, batch_size=2)
    assert found == paths and theta.shape == (2, len(paths))
    with torch.no_grad(), study.told(pipe, paths, theta):
        assert (ends() - target).norm() < 0.9 * (before - target).norm(), "it learns the other times"


def test_a_step_cache_costs_what_it_computes() -> None:
    study = script("step_cache")
    pipe, call, inputs = load_pipeline(study.SUBJECT.model), dict(study.SUBJECT.call), [{"prompt": "a cat"}] * 2
    cost = study.costs(pipe, call, inputs[0])
    assert sum(cost.values()) == pytest.approx(1) and len(cost) == 9
    pairs = Pairs(inputs, [0, 1], torch.zeros(2, 64, 16))
    spent = [study.measured(pipe, study.Cached("euler", 4, t), pairs, call, cost)[1] for t in (0.0, 1e9)]
    first = next(iter(cost.values()))
    assert spent == pytest.approx([4, 1 + 3 * first]), "all of it, or the first block after the first step"
    assert not pipe.transformer.is_cache_enabled


@pytest.mark.parametrize("name", ["white-box", "halvorsen", "out-of-span"])
def test_the_documents_claims_are_the_recorded_ones(name: str) -> None:
    recorded = json.loads((ROOT / "docs" / "results" / f"studies-{name}.json").read_text())
    text = (ROOT / "docs" / "studies.md").read_text()
    assert recorded["claims"] and recorded["rows"]
    for claim in recorded["claims"]:
        assert f"| {claim['claim']} | {claim['holds']} of {claim['of']} |" in text
