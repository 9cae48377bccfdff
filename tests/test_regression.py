"""Tables that start from a teacher's path: rows by linear least squares, one by one."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainable import float64, fresh  # noqa: F401  (a fixture)
from test_trainer import learn, pixels  # noqa: F401  (a fixture)

from dywspan import DyWeightScheduler, SolverTable
from dywspan.core.continuous import FEATURES, ContinuousTable
from dywspan.distill.config import LearningConfig
from dywspan.distill.progress import endpoint_error
from dywspan.distill.regression import regress, regress_continuous
from dywspan.distill.student import initial_table
from dywspan.pipelines.classical import default_grid
from dywspan.pipelines.pairs import Pairs, make_pairs
from dywspan.pipelines.replay import Meter
from dywspan.pipelines.teacher import Teacher

N = 4


def _euler(scheduler: DyWeightScheduler, n: int = N) -> SolverTable:
    return initial_table(scheduler, n, LearningConfig(init="euler", order=3), None)


def _paths(subject: Any, scheduler: Any, steps: int, substeps: int, samples: range = range(5)) -> Pairs:
    teacher = Teacher(scheduler, steps, substeps)
    return make_pairs(subject.pipe, teacher, subject.inputs(samples), samples, call=subject.call)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline (not square)"])
def test_the_table_that_made_the_path_is_found(name: str) -> None:
    """By batches of any size."""
    subject = fresh(name)
    scheduler = subject.solver()
    start = _euler(scheduler)
    weights = torch.rand(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tril() + 0.5
    weights = weights.tril() / weights.tril().sum(1, keepdim=True)
    weights[-1] *= 0.9
    hidden = replace(start, weights=weights)
    paths = _paths(subject, scheduler.with_tables([hidden]), N, 1)
    found = [regress(subject.pipe, start, paths, subject.call, batch_size=size) for size in (2, 16)]
    torch.testing.assert_close(found[0].weights, hidden.weights, rtol=0, atol=2e-4)  # states are kept in float32
    torch.testing.assert_close(found[0].weights, found[1].weights, rtol=0, atol=1e-5)
    assert torch.equal(found[0].time_scale, start.time_scale) and found[0].grid == start.grid


def test_it_ends_nearer_to_the_teacher_than_any_classical_start() -> None:
    subject = fresh("StableDiffusionPipeline")
    scheduler = subject.solver()
    start = _euler(scheduler, 3)
    fine = DyWeightScheduler.from_config(scheduler.config, solver="ipndm", grid=dict(start.grid))
    paths = _paths(subject, fine, 24, 8, range(8))
    held_out = _paths(subject, fine, 24, 8, range(20, 24))
    meter = Meter(subject.pipe)
    with meter.running():
        found = regress(subject.pipe, start, paths, subject.call)
    assert meter.counts["student"] == 2 * len(paths) * (1 + 2 + 3), "guided; a row needs no step after its own"
    tables = {
        init: initial_table(scheduler, 3, LearningConfig(init=init, order=3), None) for init in ("euler", "ipndm")
    }
    ends = replace(held_out, targets=held_out.endpoints, is_path=False)
    errors = {
        name: endpoint_error(subject.pipe, scheduler.with_tables([table]), 3, ends, subject.call)
        for name, table in {**tables, "regression": found}.items()
    }
    assert errors["regression"] < 0.9 * min(errors["euler"], errors["ipndm"]), errors


def test_paths_of_another_number_of_steps_are_refused() -> None:
    subject = fresh("StableDiffusionPipeline")
    scheduler = subject.solver()
    paths = _paths(subject, subject.solver("ipndm"), 6, 2, range(1))
    with pytest.raises(ValueError, match=r"Regression on 4 steps needs teacher paths of 4 states"):
        regress(subject.pipe, _euler(scheduler), paths, subject.call)
    ends = replace(paths, targets=paths.endpoints, is_path=False)
    with pytest.raises(ValueError, match="teacher paths of 3 states"):
        regress(subject.pipe, _euler(scheduler, 3), ends, subject.call)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline (not square)"])
def test_the_function_that_made_the_paths_is_found(name: str) -> None:
    subject = fresh(name)
    scheduler = subject.solver()
    start = ContinuousTable.initial(2, default_grid(scheduler))
    hidden = 1e-3 * torch.randn(3, len(FEATURES), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden[0, torch.arange(len(FEATURES)) != FEATURES.index("last")] = hidden[2] = 0  # levels, time scale
    hidden[1, FEATURES.index("first")] = 0  # there are no differences in the first step
    maker = scheduler.with_continuous(replace(start, coefficients=hidden))
    paths = {n: _paths(subject, maker, n, 1) for n in (3, 4, 5, 7)}
    found = regress_continuous(subject.pipe, start, paths, subject.call)
    torch.testing.assert_close(found.coefficients, hidden, rtol=0, atol=2e-5)  # to first order
    assert (found.base, found.grid, found.horizon) == (start.base, start.grid, start.horizon)


def test_a_function_that_follows_paths_of_some_counts_helps_at_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    digits: Any = importlib.import_module("digits")

    pipe = digits.DDPMPipeline(digits.ExactDenoiser(), digits.EDMEulerScheduler())
    pipe.set_progress_bar_config(disable=True)
    own = DyWeightScheduler.from_config(pipe.scheduler.config)
    start = ContinuousTable.initial(2, default_grid(own))
    fine = DyWeightScheduler.from_config(own.config, solver="ipndm", grid=dict(start.grid))

    def ends(steps: int, substeps: int, seeds: range) -> Pairs:
        return make_pairs(pipe, Teacher(fine, steps, substeps), [{}] * len(seeds), seeds, call={}, batch_size=64)

    paths = {n: ends(48, 48 // n, range(100, 124)) for n in (2, 3, 4, 6, 8)}
    found, held_out = regress_continuous(pipe, start, paths, {}), ends(48, 0, range(64))
    for n in (3, 5, 7, 12, 20):
        before, after = (endpoint_error(pipe, own.with_continuous(f), n, held_out, {}) for f in (start, found))
        assert after < (0.75 if n < 12 else 1.0) * before, (n, before, after)


@pytest.mark.parametrize("optimizer", ["adam", "least_squares"])
def test_a_run_starts_from_it_and_counts_it(pixels: Path, tmp_path: Path, optimizer: str) -> None:  # noqa: F811
    settings: dict[str, Any] = {"steps": [3], "optimizer": optimizer, "updates": 1, "init": "euler", "pictures": 0}
    found = {}
    for paths in (0, 3):
        assert learn(pixels, tmp_path / str(paths), regression=paths, **settings) == 0
        found[paths] = DyWeightScheduler.from_pretrained(tmp_path / str(paths)).tables[3].provenance
    before = [found[paths]["held_out_error"]["before"] for paths in (0, 3)]
    assert before[1] != before[0]
    spent = [found[paths]["evaluations"] for paths in (0, 3)]
    steps = found[0]["teacher"]["steps"]
    assert "regression" not in spent[0] and spent[1]["regression"] == 3 * (1 + 2 + 3)
    assert spent[1]["teacher"] - spent[0]["teacher"] == 3 * 3 * -(-steps // 3)


@pytest.mark.slow
def test_so_does_a_run_of_several_counts(pixels: Path, tmp_path: Path) -> None:  # noqa: F811
    settings: dict[str, Any] = {"continuous": True, "steps": [2, 4], "optimizer": "least_squares", "updates": 1}
    assert learn(pixels, tmp_path, regression=3, init="adams", pictures=0, **settings) == 0
    function = DyWeightScheduler.from_pretrained(tmp_path).continuous
    assert function.provenance["evaluations"]["regression"] == 3 * (1 + 2 + 1 + 2 + 3 + 4)


def test_what_has_no_rows_to_fit_is_refused(pixels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert learn(pixels, tmp_path, regression=2, solver="spanlift") == 2
    assert "regression fits the rows of tables" in capsys.readouterr().err
