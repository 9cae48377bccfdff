"""A run is a plan and a state: where a step is found, what is remembered, and what copies and pipelines may do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import AysSchedules
from test_scheduler import SD, by_hand, classical, learned, run, sample_of, with_table
from torch import Tensor

from dywspan import DyWeightScheduler, SolverTable, SpanLiftScheduler
from dywspan.bench.overhead import state_bytes
from dywspan.core import bases
from dywspan.core.bases import BASES, Base
from dywspan.core.operator import Lift

COPIES = pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"]
)


def lifted(base: DyWeightScheduler, rows: int, order: int = 2) -> SpanLiftScheduler:
    """With an operator that acts, K = ``order``."""
    size = {"channels": 4, "order": order, "width": 8}
    scheduler = SpanLiftScheduler.from_config(base.config, operator=size)
    scheduler.lifts[5] = Lift(torch.full((rows,), 0.9).double(), torch.full((rows,), 0.4).double())
    torch.nn.init.normal_(scheduler.initialize().operators["shared"].head.weight, std=0.1)
    scheduler.operators["shared"].requires_grad_(False)
    return scheduler


# ---------------------------------------------------------------------- which step it is


def test_copies_of_times_find_their_own_step_and_no_other() -> None:
    scheduler = classical("euler")
    scheduler.set_timesteps(5)
    times = scheduler.timesteps.clone()[::2]
    assert [scheduler.index_for_timestep(t) for t in times] == [0, 2, 4]
    scheduler.set_begin_index(0)
    assert [scheduler.index_for_timestep(t) for t in times] == [0, 2, 4]
    scheduler.set_timesteps(500)  # neighbours lie within what half precision rounds away
    scheduler.set_begin_index(0)
    assert scheduler.index_for_timestep(scheduler.timesteps[1].clone()) == 1
    assert scheduler.index_for_timestep(scheduler.timesteps[1].bfloat16()) in (0, 1, 2)


def test_a_copy_of_a_time_that_stands_twice_is_the_start_of_a_step(network: Any) -> None:
    scheduler = classical("heun")
    scheduler.set_timesteps(5)
    assert scheduler.timesteps[3] == scheduler.timesteps[4]
    expected = run(scheduler, network, sample_of(), scheduler.timesteps[4:])
    scheduler.set_timesteps(5)
    assert scheduler.index_for_timestep(scheduler.timesteps[4].clone()) == 4
    assert torch.equal(run(scheduler, network, sample_of(), [t.clone() for t in scheduler.timesteps[4:]]), expected)


@pytest.mark.parametrize("position", [0, 4, np.int64(1), torch.tensor(0), torch.tensor([999])], ids=str)
def test_positions_are_no_times(position: Any) -> None:
    scheduler, x = classical("euler"), sample_of()
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="is an integer, and those of `timesteps` are not: pass its elements"):
        scheduler.step(x, position, x)


# ---------------------------------------------------------------------- custom grids


def test_lists_of_levels_are_counted_as_the_host_counts_them() -> None:
    """Align Your Steps' eleven levels are ten steps."""
    sigmas = AysSchedules["StableDiffusionSigmas"]
    euler = diffusers.EulerDiscreteScheduler(**SD)
    table = SolverTable(torch.ones(10, 1), torch.ones(10), {"name": "logsnr", "sigma_min": 0.03, "sigma_max": 14.6})
    for scheduler in (
        DyWeightScheduler.from_config(euler.config).with_tables([table]),
        DyWeightScheduler.from_config(euler.config, solver="euler"),
    ):
        scheduler.set_timesteps(sigmas=sigmas)
        assert scheduler.num_inference_steps == len(scheduler.timesteps) == 10 == len(scheduler.sigmas) - 1
    flow = classical("euler", "flow")
    for given in ([1.0, 0.6, 0.3], [1.0, 0.6, 0.3, 0.0]):
        flow.set_timesteps(sigmas=given)
        assert len(flow.timesteps) == 3 and float(flow.sigmas[-1]) == 0


@pytest.mark.parametrize("kind, first", [("v_prediction", 14.0), ("flow", 1.0)])
def test_values_that_are_no_grid_are_refused(kind: str, first: float) -> None:
    scheduler = classical("euler", kind)
    for wrong in ([0.1, 0.5, first], [first, 0.5, 0.5, 0.1], [first, float("nan"), 0.1]):
        with pytest.raises(ValueError, match=r"must be finite and decrease|has no grid"):
            scheduler.set_timesteps(sigmas=[*wrong, 0.0] if kind != "flow" else wrong)
    with pytest.raises(ValueError, match=r"num_inference_steps=5, but the custom grid has 3 steps: leave one out"):
        scheduler.set_timesteps(5, sigmas=[first, 0.7, 0.3, 0.0])
    with pytest.raises(ValueError, match=r"must be a whole number; got 2\.5"):
        scheduler.set_timesteps(2.5)
    with pytest.raises(ValueError, match="at least 1"):
        scheduler.set_timesteps(sigmas=[])


# ---------------------------------------------------------------------- noise and estimates


@pytest.mark.parametrize("afs", [False, True])
def test_looking_at_the_start_changes_nothing(afs: bool, network: Any) -> None:
    """Only a product with ``init_noise_sigma`` says that the noise is scaled."""
    scheduler, x = with_table("edm", learned("edm", afs=afs)), sample_of(dtype=torch.float64)

    def end(look: Callable[[Any], Any]) -> Tensor:
        scheduler.set_timesteps(5)
        look(scheduler.init_noise_sigma)
        return run(scheduler, network, x)

    expected = end(lambda start: None)
    for look in (float, str, repr, bool, lambda start: start > 0, lambda start: f"{start:.3f}", copy.deepcopy):
        assert torch.equal(end(look), expected)
    products: list[Callable[[Any], Any]] = [
        lambda s: x * s,
        lambda s: s * x,
        lambda s: x.clone().mul_(s),
        lambda s: torch.mul(x, s),
    ]
    ends = []
    for product in products:
        scheduler.set_timesteps(5)
        ends.append(run(scheduler, network, product(scheduler.init_noise_sigma)))
    scheduler.set_timesteps(5)
    ends.append(run(scheduler, network, torch.from_numpy(x.numpy() * scheduler.init_noise_sigma)))
    for one in ends[1:]:
        torch.testing.assert_close(one, ends[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ends[0], expected, rtol=1e-2, atol=1e-2)  # its first evaluation saw unscaled noise


def test_a_samples_noise_is_the_same_alone_and_in_a_batch() -> None:
    scheduler = with_table("epsilon", learned())
    scheduler.set_timesteps(5)
    clean, noise = sample_of(3), sample_of(3).flip(0)
    for times in (
        torch.tensor([981, 500, 3]),
        torch.stack([scheduler.timesteps[1], scheduler.timesteps[3], torch.tensor(7.5)]),
    ):
        whole = scheduler.add_noise(clean, noise, times)
        for i in range(3):
            alone = scheduler.add_noise(clean[i : i + 1], noise[i : i + 1], times[i : i + 1])
            torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-6, atol=1e-6)
    level = scheduler.plan.schedule.levels[1]
    frame = scheduler.plan.scales[1]
    torch.testing.assert_close(whole[0], (frame * (clean[0] + level * noise[0])).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "edm", "flow"])
@pytest.mark.parametrize("solver", ["table", "dpmpp", "heun"])
def test_every_step_gives_the_estimate_of_x0(kind: str, solver: str, network: Any) -> None:
    scheduler = with_table(kind, learned(kind)) if solver == "table" else classical(solver, kind)
    scheduler.set_timesteps(5)
    x, prediction = sample_of(dtype=torch.float64) * scheduler.init_noise_sigma, scheduler.host.prediction
    for i, t in enumerate(scheduler.timesteps):
        output, scale = network(x, t), scheduler.plan.scales[i]
        found = scheduler.step(output, t, x)
        level = scheduler.plan.schedule.levels[i]
        d = prediction.derivative(x / scale, output, level, scheduler.plan.schedule.queries[i])
        torch.testing.assert_close(found.pred_original_sample, x / scale - level * d, rtol=1e-6, atol=1e-9)
        x = found.prev_sample
    one, two = scheduler.step(output, scheduler.timesteps[-1], x, return_dict=False)
    assert one.shape == two.shape and found["prev_sample"] is found[0]


# ---------------------------------------------------------------------- what a run remembers


@COPIES
@pytest.mark.parametrize("solver", ["table", "dpmpp", "lifted dpmpp", "ipndm"])
def test_a_copy_in_mid_run_goes_on_like_the_first(how: Any, solver: str, network: Any) -> None:
    scheduler: Any = (
        with_table("epsilon", learned()) if solver == "table" else classical(solver.split()[-1], solver_order=3)
    )
    if "lifted" in solver:
        scheduler = lifted(scheduler, 5)
    scheduler.set_timesteps(5)
    x = run(scheduler, network, sample_of() * scheduler.init_noise_sigma, scheduler.timesteps[:3])
    twin = how(scheduler)
    assert twin.step_index == 3 and len(twin.state.history) == len(scheduler.state.history) > 1
    ends = [run(s, network, x, s.timesteps[3:]) for s in (scheduler, twin)]
    assert torch.equal(*ends) and twin.state.history == () == twin.state.derivatives


@pytest.mark.parametrize(
    "solver, order, held", [("dpmpp", 2, 2), ("dpmpp", 3, 3), ("unipc", 2, 2), ("unipc", 3, 3), ("ipndm", 4, 4)]
)
def test_a_solver_holds_no_more_than_its_order(solver: str, order: int, held: int, network: Any) -> None:
    scheduler, x, most = classical(solver, solver_order=order), sample_of(), 0
    scheduler.set_timesteps(50)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
        most = max(most, state_bytes(scheduler, x.shape))
    assert most == held * x.nbytes and state_bytes(scheduler, x.shape) == 0, "and nothing when a run has ended"


@pytest.mark.parametrize("solver", ["dpmpp", "unipc"])
@pytest.mark.parametrize("kind", ["v_prediction", "flow"])
def test_remembering_data_is_the_same_solver_as_remembering_derivatives(kind: str, solver: str, network: Any) -> None:
    scheduler = classical(solver, kind, solver_order=3)
    scheduler.set_timesteps(9)
    x, plan, prediction = sample_of(dtype=torch.float64), scheduler.plan, scheduler.host.prediction
    levels = plan.schedule.levels
    table = SolverTable(
        BASES[solver](levels, prediction.signal(levels), 3, True), torch.ones(9), {"sigmas": levels.tolist()}
    )
    start = x * scheduler.init_noise_sigma / plan.scales[0]
    expected = by_hand(table, prediction, network, start)
    end = run(scheduler, network, x * scheduler.init_noise_sigma)
    torch.testing.assert_close(end, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solver", ["dpmpp", "unipc", "ipndm"])
def test_an_operator_reads_derivatives_whatever_its_base_remembers(solver: str, network: Any) -> None:
    base = classical(solver, "v_prediction")
    scheduler, seen = lifted(base, 5, order=3), []
    operator = scheduler.operators["shared"]
    operator.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    scheduler.set_timesteps(5)
    x, prediction, taken = sample_of(dtype=torch.float64), scheduler.host.prediction, []
    for i, t in enumerate(scheduler.timesteps):
        output, at = network(x, t), (scheduler.plan.schedule.levels[i], scheduler.plan.schedule.queries[i])
        taken = [prediction.derivative(x / scheduler.plan.scales[i], output, *at), *taken][:3]
        x, before = scheduler.step(output, t, x).prev_sample, x
        expected = torch.cat([before, *taken, *[torch.zeros_like(x)] * (3 - len(taken))], 1)
        torch.testing.assert_close(seen[-1], expected.float(), rtol=1e-5, atol=1e-5)


def test_operators_stay_where_they_are_and_a_run_takes_copies(network: Any) -> None:
    """Two pipelines on two devices share a solver; what learns moves, as its gradients need."""
    scheduler = lifted(with_table("epsilon", learned()), 5)
    operator = scheduler.operators["shared"]
    there = copy.copy(scheduler)
    there.set_timesteps(5, device="meta")
    scheduler.set_timesteps(5, device="cpu")
    assert there.operators["shared"] is operator is scheduler.plan.lift.operator
    assert next(there.plan.lift.operator.parameters()).is_meta and not next(operator.parameters()).is_meta
    x = torch.empty(2, 4, 3, 3, device="meta")
    for a, b in zip(scheduler.timesteps, there.timesteps):
        scheduler.step(sample_of(), a, sample_of())
        there.step(x, b, x)
    operator.requires_grad_(True)
    there.set_timesteps(5, device="meta")
    assert there.plan.lift.operator is operator and next(operator.parameters()).is_meta


def test_merging_tables_keeps_operators() -> None:
    scheduler = lifted(with_table("epsilon", learned()), 5)
    more = scheduler.with_tables([learned(n=4)])
    assert sorted(more.tables) == [4, 5] and more.operators.keys() == {"shared"} and more.lifts.keys() == {5}
    for name, value in scheduler.state_dict().items():
        assert torch.equal(more.state_dict()[name], value)


# ---------------------------------------------------------------------- shapes, compilation, one record


def test_outputs_of_another_shape_are_refused(network: Any) -> None:
    x = sample_of()
    scheduler = with_table("epsilon", learned())
    for output in (torch.randn(2, 5, 3, 3), torch.randn(2, 8, 3, 4), torch.randn(1, 4, 3, 3)):
        scheduler.set_timesteps(5)
        with pytest.raises(ValueError, match=r"The network's output has shape .*, the sample \(2, 4, 3, 3\)"):
            scheduler.step(output, scheduler.timesteps[0], x)
    tokens = torch.randn(2, 64, 40)  # 80 channels are no learned variance of packed tokens
    with pytest.raises(ValueError, match="which doubles the channels of images"):
        scheduler.step(torch.randn(2, 64, 80), scheduler.timesteps[0], tokens)


@pytest.mark.parametrize("solver", ["table", "dpmpp", "lifted"])
def test_steps_compile_in_one_graph(solver: str, network: Any) -> None:
    scheduler = classical("dpmpp") if solver == "dpmpp" else with_table("epsilon", learned())
    scheduler = lifted(scheduler, 5) if solver == "lifted" else scheduler
    scheduler.set_timesteps(5)
    expected = run(scheduler, network, sample_of())
    torch._dynamo.reset()
    step = torch.compile(scheduler.step, fullgraph=True, backend="eager")
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(0)
    x = sample_of()
    for t in scheduler.timesteps:
        x = step(network(x, t), t, x, return_dict=False)[0]
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)
    scheduler.set_timesteps(5)
    with pytest.raises(Exception, match=r"call set_begin_index\(0\) first|Observed exception"):  # PyTorch 2.6's
        step(sample_of(), scheduler.timesteps[0], sample_of())
    scheduler.set_begin_index(0)
    assert step(sample_of(), scheduler.timesteps[0], sample_of()).prev_sample.shape == x.shape


def test_a_run_does_not_begin_in_the_middle_of_a_step(network: Any) -> None:
    scheduler, x = classical("heun"), sample_of()
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="Evaluation 3 is in the middle of a step of 'heun'"):
        scheduler.step(x, scheduler.timesteps[3], x)


def test_a_new_base_is_one_function_and_one_record(monkeypatch: pytest.MonkeyPatch, network: Any) -> None:
    def leapfrog(sigmas: Tensor, alphas: Tensor, order: int) -> Tensor:
        """w = 2, -1: the slope half a step ahead, where steps are equal."""
        rows = torch.tensor([2.0, -1.0]).double().repeat(len(sigmas) - 1, 1)
        rows[0] = torch.tensor([1.0, 0.0])
        return rows

    monkeypatch.setitem(bases.BASES, "leapfrog", Base(leapfrog, 2))
    scheduler = classical("leapfrog")
    scheduler.set_timesteps(5)
    assert scheduler.order == 1 and run(scheduler, network, sample_of()).isfinite().all()
    assert "leapfrog" in bases.multistep()
    initial = SolverTable.initial(4, 2, {"name": "flow"}, with_table("flow").host.prediction, base="leapfrog")
    assert initial.weights[1].tolist() == [2.0, -1.0]
