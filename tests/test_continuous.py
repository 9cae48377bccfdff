"""One function that writes the tables of every number of steps: what it keeps, what it learns, what holds it."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny as tp
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import given
from hypothesis import strategies as st
from test_core import FRAMES, GRID_SPECS, HIGH, INSTANCES, LOW, Gaussian, slope
from test_distill import EMOJI
from test_least_squares import columns_of
from test_trainable import Subject, fresh
from test_trainable import float64 as float64
from torch import Tensor

from dywspan import DyWeightScheduler, SpanLiftScheduler, bind
from dywspan.artifact import continuous_to_json, read_continuous, shown_tables
from dywspan.core.bases import BASES, multistep
from dywspan.core.continuous import FEATURES, GUIDED, ContinuousLift, ContinuousTable, features
from dywspan.core.grid import make_grid
from dywspan.core.prediction import EDM, Flow, Prediction
from dywspan.core.step import step
from dywspan.core.table import SolverTable
from dywspan.distill.config import DistillConfig, LearningConfig
from dywspan.distill.least_squares import Problem
from dywspan.distill.losses import latent_mse
from dywspan.distill.progress import endpoint_error
from dywspan.distill.setup import TRAIN_SEED, prepare
from dywspan.distill.student import ContinuousStudent, Student
from dywspan.distill.task import Task, Term, make_terms
from dywspan.distill.trainer import distill
from dywspan.pipelines.classical import default_grid
from dywspan.pipelines.pairs import ends, make_pairs
from dywspan.pipelines.replay import Meter
from dywspan.pipelines.rollout import load_pipeline, rollout
from dywspan.pipelines.teacher import Teacher

EPSILON = INSTANCES["epsilon"][0]
FLOW_GRID = {"name": "flow", "shift": 3.0}
GRIDS: dict[str, tuple[dict[str, Any], Prediction, float | None]] = {
    "discrete": ({"name": "discrete", **GRID_SPECS["discrete"]}, EPSILON, None),
    "discrete to 0": ({"name": "discrete", "sigma_min": 0.0, "sigma_max": 14.6146}, EPSILON, None),
    "polynomial": ({"name": "polynomial", **GRID_SPECS["polynomial"]}, EDM(), None),
    "flow": (FLOW_GRID, Flow(), None),
    "flow with mu": ({"name": "flow"}, Flow(), 0.83),
}


def learned(order: int = 2, grid: Any = None, size: float = 0.1, **options: Any) -> ContinuousTable:
    """As training leaves it: no coefficient is zero, no number is round."""
    draw = torch.Generator().manual_seed(3 + order)
    coefficients = size * torch.randn(order + 1, len(FEATURES), generator=draw, dtype=torch.float64)
    return ContinuousTable(coefficients, FLOW_GRID if grid is None else grid, **options)


def on(tiny: tp.Tiny, table: ContinuousTable) -> DyWeightScheduler:
    return DyWeightScheduler.from_config(tiny.pipe.scheduler.config).with_continuous(table)


def assert_same(table: SolverTable, other: SolverTable) -> None:
    assert torch.equal(table.weights, other.weights) and torch.equal(table.time_scale, other.time_scale)


# ---------------------------------------------------------------------- the function


@given(
    n=st.integers(2, 50),
    order=st.integers(1, 3),
    base=st.sampled_from(multistep()),
    grid=st.sampled_from(sorted(GRIDS)),
)
def test_without_corrections_it_is_its_base_bit_for_bit(n: int, order: int, base: str, grid: str) -> None:
    spec, prediction, mu = GRIDS[grid]
    table = ContinuousTable.initial(order, spec, base=base).table(n, prediction, mu)
    assert_same(table, SolverTable.initial(n, order, spec, prediction, base=base, mu=mu))
    sigmas = make_grid(spec, n, prediction, mu)
    rows = BASES[base](sigmas, prediction.signal(sigmas), min(order, BASES[base].highest))
    if rows.shape[1] <= order:  # others look back further than K
        assert torch.equal(table.weights[:, : rows.shape[1]], rows) and not table.weights[:, rows.shape[1] :].any()


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline", "StableDiffusionPipeline"])
@pytest.mark.parametrize(("base", "order"), [("adams", 2), ("deis", 3)])
def test_in_a_pipeline_an_unlearned_one_is_the_classical_solver(name: str, base: str, order: int) -> None:
    tiny = tp.build(name)
    config = tiny.pipe.scheduler.config
    grid = default_grid(DyWeightScheduler.from_config(config))
    ours = on(tiny, ContinuousTable.initial(order, grid, base=base))
    classical = DyWeightScheduler.from_config(
        config, solver=base, solver_order=order, grid=grid, lower_order_final=False
    )
    changes: list[dict[str, Any]] = [{}, {}]
    if not tiny.flow:  # a learned solver starts from sigma_0 * noise, a classical one at unit variance
        ours.set_timesteps(4)
        noise = tp.normal([0], 4, 16, 16)
        changes = [{"latents": noise}, {"latents": noise * ours.init_noise_sigma}]
    for n in (2, 4):
        one, two = (tp.run(tiny, s, [0], num_inference_steps=n, **c) for s, c in zip((ours, classical), changes))
        assert torch.equal(one.output, two.output) and torch.equal(one.timesteps, two.timesteps)


def told(problem: Gaussian) -> Callable[[Tensor, Any, Any], Tensor]:
    """The derivative by a network that is told tau: d = (x - D(x; tau)) / sigma in the VE frame, v(x; tau) in flow."""
    return lambda x, sigma, tau: problem.derivative(x, tau) * (1 if problem.is_flow else tau / sigma)


@pytest.mark.parametrize("problem", FRAMES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_corrections_keep_the_order_of_convergence(order: int, problem: Gaussian) -> None:
    """Horizon 1, to see the limit at few steps. Of K = 3 the first row, which alone would cap it, is exact history."""
    prediction, begin = (Flow() if problem.is_flow else EDM()), max(0, order - 2)

    def error(function: ContinuousTable, n: int) -> Tensor:
        sigmas = (HIGH**0.5 + torch.arange(-begin, n + 1).double() / n * (LOW**0.5 - HIGH**0.5)) ** 2
        schedule = function.table(n + begin, prediction, sigmas=sigmas).schedule(prediction)
        x = problem.exact(schedule.levels[begin])
        history = tuple(problem.derivative(problem.exact(s), s) for s in sigmas[:begin].flip(0))
        for row, level, tau in list(zip(schedule.increments, schedule.levels, schedule.queries))[begin:]:
            # What a network that is told tau says: (x - D(x; tau)) / sigma in the VE frame, v(x; tau) in flow.
            d = problem.derivative(x, tau) * (1 if problem.is_flow else tau / level)
            x, history = step(row, x, d, history)
        return x - problem.exact(sigmas[-1])

    corrected = learned(order, size=1.0, horizon=1.0)
    base = replace(corrected, coefficients=torch.zeros_like(corrected.coefficients))
    assert abs(slope(lambda n: float(error(corrected, n).norm())) - order) < 0.35
    assert abs(slope(lambda n: float((error(corrected, n) - error(base, n)).norm())) - order) < 0.35


@pytest.mark.parametrize("mu", [0.01 * k for k in range(0, 120, 7)])
def test_no_shift_takes_flows_first_level_past_1(mu: float) -> None:
    """Rounded up, sigma_0 = 1 would have a negative signal level, whose logarithm is no number."""
    for base in ("adams", "dpmpp", "unipc"):
        assert bool(learned(grid={"name": "flow"}, base=base).table(4, Flow(), mu).weights.isfinite().all())
    above = torch.tensor([1 + 2**-52, 0.5, 0.0], dtype=torch.float64)
    assert torch.equal(features(above, 1 - above)[:, 1], features(above.clamp(max=1), 1 - above.clamp(max=1))[:, 1])


@pytest.mark.parametrize("n", [1, 2, 7, 50])
@pytest.mark.parametrize("grid", GRIDS)
def test_features_are_bounded_and_mean_what_they_say(grid: str, n: int) -> None:
    spec, prediction, mu = GRIDS[grid]
    sigmas = make_grid(spec, n, prediction, mu)
    phi = dict(zip(FEATURES, features(sigmas, prediction.signal(sigmas)).unbind(1)))
    assert all(bool(value.isfinite().all()) for value in phi.values())
    u, ones = phi["u"], torch.ones(n, dtype=torch.float64)
    ratio = (sigmas / prediction.signal(sigmas))[:-1]  # tanh(log(r) / 4) = (sqrt r - 1) / (sqrt r + 1), infinite r too
    torch.testing.assert_close(u, torch.where(ratio.isinf(), 1.0, (ratio.sqrt() - 1) / (ratio.sqrt() + 1)))
    assert bool((u.diff() < 0).all()) and torch.equal(phi["1"], ones)
    torch.testing.assert_close(phi["2u^2-1"], torch.cos(2 * torch.acos(u)), rtol=0, atol=1e-9)
    assert abs(float(phi["delta"].sum())) < 1e-9 and bool((phi["delta"] > -1).all())
    torch.testing.assert_close(phi["delta u"], phi["delta"] * u)
    assert phi["first"].tolist() == [float(i == 0) for i in range(n)]
    assert phi["last"].tolist() == [float(i == n - 1) for i in range(n)]
    assert phi["last but one"].tolist() == [float(i == n - 2) for i in range(n)]


def test_delta_is_zero_where_steps_are_equally_long_in_u() -> None:
    u = torch.linspace(0.9, -0.8, 7, dtype=torch.float64)
    sigmas = ((1 + u) / (1 - u)) ** 2
    delta = features(sigmas, torch.ones(7))[:, FEATURES.index("delta")]
    torch.testing.assert_close(delta, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("grid", "prediction"), [(FLOW_GRID, Flow()), (GRIDS["discrete to 0"][0], EPSILON)])
def test_each_coefficient_moves_what_it_belongs_to(grid: dict[str, Any], prediction: Prediction) -> None:
    """A row of C at a time, only "1": levels at f^(K-1), nabla^m at f^(K-m), s = exp(f^K c)."""
    n, order, c, horizon = 6, 3, 0.37, 4.0
    fade, start = 1 / (1 + n / horizon), ContinuousTable.initial(order, grid, horizon=horizon)
    base = start.table(n, prediction)

    def moved(row: int) -> SolverTable:
        coefficients = start.coefficients.clone()
        coefficients[row, 0] = c
        return replace(start, coefficients=coefficients).table(n, prediction)

    for m, difference in ((1, [1, -1, 0]), (2, [1, -2, 1])):
        expected = c * fade ** (order - m) * torch.tensor(difference, dtype=torch.float64).repeat(n, 1)
        expected[:m] = 0  # m + 1 derivatives make the first difference
        torch.testing.assert_close(moved(m).weights - base.weights, expected)
        assert torch.equal(moved(m).time_scale, base.time_scale)
    torch.testing.assert_close(moved(order).time_scale.log(), torch.full((n,), c * fade**order, dtype=torch.float64))
    assert torch.equal(moved(order).weights, base.weights)

    def place(table: SolverTable) -> Tensor:
        levels = table.schedule(prediction).levels[:-1].double()
        ratio = (levels / prediction.signal(levels)).sqrt()
        return torch.cat([torch.where(ratio.isinf(), 1.0, (ratio - 1) / (ratio + 1)), -torch.ones(1)])

    levels, move = moved(0), c * fade ** (order - 1)
    p, found = ((u[1:-1] + 1) / (u[0] + 1) for u in (place(base), place(levels)))
    torch.testing.assert_close(found.logit() - p.logit(), torch.full_like(p, move))
    lengths = levels.weights.sum(1)
    assert float(lengths[-1]) == pytest.approx(math.exp(move))
    moved_to = levels.schedule(prediction).levels.clone()
    moved_to[-1] = 0
    expected = BASES["adams"](moved_to, prediction.signal(moved_to), order)
    torch.testing.assert_close(levels.weights / lengths[:, None], expected)


def test_levels_out_of_their_order_are_refused() -> None:
    start = ContinuousTable.initial(2, FLOW_GRID)
    coefficients = start.coefficients.clone()
    coefficients[0, FEATURES.index("last but one")] = 9.0
    with pytest.raises(ValueError, match=r"move the levels out of their order: \[1\.0, "):
        replace(start, coefficients=coefficients).table(5, Flow())


# ---------------------------------------------------------------------- in an artefact


def test_it_survives_an_artefact_bit_for_bit(tmp_path: Path) -> None:
    made = {"held_out_error": {"3": {"before": 0.3, "after": 0.1}}}
    table = learned(3, base="deis", horizon=5.5, provenance=made)
    own = DyWeightScheduler(prediction_type="flow_prediction").with_continuous(table)
    own.save_pretrained(tmp_path)
    again = DyWeightScheduler.from_pretrained(tmp_path)
    for other in (
        again,
        copy.deepcopy(own),
        DyWeightScheduler.from_config(again.config, continuous=again.config["continuous"]),
    ):
        found = other.continuous
        assert torch.equal(found.coefficients, table.coefficients) and found.provenance == made
        assert (found.grid, found.base, found.horizon) == (FLOW_GRID, "deis", 5.5)
        assert_same(found.table(7, Flow()), table.table(7, Flow()))
    text = (tmp_path / "scheduler_config.json").read_text(encoding="utf-8")
    assert json.loads(text)["continuous"]["features"] == list(FEATURES)
    assert len([line for line in text.splitlines() if line.count(",") >= len(FEATURES) - 1]) >= 4, "a row is one line"


GOOD = continuous_to_json(learned())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"coefficients": [[0.0] * 7] * 3}, r"\(K \+ 1\) x 8 numbers; got shape \(3, 7\)"),
        ({"coefficients": [[0.0] * 8]}, r"\(K \+ 1\) x 8 numbers; got shape \(1, 8\)"),
        ({"coefficients": [[0.0] * 7, [0.0] * 6]}, r"rows of the same length; they have \[7, 6\]"),
        ({"coefficients": []}, r"rows of the same length; they have \[\]"),
        ({"coefficients": "zeros"}, "must be a list of rows"),
        ({"coefficients": [["a"] * 7] * 2}, "row 0 must hold numbers only"),
        ({"coefficients": [[10**400] * 7] * 2}, "too large"),
        ({"coefficients": [[float("nan")] * 8] * 2}, "must be finite; got .*nan"),
        ({"coefficients": [[0.0, float("inf"), *[0.0] * 6]] * 2}, "must be finite; got .*inf"),
        ({"base": "heun"}, r"Unknown base solver 'heun': use one of \['adams'"),
        ({"base": ["adams"]}, "Unknown base solver"),
        ({"features": ["1", "u"]}, r"features are \['1', 'u'\], this version's .*upgrade dywspan"),
        ({"features": None}, "features are None"),
        ({"grid": {"sigmas": [1.0, 0.5, 0.0]}}, "needs a named grid, not a list of sigmas"),
        ({"grid": {"name": "cosine"}}, "Unknown grid 'cosine'"),
        ({"grid": {"name": "polynomial", "sigma_max": 2.0}}, "sigma_min"),
        ({"grid": "flow"}, "A grid is a mapping"),
        ({"grid": 5}, "A grid is a mapping"),
        ({"horizon": 0}, "horizon=0 must be a positive number"),
        ({"horizon": "8"}, "horizon='8' must be a positive number"),
        ({"horizon": float("nan")}, "horizon=nan"),
        ({"horizon": float("inf")}, "horizon=inf"),
        ({"horizon": True}, "horizon=True"),
        ({"horizon": 10**400}, "horizon=a whole number of 1329 bits"),
        ({"coefficients": [[0.0] * 8] * 10}, "number of coefficients rows=10 must be a whole number from 1 to 9"),
        ({"coefficients": [[1e7, *[0.0] * 7]] * 2}, r"none may be larger than 1e\+06"),
        ({"grid": {"name": "flow", "shfit": 3.0}}, "no parameter .*shfit"),
        (
            {"guidance_scale": 10**400, "coefficients": [[0.0] * 16] * 2, "features": list(FEATURES + GUIDED)},
            "guidance_scale=a whole",
        ),
    ],
    ids=str,
)
def test_damage_is_named(damage: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)Damaged continuous table: .*{said}.*Download or distil it again"):
        DyWeightScheduler(prediction_type="flow_prediction", continuous={**GOOD, **damage})


@pytest.mark.parametrize("data", [{}, {"grid": FLOW_GRID}, [], "adams", 3], ids=str)
def test_what_is_no_continuous_table_is_said(data: Any) -> None:
    with pytest.raises(ValueError, match="Damaged continuous table: it is a mapping with at least 'coefficients' and"):
        read_continuous(data)


def test_base_and_horizon_may_be_left_out() -> None:
    table = read_continuous({"coefficients": GOOD["coefficients"], "grid": FLOW_GRID})
    assert table is not None and (table.base, table.horizon, dict(table.provenance)) == ("adams", 8.0, {})
    assert read_continuous(None) is None


# ---------------------------------------------------------------------- in a scheduler


def test_tables_win_for_their_own_count_and_the_function_writes_all_others() -> None:
    function, prediction = learned(), Flow()
    table = SolverTable(learned(1).table(3, prediction).weights, torch.full((3,), 0.9).double(), FLOW_GRID)
    empty = DyWeightScheduler(prediction_type="flow_prediction", solver="heun")
    for both in (
        empty.with_tables([table]).with_continuous(function),
        empty.with_continuous(function).with_tables([table]),
    ):
        for n in (1, 2, 3, 4, 17):
            both.set_timesteps(n)
            expected = (table if n == 3 else function.table(n, prediction)).schedule(prediction)
            assert torch.equal(both.sigmas, expected.levels.float()) and both.order == 1
            assert torch.equal(both.timesteps, (1000 * expected.queries).float())
            assert both.plan.rows == expected.increments.tolist()
    assert sorted(shown_tables(both)) == [3]
    shown = shown_tables(empty.with_continuous(function))
    assert len(shown) > 1 and all(len(table.weights) == n for n, table in shown.items())


def test_the_resolution_that_a_pipeline_is_called_with_shapes_the_table() -> None:
    tiny, function = tp.build("FluxPipeline"), learned(grid={"name": "flow"})
    scheduler, prediction, outputs = on(tiny, function), Flow(), []
    for side in (32, 64):
        outputs.append(tp.run(tiny, scheduler, [0], height=side, width=side).output)
        mu = calculate_shift((side // 4) ** 2)
        expected = function.table(3, prediction, mu)
        torch.testing.assert_close(scheduler.sigmas, expected.schedule(prediction, mu).levels.float())
        found = torch.tensor(scheduler.plan.rows, dtype=torch.float64)
        torch.testing.assert_close(found, expected.schedule(prediction, mu).increments, rtol=1e-5, atol=1e-6)
        other = function.table(3, prediction, mu + 0.1)
        assert float((other.weights - expected.weights).abs().max()) > 1e-4, "the weights too depend on mu"
        with_table = DyWeightScheduler.from_config(tiny.pipe.scheduler.config).with_tables([expected])
        same = tp.run(tiny, with_table, [0], height=side, width=side).output
        torch.testing.assert_close(outputs[-1], same, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "given", "levels"),
    [
        ("StableDiffusion3Pipeline", {"sigmas": [1.0, 0.7, 0.2]}, lambda s: 3 * s / (1 + 2 * s)),
        ("StableDiffusionPipeline (v-prediction)", {"sigmas": [14.0, 3.0, 0.4, 0.0]}, lambda s: s),
        ("StableDiffusionPipeline (v-prediction)", {"timesteps": [990, 480, 35]}, EPSILON.sigma),
    ],
    ids=["flow sigmas", "sigmas", "timesteps"],
)
def test_values_given_in_the_call_are_the_grid(name: str, given: Any, levels: Callable[[Tensor], Tensor]) -> None:
    tiny = tp.build(name)
    function = learned(grid=default_grid(DyWeightScheduler.from_config(tiny.pipe.scheduler.config)))
    scheduler = on(tiny, function)
    prediction = scheduler.host.prediction
    (values,) = given.values()
    sigmas = torch.zeros(4, dtype=torch.float64)
    sigmas[: len(values)] = levels(torch.tensor(values, dtype=torch.float64))
    expected = function.table(3, prediction, sigmas=sigmas)
    trace = tp.run(tiny, scheduler, [0], num_inference_steps=3, **given)
    torch.testing.assert_close(scheduler.sigmas, expected.schedule(prediction).levels.float(), rtol=1e-4, atol=1e-5)
    found = torch.tensor(scheduler.plan.rows, dtype=torch.float64)
    torch.testing.assert_close(found, expected.schedule(prediction).increments, rtol=1e-3, atol=1e-4)
    nominal = tp.run(tiny, scheduler, [0], num_inference_steps=3).output
    assert not torch.allclose(trace.output, nominal, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusion3Img2ImgPipeline"])
def test_img2img_is_written_a_table_for_the_levels_that_are_left(name: str) -> None:
    """As long as the whole way's: corrections are no larger where it is begun late. A pipeline that is not bound has
    taken the times of the whole run by then, and is refused."""
    tiny = tp.build(name)
    own = DyWeightScheduler.from_config(tiny.pipe.scheduler.config)
    function, prediction = learned(3, default_grid(own)), own.host.prediction
    nominal = make_grid(function.grid, 4, prediction)
    rest = function.table(2, prediction, sigmas=nominal[2:], whole=4)
    assert float((rest.weights - function.table(2, prediction, sigmas=nominal[2:]).weights).abs().max()) > 1e-3
    euler = SolverTable.initial(2, 3, {"sigmas": nominal[:3].tolist()}, prediction, base="euler")
    numbers = [torch.cat([getattr(t, v) for t in (euler, rest)]) for v in ("weights", "time_scale")]
    known = own.with_tables([SolverTable(*numbers, {"sigmas": nominal.tolist()})])
    scheduler = own.with_continuous(function)
    with pytest.raises(ValueError, match=r"begins at step 2.* pipe = dywspan\.bind\(pipe\)"):
        tp.run(tiny, scheduler, [0])
    bind(tiny.pipe)
    trace, expected = (tp.run(tiny, s, [0]) for s in (scheduler, known))
    assert len(trace.steps) == 2
    torch.testing.assert_close(trace.output, expected.output, rtol=1e-5, atol=1e-5)
    begun, told = (float(prediction.timestep(v)) for v in (nominal[2], rest.schedule(prediction).queries[0]))
    assert trace.noised[0][0] == pytest.approx(begun, rel=0.2) and trace.told[0].item() == pytest.approx(told)
    assert float(scheduler.sigmas[2]) == pytest.approx(float(nominal[2]))
    torch.testing.assert_close(trace.output, tp.run(tiny, scheduler, [0]).output)


@pytest.mark.parametrize("lifted", [False, True])
def test_a_begin_index_can_be_set_again(lifted: bool) -> None:
    """Every start is what it is when set first, and ``timesteps`` that a pipeline took before stay what they were."""
    base = DyWeightScheduler(prediction_type="flow_prediction").with_continuous(learned())

    def fresh() -> DyWeightScheduler:
        if not lifted:
            return copy.deepcopy(base)
        scheduler = SpanLiftScheduler.from_config(base.config, operator={"channels": 1, "order": 2, "width": 8})
        coefficients = torch.randn(2, len(FEATURES), generator=torch.Generator().manual_seed(0)).double()
        scheduler.continuous_lift = ContinuousLift(coefficients, 2)
        return scheduler.initialize()

    def numbers(scheduler: DyWeightScheduler, begin: int) -> list[Any]:
        own = (
            [scheduler.plan.lift.alpha[begin:], scheduler.plan.lift.beta[begin:]]
            if isinstance(scheduler, SpanLiftScheduler)
            else []
        )
        return [
            scheduler.plan.rows[begin:],
            scheduler.timesteps[begin:].tolist(),
            scheduler.plan.schedule.levels[begin:].tolist(),
            *own,
        ]

    again = fresh()
    again.set_timesteps(5)
    taken, whole = again.timesteps[1:], numbers(again, 0)
    told = taken.tolist()
    for begin in (2, 0, 3, 3, 1):
        once = fresh()
        once.set_timesteps(5)
        once.begin_at(begin)
        if begin != again.plan.begin:
            with pytest.raises(ValueError, match=f"begins at step {begin}"):
                again.set_begin_index(begin)
            x = torch.ones(1, 1, 4, 4)
            with pytest.raises(ValueError, match=f"begins at step {begin}"):
                copy.deepcopy(again).step(x, again.timesteps[begin].item(), x)
        again.begin_at(begin)
        again.set_begin_index(begin)
        assert numbers(again, begin) == numbers(once, begin) and again.begin_index == begin
        assert (numbers(again, 0) == whole) == (begin == 0)
        assert taken.tolist() == told and (again.timesteps[1:].tolist() == told) == (begin == 0)
        if lifted and begin:
            levels, prediction = once.plan.schedule.levels[begin:], Flow()
            lift = once.continuous_lift.lift(levels, prediction, whole=5)
            assert (
                once.plan.lift.alpha[begin:] == lift.alpha.tolist()
                and once.plan.lift.beta == [0.0] * begin + lift.beta.tolist()
            )
    again.set_timesteps(5)
    assert numbers(again, 0) == whole


def test_an_operator_of_beta_zero_leaves_a_continuous_base_as_it_is(tmp_path: Path) -> None:
    tiny = tp.build("StableDiffusionPipeline")
    base = on(tiny, learned(2, default_grid(DyWeightScheduler.from_config(tiny.pipe.scheduler.config))))
    outputs = [tp.run(tiny, base, [0]).output]
    for beta in (0.0, 1.0):
        lift = {"alpha": [1.0] * 3, "beta": [beta] * 3}
        size = {"channels": 4, "order": 2, "width": 8}
        lifted = SpanLiftScheduler.from_config(base.config, operator=size, lifts={"3": lift}).initialize()
        torch.nn.init.normal_(lifted.operators["shared"].head.weight)
        lifted.save_pretrained(tmp_path / str(beta))
        outputs.append(tp.run(tiny, SpanLiftScheduler.from_pretrained(tmp_path / str(beta)), [0]).output)
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2], rtol=1e-2)


# ---------------------------------------------------------------------- learning


def student_of(subject: Subject, order: int = 2, size: float = 0.1) -> ContinuousStudent:
    scheduler = subject.solver()
    return ContinuousStudent(scheduler, learned(order, default_grid(scheduler), size))


def problem_of(subject: Subject, student: Student, n: int, **change: Any) -> Problem:
    config = LearningConfig(optimizer="least_squares", batch_size=2, **change)
    pairs = subject.pairs(range(2))
    return Problem(subject.pipe, student, [Term(n, subject.call, pairs, pairs)], config=config, loss=latent_mse)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline", "MochiPipeline"])
def test_columns_by_the_tables_numbers_are_those_of_the_coefficients(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the grid is known to the pipeline's call only: by a shift (FLUX), or all of it (Mochi)."""
    subject = fresh(name)
    student = student_of(subject)
    problem = problem_of(subject, student, 4, difference=1e-7)
    by_table = columns_of(problem)
    assert student.local(4)[1] is not None
    monkeypatch.setattr(ContinuousStudent, "local", Student.local)
    direct = columns_of(problem)
    assert torch.equal(by_table[0], direct[0])
    scale = direct[1:].norm(dim=1)
    torch.testing.assert_close(by_table[1:] / scale.max(), direct[1:] / scale.max(), rtol=0, atol=1e-4)
    moved = scale > 1e-3 * scale.max()
    assert int(moved.sum()) >= 15
    assert float(((by_table - direct)[1:].norm(dim=1) / scale)[moved].max()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("order", "n"), [(1, 1), (2, 2), (3, 4), (2, 7), (3, 12)])
def test_calls_are_those_really_made(order: int, n: int) -> None:
    subject = fresh("StableDiffusionPipeline")
    student = student_of(subject, order)
    problem, meter = problem_of(subject, student, n), Meter(subject.pipe)
    with meter.running():
        columns_of(problem)
    made = meter.counts["student"] / (2 * 2)  # of two pairs, guidance counted as one
    assert made - n == student.calls(n)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_gradients_are_those_of_central_differences(name: str) -> None:
    subject, eps = fresh(name), 1e-5
    student, pairs = student_of(subject), subject.pairs(range(2))
    (gradient,) = subject.gradients(student, pairs)
    values, slopes = student.coefficients.detach().view(-1), gradient.flatten()
    differences = [subject.central_difference(student, pairs, values, i, eps) for i in range(len(values))]
    torch.testing.assert_close(slopes, torch.tensor(differences), rtol=1e-6, atol=1e-8 * float(slopes.abs().max()))
    acts = gradient.abs() > 1e-9 * gradient.abs().max()
    assert not acts[1, FEATURES.index("first")], "the first step has no difference"
    assert int(acts.sum()) == acts.numel() - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["StableDiffusionPipeline (v-prediction)", "FluxPipeline"])
def test_late_pairs_start_on_the_teachers_way_and_can_be_learned_from(name: str) -> None:
    """Fine steps from there reach the endpoint, and coarse ones learn to."""
    subject = fresh(name)
    own = DyWeightScheduler.from_config(subject.pipe.scheduler.config)
    grid, prediction, (steps, whole) = default_grid(own), own.host.prediction, (2, 3)
    fine = DyWeightScheduler.from_config(own.config, solver="adams", solver_order=3, grid=grid)
    six = subject.inputs(range(6)), range(6)
    paths = make_pairs(subject.pipe, Teacher(fine, 16 * whole, 16), *six, call=subject.call)
    mu = calculate_shift(paths.endpoints.shape[1]) if isinstance(prediction, Flow) else None
    level = 1.0 if isinstance(prediction, Flow) else float(make_grid(grid, whole, prediction, mu)[whole - steps])
    pairs = ends(paths, steps, level)
    assert torch.equal(pairs.endpoints, paths.endpoints) and len(pairs.inputs[0]["latents"]) == 1

    function = ContinuousTable.initial(3, grid)
    scheduler = own.with_continuous(function)
    scheduler.whole = 16 * whole
    close = endpoint_error(subject.pipe, scheduler, 16 * steps, pairs, subject.call)
    scheduler.whole = whole
    assert close < 1e-3 * endpoint_error(subject.pipe, scheduler, steps, pairs, subject.call)

    teacher, plain = Teacher(fine, 16 * whole), replace(paths, targets=paths.endpoints, is_path=False)
    for optimizer in ("adamw", "least_squares"):
        config = LearningConfig(optimizer=optimizer, updates=12, evaluate_every=3, batch_size=6, order=3, init="adams")
        terms = make_terms(subject.pipe, [3], plain, plain, subject.call, {(steps, whole): (pairs, pairs)})
        learned = distill(Task(subject.pipe, teacher, terms, config, continuous=True)).continuous
        errors = learned.provenance["held_out_error"]
        assert [*errors] == ["3", "2/3"] and all(e["after"] < 0.8 * e["before"] for e in errors.values()), optimizer
        scheduler = own.with_continuous(learned)
        scheduler.whole = whole
        found = endpoint_error(subject.pipe, scheduler, steps, pairs, subject.call)
        assert found == pytest.approx(errors["2/3"]["after"], rel=1e-4)


def test_all_late_starts_are_on_one_teachers_way(tmp_path: Path) -> None:
    """In a multiple of the least common multiple of their whole ways."""
    settings: dict[str, Any] = {"model": str(EMOJI), "output": str(tmp_path), "prompts": ["a cat", "a red apple"]}
    settings |= {"pairs": 1, "held_out": 1, "teacher_steps": 20, "continuous": True, "call": {"guidance_scale": 1.0}}
    setup = prepare(load_pipeline(str(EMOJI), device="cpu"), DistillConfig(**settings, late_starts=["2/4", "2/3"]))
    own = DyWeightScheduler.from_config(setup.pipe.scheduler.config)
    teacher = DyWeightScheduler.from_config(own.config, grid=default_grid(own), solver="ipndm", solver_order=2)
    noise = torch.Generator()
    call = {**setup.inputs[0], **setup.call, "num_inference_steps": 24, "generator": noise}
    for (steps, whole), (train, _) in setup.late().items():
        until = 24 - 24 * steps // whole
        with torch.no_grad():
            noise.manual_seed(TRAIN_SEED)
            end, _ = rollout(setup.pipe, teacher, **call)
            noise.manual_seed(TRAIN_SEED)
            state, _ = rollout(setup.pipe, teacher, until=until, **call)
        level = float(teacher.sigmas[until])
        torch.testing.assert_close(level * train.inputs[0]["latents"], teacher.plan.state_after(until - 1, state))
        torch.testing.assert_close(train.endpoints, end)
        student = setup.untrained(whole)
        student.set_timesteps(whole)
        assert float(student.sigmas[whole - steps]) == pytest.approx(level)
    assert len([*tmp_path.glob("cache/*/key.json")]) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"late_starts": ["3"]}, r"late_starts=\['3'\] must be of the form \"3/5\""),
        ({"late_starts": ["5/5"]}, "must name fewer steps than the whole way"),
        ({"late_starts": ["0/5"]}, "fewer steps"),
        ({"late_starts": ["3/5", "3/5"]}, "each once"),
        ({"late_starts": ["3/5"], "continuous": False}, "set continuous"),
        ({"late_starts": ["3/5"], "variants": {"a": {"height": 8}}}, "leave out variants"),
    ],
)
def test_late_starts_that_cannot_be_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DistillConfig(**{"model": "m", "output": "o", "continuous": True, **change})


@pytest.fixture(scope="module")
def digits() -> Any:
    """The exact denoiser of the digits, its teacher, and pairs."""
    pytest.importorskip("sklearn")
    examples = str(Path(__file__).parents[1] / "examples")
    sys.path.insert(0, examples)
    try:
        import digits as module  # type: ignore[import-not-found]
    finally:
        sys.path.remove(examples)
    pipe = module.DDPMPipeline(module.ExactDenoiser(), module.EDMEulerScheduler())
    pipe.set_progress_bar_config(disable=True)
    teacher = Teacher(DyWeightScheduler.from_config(pipe.scheduler.config, solver="heun"), 30)
    made = [
        make_pairs(pipe, teacher, [{}] * count, range(first, first + count), call={}, batch_size=64)
        for first, count in ((10**6, 32), (0, 64))
    ]
    return pipe, teacher, *made


def test_what_is_learned_at_some_counts_helps_at_counts_between(digits: Any) -> None:
    pipe, teacher, train, held_out = digits
    config = LearningConfig(optimizer="least_squares", order=3, batch_size=32, updates=24, ridge=1e-3, difference=1e-3)
    terms = make_terms(pipe, [3, 4, 6, 8], train, held_out, {})
    table = distill(Task(pipe, teacher, terms, config, continuous=True)).continuous
    own = DyWeightScheduler.from_config(pipe.scheduler.config)
    start = replace(table, coefficients=torch.zeros_like(table.coefficients))

    def error(function: ContinuousTable, n: int) -> float:
        return endpoint_error(pipe, own.with_continuous(function), n, held_out, {})

    assert sorted(table.provenance["held_out_error"]) == ["3", "4", "6", "8"]
    for n, measured in table.provenance["held_out_error"].items():
        assert measured["before"] == pytest.approx(error(start, int(n)), rel=1e-6)
        assert measured["after"] == pytest.approx(error(table, int(n)), rel=1e-6)
    for n, ratio in ((5, 0.5), (7, 0.85)):
        assert error(table, n) < ratio * error(start, n), n
    assert not table.coefficients.requires_grad and bool(table.coefficients.any(dim=1).all())
