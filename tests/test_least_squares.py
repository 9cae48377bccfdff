"""Learning from forward passes alone: differences, replay, and pipelines that have no gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_distill import CALL, EMOJI, INPUTS
from test_trainable import Subject, float64  # noqa: F401  (a fixture)
from test_trainable import fresh as fresh_subject
from torch import nn

from dywspan import DyWeightScheduler, SpanLiftScheduler
from dywspan.distill.checkpoints import Checkpoints
from dywspan.distill.config import LearningConfig
from dywspan.distill.least_squares import DIFFERENCE, Problem, _solution
from dywspan.distill.losses import latent_mse, make_loss
from dywspan.distill.progress import endpoint_error
from dywspan.distill.student import TableStudent, initial_table
from dywspan.distill.task import Task, Term
from dywspan.distill.trainer import distill
from dywspan.pipelines.memory import peak_bytes
from dywspan.pipelines.pairs import Pairs, fresh, make_pairs
from dywspan.pipelines.replay import Meter
from dywspan.pipelines.rollout import frozen, load_pipeline, sample
from dywspan.pipelines.teacher import Teacher

CONFIG = LearningConfig(optimizer="least_squares", order=2, init="euler", batch_size=2, updates=3)


def _problem(subject: Subject, solver: str = "dyweight", loss: Any = latent_mse, **change: Any) -> Problem:
    """Three steps of a tiny pipeline, two pairs."""
    pairs = subject.pairs(range(2))
    student = subject.student(solver, pairs.endpoints.shape[1:])
    config = replace(CONFIG, **change)
    return Problem(subject.pipe, student, [Term(3, subject.call, pairs, pairs)], config=config, loss=loss)


def columns_of(problem: Problem, part: int = 0, update: int = 0) -> torch.Tensor:
    """Of one part of a batch."""
    sampled = problem.sample(problem.batch(update))
    with problem.replay.installed():
        return problem.columns(sampled[part])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline", "SanaPipeline"])
@pytest.mark.parametrize(("solver", "latent"), [("dyweight", "mse"), ("spanlift", "mse"), ("dyweight", "rmse")])
def test_columns_are_those_of_autograd(name: str, solver: str, latent: str) -> None:
    """u'J from differences beside the gradient of u'r, for some u; r weighed as where learning stands."""
    subject = fresh_subject(name)
    loss = make_loss(subject.pipe, latent)
    problem = _problem(subject, solver, loss, difference=1e-6)
    student, pairs, columns = problem.student, problem.batch(0)[0], columns_of(problem)
    with frozen(subject.pipe):
        student.apply()
        end, _ = sample(subject.pipe, student.scheduler, 3, pairs.inputs, pairs.seeds, subject.call)
        targets = pairs.endpoints.to(end)
        residuals = problem.residuals(subject.pipe, end, targets, end.detach()).flatten()
        value = loss(subject.pipe, end, targets)

    def gradient(scalar: torch.Tensor) -> torch.Tensor:
        slopes = torch.autograd.grad(scalar, student.parameters(), retain_graph=True)
        return torch.cat([slope[mask] for slope, (_, mask) in zip(slopes, student.numbers())])

    torch.testing.assert_close(columns[0], residuals.detach())
    for seed in range(3):
        u = torch.randn(len(residuals), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        exact = gradient(u @ residuals)
        assert float((columns[1:] @ u - exact).norm() / exact.norm()) < 1e-3
    factor = {"mse": 2, "rmse": 1}[latent] / len(pairs)  # of |r|^2 and of |r|
    exact = gradient(value)
    assert float((factor * columns[1:] @ columns[0] - exact).norm() / exact.norm()) < 1e-3


@pytest.mark.usefixtures("float64")
def test_the_model_remembers_earlier_batches_less() -> None:
    """[1, p] M [1, p]' is the weighted mean of what each batch showed where it was seen."""
    problem = _problem(fresh_subject("StableDiffusionPipeline"), batch_size=1)
    start, draw = problem.student.vector(), torch.Generator().manual_seed(0)
    shown = []
    for update, distance in enumerate((0.0, 0.1, 0.2)):
        problem.student.move(start + distance)
        shown.append((problem.student.vector(), columns_of(problem, update=update)))
        problem.see(problem.sample(problem.batch(update)))
    m = problem.memory
    assert m == 0.5, "of two batches no more"
    weights = torch.tensor([m**2, m, 1.0], dtype=torch.float64)
    assert problem.weight == pytest.approx(float(weights.sum()))
    for _ in range(3):
        p = start + 0.1 * torch.randn(len(start), generator=draw, dtype=torch.float64)
        values = [(c[0] + (p - at) @ c[1:]).square().sum() / c[0].square().sum() for at, c in shown]
        one = torch.cat([p.new_ones(1), p])
        torch.testing.assert_close(one @ problem.model @ one, (weights * torch.stack(values)).sum())


@pytest.mark.usefixtures("float64")
def test_without_damping_the_target_is_the_models_least() -> None:
    problem = _problem(fresh_subject("StableDiffusionPipeline"), ridge=0.1)
    problem.see(problem.sample(problem.batch(0)))
    p = problem.target(0.0).requires_grad_()
    one = torch.cat([p.new_ones(1), p])
    value = one @ (problem.model / problem.weight) @ one + 0.1 * (p - problem.origin).square().sum()
    (slope,) = torch.autograd.grad(value, p)
    assert float(slope.abs().max()) < 1e-8
    here = problem.student.vector()
    assert torch.equal(here, problem.origin), "looking for it moves nothing"
    assert 0 < float((problem.target(1e3) - here).norm()) < 0.1 * float((p.detach() - here).norm()), "damped"


def test_at_a_bound_columns_are_seen_from_the_other_side() -> None:
    """The number that is as large as it may be has the column it would have without bounds."""
    subject = fresh_subject("StableDiffusionPipeline")
    free, bounded = _problem(subject), _problem(subject)
    student = bounded.student
    assert isinstance(student, TableStudent)
    student.bounded = 0.1
    at = free.student.vector()
    at[-1] = 1.2
    student.move(at)
    at = student.vector()
    assert 1.09 < float(at[-1]) < 1.1
    free.student.move(at)
    ours, expected = columns_of(bounded)[1:], columns_of(free)[1:]
    assert float((ours - expected).norm() / expected.norm()) < 1e-2
    assert float(ours[-1].norm()) > 0.5 * float(expected[-1].norm()) > 0


def test_a_solution_stops_at_bounds_and_the_other_numbers_know() -> None:
    """Of a quadratic, the least in the box: by hand, x_1 = 0.1 at its bound, x_0 what is best then."""
    subject = fresh_subject("StableDiffusionPipeline")
    student = _problem(subject).student
    assert isinstance(student, TableStudent)
    start, student.bounded = student.vector(), 0.1
    student.move(start)
    size = len(start)
    matrix, gradient = torch.eye(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    matrix[0, -1] = matrix[-1, 0] = 0.5
    gradient[-1] = -1.0  # alone, the last would go on by 4/3
    reached = _solution(student, start, matrix, gradient) - start
    expected = 0.1 * (1 - 1e-3)
    torch.testing.assert_close(float(reached[-1]), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(float(reached[0]), -0.5 * expected, rtol=0, atol=1e-9)


def test_replay_is_exact_and_spares_what_does_not_change() -> None:
    subject = fresh_subject("StableDiffusionPipeline")
    calls: dict[bool, int] = {}
    results = []
    for replays in (True, False):
        problem, meter = _problem(subject), Meter(subject.pipe)
        problem.replays = replays
        with meter.running():
            problem.see(problem.sample(problem.batch(0)))
            results.append(problem.model)
        calls[replays] = meter.counts["student"]
    assert torch.equal(*results)
    # Base 3. Of the weights, row 0 changes two calls, row 1 (two numbers) one, the last row none; s_i changes 3 - i.
    every, needed = 3 * (1 + 5 + 3), 3 + 2 + 2 * 1 + 0 + (3 + 2 + 1)
    assert calls[True] * every == calls[False] * needed


def test_a_network_that_answers_at_random_is_not_replayed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = fresh_subject("StableDiffusionPipeline")
    problem, unet = _problem(subject), subject.pipe.unet
    problem.check_replay()
    assert problem.replays and "no replay" not in capsys.readouterr().out
    forward = unet.forward
    monkeypatch.setattr(unet, "forward", lambda *a, **k: (forward(*a, **k)[0] + 1e-3 * torch.rand(()),))
    problem.check_replay()
    assert not problem.replays and "no replay" in capsys.readouterr().out


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(str(EMOJI))


@pytest.fixture(scope="module")
def pairs(pipe: Any) -> tuple[Teacher, Pairs, Pairs]:
    teacher = Teacher(DyWeightScheduler.from_config(pipe.scheduler.config, solver="ipndm"), 12)
    made = [make_pairs(pipe, teacher, INPUTS, range(s, s + 4), call=CALL) for s in (0, 10)]
    return teacher, made[0], made[1]


@contextmanager
def rounded(network: nn.Module) -> Iterator[None]:
    """Every layer's output in bfloat16's digits: by hand, as processors differ in how they compute with it."""
    layers = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [m.register_forward_hook(lambda _, __, output: output.bfloat16().float()) for m in layers]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.slow
def test_the_default_difference_stands_out_of_bfloat16s_rounding(pipe: Any, pairs: Any) -> None:
    """Columns of a rounded network beside those of float32, of the same difference."""
    scheduler = DyWeightScheduler.from_config(pipe.scheduler.config)
    student, term = (
        TableStudent(scheduler, initial_table(scheduler, 3, CONFIG, None)),
        Term(3, CALL, pairs[1], pairs[1]),
    )

    def problem(**change: Any) -> Problem:
        return Problem(pipe, student, [term], config=replace(CONFIG, **change), loss=latent_mse)

    def agreement(difference: float) -> float:
        expected = columns_of(problem(difference=difference))[1:].double()
        with rounded(pipe.unet):
            found = columns_of(problem(difference=difference))[1:].double()
        return float(torch.nn.functional.cosine_similarity(found, expected).median())

    default = problem(mixed_precision="bf16").difference
    assert default == DIFFERENCE[torch.bfloat16] > problem(mixed_precision="no").difference
    assert agreement(default) > 0.7  # 0.9
    assert agreement(1e-3) < 0.3  # 0.1


def test_memory_is_that_of_sampling(pipe: Any, pairs: Any) -> None:
    """Here latents are 1/70 of a call's activations, far more than on a large network, where 5 % are not reached."""
    train = pairs[1]
    scheduler = DyWeightScheduler.from_config(pipe.scheduler.config)
    student = TableStudent(scheduler, initial_table(scheduler, 3, CONFIG, None))
    config = replace(CONFIG, batch_size=4)
    problem = Problem(pipe, student, [Term(3, CALL, train, train)], config=config, loss=latent_mse)
    batch = problem.batch(0)
    problem.see(problem.sample(batch))  # what is made once and kept is not counted
    _, sampling = peak_bytes(lambda: problem.sample(batch))
    _, learning = peak_bytes(lambda: problem.see(problem.sample(batch)))
    kept = 3 * (1 + len(student.vector())) * train.endpoints.nbytes  # columns: float32, and in float64 for the sums
    assert sampling < learning < 1.1 * sampling + kept


@pytest.mark.slow
def test_few_iterations_learn_more_than_many_gradient_steps(pipe: Any, pairs: Any) -> None:
    teacher, train, held_out = pairs
    table = distill(
        Task(pipe, teacher, [Term(2, CALL, train, held_out)], replace(CONFIG, updates=6, evaluate_every=2))
    ).tables[2]
    error, spent = table.provenance["held_out_error"], table.provenance["evaluations"]
    adam = LearningConfig(updates=12, batch_size=4, lr=3e-2, init="euler", evaluate_every=4, recompute=False)
    other = distill(Task(pipe, teacher, [Term(2, CALL, train, held_out)], adam)).tables[2].provenance
    assert error["after"] < 0.9 * error["before"]
    assert error["after"] < other["held_out_error"]["after"]
    assert "backward" not in spent
    assert "student" not in spent
    assert spent["jacobian"] < other["evaluations"]["student"] + 2 * other["evaluations"]["backward"]


def test_a_step_that_harms_the_next_batch_is_tried_shorter_and_given_up(
    pipe: Any, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, train, held_out = pairs
    dampings: list[float] = []

    def worse(self: Problem, damping: float) -> torch.Tensor:
        dampings.append(damping)
        return self.student.vector() + 0.5

    monkeypatch.setattr(Problem, "target", worse)
    config = replace(CONFIG, updates=2, time_scaling=False)
    table = distill(Task(pipe, teacher, [Term(2, CALL, train, held_out)], config)).tables[2]
    assert dampings == [10.0**k for k in range(10)], "five times an update, and the next goes on from there"
    assert torch.equal(table.weights, torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64))  # Euler's
    assert table.provenance["held_out_error"]["after"] == table.provenance["held_out_error"]["before"]


@pytest.mark.slow
def test_a_stopped_fit_ends_with_the_same_numbers(pipe: Any, pairs: Any, tmp_path: Path) -> None:
    teacher, train, held_out = pairs
    task = Task(pipe, teacher, [Term(2, CALL, train, held_out)], replace(CONFIG, updates=5, bounded=0.1))
    folders = [Checkpoints(tmp_path / name, every=1, keep=9) for name in "ab"]
    whole = distill(task, folders[0]).tables[2]
    files = sorted((tmp_path / "a").iterdir())
    assert len(files) == 5
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / files[1].name).write_bytes(files[1].read_bytes())
    rest = distill(task, folders[1]).tables[2]
    assert torch.equal(whole.weights, rest.weights) and torch.equal(whole.time_scale, rest.time_scale)
    assert not any(name.startswith("optimizer") for name in load_file(files[-1]))
    assert whole.provenance["evaluations"]["jacobian"] == rest.provenance["evaluations"]["jacobian"]


@pytest.mark.slow
def test_fresh_pairs_are_learned_from_too(pipe: Any, pairs: Any) -> None:
    """Each is made once, though two updates see it."""
    teacher, _, held_out = pairs
    endless = fresh(pipe, teacher, INPUTS, 100, CALL)
    table = distill(
        Task(pipe, teacher, [Term(2, CALL, endless, held_out)], replace(CONFIG, batch_size=4, updates=4))
    ).tables[2]
    error, spent = table.provenance["held_out_error"], table.provenance["evaluations"]
    assert error["after"] < 0.9 * error["before"]
    assert table.provenance["pairs"]["train"] == 20
    assert spent["fresh"] * len(held_out) == 20 * spent["teacher"]


@pytest.mark.slow
def test_alpha_and_beta_are_fitted_and_the_operator_stays(pipe: Any, pairs: Any) -> None:
    """For another guidance scale than that which the operator was learned for."""
    learned = SpanLiftScheduler.from_pretrained(EMOJI.parent / "emoji-sd-spanlift")
    teacher, call = pairs[0], {**CALL, "guidance_scale": 8.0}
    train, held_out = (make_pairs(pipe, teacher, INPUTS, range(s, s + 4), call=call) for s in (0, 10))
    config = replace(CONFIG, batch_size=4, updates=8)
    term = Term(3, call, train, held_out)
    found = distill(Task(pipe, teacher, [term], config, solver="spanlift", base=learned))
    error = found.lifts[3].provenance["held_out_error"]
    assert error["after"] < 0.97 * error["before"]
    assert endpoint_error(pipe, found, 3, held_out, call) == pytest.approx(error["after"], rel=1e-5)
    assert sorted(found.lifts) == [3] and not torch.equal(found.lifts[3].alpha, learned.lifts[3].alpha)
    before = learned.operators[learned.lifts[3].operator].state_dict()
    for name, value in found.operators[found.lifts[3].operator].state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(ValueError, match=r"learned for \[1, 2, 3, 4, 5, 7\] steps, not for \[6\]"):
        distill(Task(pipe, teacher, [replace(term, steps=6)], config, solver="spanlift", base=learned))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "compiled"])
def test_pipelines_without_gradients_are_learned_from(kind: str) -> None:
    pipe = load_pipeline(str(EMOJI))
    if kind == "int8":
        pipe.unet = torch.ao.quantization.quantize_dynamic(pipe.unet, {torch.nn.Linear}, dtype=torch.qint8)
        assert any(type(m).__module__.startswith("torch.ao.nn.quantized") for m in pipe.unet.modules())
    else:
        pipe.unet.forward = torch.compile(pipe.unet.forward, backend="eager")
    teacher = Teacher(DyWeightScheduler.from_config(pipe.scheduler.config, solver="ipndm"), 8)
    train, held_out = (make_pairs(pipe, teacher, INPUTS, range(s, s + 4), call=CALL) for s in (0, 10))
    config = replace(CONFIG, init="ipndm", batch_size=4, updates=2)  # a start that any fit leaves far behind
    table = distill(Task(pipe, teacher, [Term(2, CALL, train, held_out)], config)).tables[2]
    error = table.provenance["held_out_error"]
    assert error["after"] < 0.6 * error["before"]
    assert Counter(map(type, (table.weights, table.time_scale)))[torch.Tensor] == 2


def test_what_cannot_be_a_sum_of_squares_is_said_at_once(pipe: Any, pairs: Any) -> None:
    teacher, train, held_out = pairs
    with pytest.raises(ValueError, match=r"latent_l1.*no sum of squares"):
        distill(Task(pipe, teacher, [Term(2, CALL, train, held_out)], CONFIG, make_loss(pipe, "l1")))


def test_squared_losses_are_the_squares_of_their_residuals(pipe: Any) -> None:
    target = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    z = target + torch.tensor([0.1, 2.0])[:, None, None, None] * noise  # one of them ended elsewhere
    for loss in (
        latent_mse,
        make_loss(pipe),
        make_loss(pipe, "rmse"),
        make_loss(pipe, "rmse", "encoder", 0.3),
        make_loss(pipe, "mse", "encoder", 0.3),
        make_loss(pipe, "mse", "encoder", 0.0),
    ):
        rows = loss.residuals(pipe, z, target, z)  # type: ignore[attr-defined]
        torch.testing.assert_close(rows.square().sum(1).mean(), loss(pipe, z, target), rtol=1e-4, atol=1e-6)
