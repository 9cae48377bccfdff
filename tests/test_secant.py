"""Least squares on all pairs at once: one Jacobian, kept true by what every step shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_least_squares import CALL, CONFIG, pairs, pipe  # noqa: F401
from torch import Tensor

from dywspan.distill import secant
from dywspan.distill.checkpoints import Checkpoints
from dywspan.distill.least_squares import Problem
from dywspan.distill.secant import RENEWED, Secant
from dywspan.distill.task import Task, Term
from dywspan.distill.trainer import distill


@pytest.mark.parametrize("moved", [False, True])
def test_a_secant_explains_the_step_and_leaves_other_directions_as_they_were(moved: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    method, step = Secant.__new__(Secant), torch.tensor([0.3, 0.0, -0.1], dtype=torch.float64)
    before, there = torch.randn(4, 50, generator=draw), torch.randn(50, generator=draw)
    method.columns, method.problem = [before.clone()], SimpleNamespace(residuals_there=lambda _: [there])  # type: ignore
    method._secants([], step, moved)
    (after,) = method.columns
    torch.testing.assert_close(step.float() @ after[1:], there - before[0])
    for other in ([0.0, 1.0, 0.0], [0.1, 0.0, 0.3]):  # at right angles to the step
        torch.testing.assert_close(torch.tensor(other) @ after[1:], torch.tensor(other) @ before[1:])
    assert torch.equal(after[0], there if moved else before[0])


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    own = Problem.jacobian

    def jacobian(self: Problem, sampled: Any) -> list[Tensor]:
        calls.append(self.student.vector())
        return own(self, sampled)

    monkeypatch.setattr(Problem, "jacobian", jacobian)
    return calls


def test_one_jacobian_serves_many_steps(pipe: Any, pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    teacher, train, held_out = pairs
    jacobians = counted(monkeypatch)
    config = replace(CONFIG, batch_size=len(train), updates=5, evaluate_every=5)
    error = distill(Task(pipe, teacher, [Term(2, CALL, train, held_out)], config)).tables[2].provenance
    assert len(jacobians) == 1
    assert error["held_out_error"]["after"] < 0.9 * error["held_out_error"]["before"]


def test_steps_that_fail_are_taken_back_and_then_the_jacobian_is_made_anew(
    pipe: Any,  # noqa: F811
    pairs: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher, train, held_out = pairs
    jacobians, dampings = counted(monkeypatch), list[float]()

    def worse(self: Problem, damping: float) -> Tensor:
        dampings.append(damping)
        return self.student.vector() + 0.5

    monkeypatch.setattr(Problem, "target", worse)
    config = replace(CONFIG, batch_size=len(train), updates=RENEWED + 1, time_scaling=False)
    table = distill(Task(pipe, teacher, [Term(2, CALL, train, held_out)], config)).tables[2]
    assert dampings == pytest.approx([secant.FIRST * secant.MORE**k for k in range(RENEWED + 1)])
    assert len(jacobians) == 2 and torch.equal(*jacobians)
    assert torch.equal(table.weights, torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64))  # Euler's


@pytest.mark.slow
def test_a_stopped_fit_ends_with_the_same_numbers(pipe: Any, pairs: Any, tmp_path: Path) -> None:  # noqa: F811
    teacher, train, held_out = pairs
    config = replace(CONFIG, batch_size=len(train), updates=5, bounded=0.1)
    task = Task(pipe, teacher, [Term(2, CALL, train, held_out)], config)
    folders = [Checkpoints(tmp_path / name, every=1, keep=9) for name in "ab"]
    whole = distill(task, folders[0]).tables[2]
    files = sorted((tmp_path / "a").iterdir())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / files[2].name).write_bytes(files[2].read_bytes())
    rest = distill(task, folders[1]).tables[2]
    assert torch.equal(whole.weights, rest.weights) and torch.equal(whole.time_scale, rest.time_scale)
    assert whole.provenance["evaluations"]["jacobian"] == rest.provenance["evaluations"]["jacobian"]
