"""What each step of a solver misses: against a closed form, SpanLift's identity, and the run that it is of."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, EDMEulerScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from dywspan import DyWeightScheduler
from dywspan.cli import main
from dywspan.core.span import norm, project
from dywspan.core.table import SolverTable
from dywspan.evaluate.analyze import analyze
from dywspan.evaluate.spans import going_on, run_of, with_schedule
from dywspan.pipelines.rollout import load_pipeline
from dywspan.schedulers.apply import load

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "emoji-sd"
CALL = {"guidance_scale": 1.0}
PROMPTS = [{"prompt": "a red heart"}, {"prompt": "a smiling face"}]


class Gaussian(ModelMixin, ConfigMixin):
    """The network of Gaussian data: its F is zero, so that dx/dsigma = x sigma / (sigma^2 + sigma_data^2)."""

    @register_to_config
    def __init__(self, sample_size: int = 4, in_channels: int = 1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> UNet2DOutput:
        return UNet2DOutput(sample=sample * self.weight)


def test_a_projection_is_that_of_least_squares_whatever_the_basis() -> None:
    v, a, b = torch.randn(3, 5, 2, 3, 4)
    inside = project(v, [a, b])
    basis = torch.stack([a, b], -1).flatten(1, -2)
    weights = torch.linalg.lstsq(basis.double(), v.double().flatten(1)[:, :, None]).solution
    assert torch.allclose(inside.flatten(1), (basis.double() @ weights)[:, :, 0], atol=1e-6)
    assert torch.allclose(project(v, [a, b, a + b, 0 * a]), inside, atol=1e-5), "they may depend on each other"
    assert torch.allclose(project(a, [a, b]), a.double(), atol=1e-6) and float(norm(project(v, [0 * a])).max()) == 0


def test_steps_miss_what_a_closed_form_says() -> None:
    """x(sigma) is proportional to (sigma^2 + sigma_data^2)^1/2, along every derivative."""
    pipe = DDPMPipeline(Gaussian(), EDMEulerScheduler())
    pipe.set_progress_bar_config(disable=True)
    rows = analyze(pipe, ["euler"], [3], samples=1, substeps=24)
    assert [row["step"] for row in rows] == [0, 1, 2] and all(row["out_of_span"] < 1e-3 for row in rows)
    for row in rows[:2]:  # the last goes down to 0.002, where x hardly moves
        start, end = row["sigma"], row["sigma_next"]
        exact = math.sqrt((end**2 + 0.25) / (start**2 + 0.25)) - 1
        euler = (end - start) * start / (start**2 + 0.25)
        assert row["error"] == pytest.approx(abs(euler / exact - 1), rel=0.05, abs=1e-3)
        assert row["in_span"] == pytest.approx(row["error"], rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("name", ["table", "afs", "data", "spanlift", "timelift"])
def test_the_recorded_steps_are_the_run(name: str) -> None:
    pipe = load_pipeline(str(MODEL))
    own = DyWeightScheduler.from_config(pipe.scheduler)
    grid = {"name": "polynomial", "sigma_min": 0.03, "sigma_max": 14.6}
    makers: dict[str, Any] = {
        "table": lambda: load(f"{MODEL}-solvers"),
        "afs": lambda: own.with_tables([SolverTable.initial(3, 2, grid, own.host.prediction, afs=True)]),
        "data": lambda: DyWeightScheduler.from_config(pipe.scheduler, solver="dpmpp", solver_order=2),
        "spanlift": lambda: load(f"{MODEL}-spanlift"),
        "timelift": lambda: load(f"{MODEL}-timelift"),
    }
    scheduler = makers[name]()
    steps, end = run_of(pipe, scheduler, 3, PROMPTS, [0, 1], CALL)
    states = [step.state for step in steps] + [end]
    assert len(steps) == 3 and (steps[0].lifted is None) == (name != "spanlift")
    for step, following in zip(steps, states[1:]):
        assert torch.allclose(step.state + step.move, following, atol=2e-5 * float(step.state.abs().max()))
    # The exact solution goes on from the solver's own last state.
    row = len(scheduler.plan.rows) - 1
    longer = with_schedule(scheduler, going_on(scheduler.plan.schedule, row, 1), row)
    again, _ = run_of(pipe, *longer, PROMPTS, [0, 1], CALL)
    assert len(again) == 3 + (float(scheduler.plan.schedule.levels[-1]) > 1e-9)
    for step, other in zip(steps, again):
        assert torch.allclose(step.state, other.state, atol=2e-5 * float(step.state.abs().max()))


def test_the_command_writes_prints_and_draws_what_steps_miss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, picture = tmp_path / "a.json", tmp_path / "a.png"
    given = [str(MODEL), "ipndm-2m", f"{MODEL}-spanlift", "--steps", "3", "--samples", "1", "--substeps", "2"]
    given += ["--call", json.dumps(CALL), "--prompts", str(ROOT / "examples/prompts/emoji-held-out.txt")]
    assert main(["analyze", *given, "--output", str(output), "--plot", str(picture)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(row["solver"], row["step"]) for row in rows] == [
        *(("iPNDM(2M)", i) for i in range(3)),
        *(("emoji-sd-spanlift", i) for i in range(3)),
    ]
    for row in rows[:3]:  # SpanLift eqs. (7) and (8)
        assert row["error"] ** 2 == pytest.approx(row["in_span"] ** 2 + row["out_of_span"] ** 2, rel=1e-6)
        assert row["error"] >= row["out_of_span"] > 0
    assert all(row["lift_size"] > 0 and 0.5 < row["lift_out_of_span"] <= 1 for row in rows[3:])
    assert "lift_out_of_span" in capsys.readouterr().out and picture.stat().st_size > 10_000


def test_a_pipeline_that_takes_a_text_gets_one_of_this_package() -> None:
    found = analyze(str(MODEL), ["ipndm-2m"], [2], call=CALL, samples=1, substeps=1)
    assert [row["step"] for row in found] == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solvers": ["ipndm-2"]}, "did you mean 'ipndm-2m'"),
        ({"solvers": [f"{MODEL}-spanlift"], "steps": [6]}, r"learned for \[1, 2, 3, 4, 5, 7\] steps, not for 6"),
        ({"substeps": 0}, "substeps=0 must be at least 1"),
        ({"prompts": PROMPTS, "samples": 3}, "lower --samples"),
        ({"call": {"guidance": 1}}, "cannot be called with"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_computed(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dywspan.evaluate.analyze.steps_of", lambda *_, **__: pytest.fail("it was computed"))
    with pytest.raises(ValueError, match=message):
        analyze(str(MODEL), **{"solvers": ["euler"], "steps": [3], "call": CALL, "samples": 2, **options})
