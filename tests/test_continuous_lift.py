"""One function that gives SpanLift's alpha and beta for every number of steps, on a base that has them all."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny as tp
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_continuous import GRIDS
from test_continuous import learned as table_of
from test_core import FRAMES, HIGH, LOW, Gaussian, slope
from test_scheduler import SOURCES, run, sample_of
from test_spanlift import SIZE, base_of, lifted, randomise
from test_trainable import float64 as float64
from test_trainable import fresh
from test_trainer import contents, held_out_error, learn, run_usage
from test_trainer import learned as learned
from test_trainer import nothing_computed as nothing_computed
from test_trainer import pixels as pixels
from torch import Tensor

from dywspan import DyWeightScheduler, SpanLiftScheduler, bind
from dywspan.artifact import continuous_to_json, lift_to_json, read_continuous, shown_tables
from dywspan.cli import main
from dywspan.core.continuous import FEATURES, ContinuousLift, ContinuousTable, features
from dywspan.core.grid import make_grid
from dywspan.core.operator import Lift
from dywspan.core.prediction import EDM, Flow
from dywspan.core.step import step
from dywspan.distill.lift import LiftStudent
from dywspan.pipelines.classical import default_grid
from dywspan.pipelines.rollout import load_pipeline

COUNT = 2 * len(FEATURES)
FLOW = {"name": "flow", "shift": 3.0}


def lifts(order: int = 2, size: float = 0.3, **options: Any) -> ContinuousLift:
    """As training leaves it: no coefficient is zero, no number is round."""
    draw = torch.Generator().manual_seed(10 + order)
    return ContinuousLift(size * torch.randn(2, len(FEATURES), generator=draw, dtype=torch.float64), order, **options)


def on(base: DyWeightScheduler, function: ContinuousLift, **config: Any) -> SpanLiftScheduler:
    """The base, lifted by a random operator of every name that is used."""
    data = continuous_to_json(function)
    scheduler = SpanLiftScheduler.from_config(base.config, **{"operator": SIZE, "continuous_lift": data, **config})
    return randomise(scheduler.initialize())


def of_kind(kind: str, order: int = 2) -> DyWeightScheduler:
    own = DyWeightScheduler.from_config(SOURCES[kind].config)
    return own.with_continuous(table_of(order, default_grid(own)))


# ---------------------------------------------------------------------- the function


@given(n=st.integers(1, 60), order=st.integers(1, 4), horizon=st.floats(0.5, 50), grid=st.sampled_from(sorted(GRIDS)))
def test_without_coefficients_it_is_the_base_and_at_its_start_beta_fades(
    n: int, order: int, horizon: float, grid: str
) -> None:
    spec, prediction, mu = GRIDS[grid]
    levels = make_grid(spec, n, prediction, mu)
    nothing = ContinuousLift(torch.zeros(2, len(FEATURES)), order, horizon).lift(levels, prediction)
    assert torch.equal(nothing.alpha, torch.ones(n).double()) and torch.equal(nothing.beta, torch.zeros(n).double())
    start = ContinuousLift.initial(order, horizon=horizon, operator="few").lift(levels, prediction)
    assert torch.equal(start.alpha, torch.ones(n).double()) and start.operator == "few"
    torch.testing.assert_close(start.beta, torch.full((n,), (1 + n / horizon) ** -order, dtype=torch.float64))


@pytest.mark.parametrize("grid", GRIDS)
def test_each_coefficient_moves_what_it_belongs_to(grid: str) -> None:
    spec, prediction, mu = GRIDS[grid]
    n, order, horizon, c = 6, 3, 4.0, -0.37
    levels = make_grid(spec, n, prediction, mu)
    phi = features(levels, prediction.signal(levels))
    for row, column in [(r, k) for r in range(2) for k in range(len(FEATURES))]:
        coefficients = torch.zeros(2, len(FEATURES), dtype=torch.float64)
        coefficients[row, column] = c
        found = ContinuousLift(coefficients, order, horizon).lift(levels, prediction)
        moved = c * 0.4**3 * phi[:, column]  # f = 1 / (1 + 6 / 4)
        torch.testing.assert_close(found.alpha, 1 + moved if row == 0 else torch.ones_like(moved))
        torch.testing.assert_close(found.beta, moved if row == 1 else torch.zeros_like(moved))


@pytest.mark.parametrize("problem", FRAMES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_any_operator_keeps_the_order_of_convergence(order: int, problem: Gaussian) -> None:
    """Horizon 1, to see the limit at few steps. Of K = 3 the first row, which alone would cap it, is exact history."""
    prediction, begin = (Flow() if problem.is_flow else EDM()), max(0, order - 2)
    spec = FLOW if problem.is_flow else {"name": "polynomial", "sigma_min": LOW, "sigma_max": HIGH}
    base = ContinuousTable.initial(order, spec)

    def end(function: ContinuousLift, n: int) -> Tensor:
        sigmas = (HIGH**0.5 + torch.arange(-begin, n + 1).double() / n * (LOW**0.5 - HIGH**0.5)) ** 2
        schedule = base.table(n + begin, prediction, sigmas=sigmas).schedule(prediction)
        lift = function.lift(schedule.levels, prediction)
        x = problem.exact(schedule.levels[begin])
        history = tuple(problem.derivative(problem.exact(s), s) for s in sigmas[:begin].flip(0))
        for i in range(begin, len(schedule)):
            d = problem.derivative(x, schedule.levels[i])
            residual = torch.cos(3 * x) - 2 * torch.tanh(d)  # an operator is as smooth, and not small
            x, history = step([lift.alpha[i] * c for c in schedule.increments[i]], x, d, history)
            x = x + schedule.sizes[i] * lift.beta[i] * residual
        return x

    function = lifts(order, 2.0, horizon=1.0)
    nothing = replace(function, coefficients=torch.zeros_like(function.coefficients))
    exact = problem.exact(torch.tensor(LOW, dtype=torch.float64))
    assert abs(slope(lambda n: float((end(function, n) - exact).norm())) - order) < 0.35
    assert abs(slope(lambda n: float((end(function, n) - end(nothing, n)).norm())) - order) < 0.35


# ---------------------------------------------------------------------- in a scheduler


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("n", [1, 2, 7, 23])
def test_zeros_are_the_continuous_base_bit_for_bit(kind: str, n: int, network: Any) -> None:
    base = of_kind(kind)
    ends = []
    for size in (None, 0.0, 0.3):
        scheduler = base if size is None else on(base, lifts(size=size))
        scheduler.set_timesteps(n)
        ends.append(run(scheduler, network, sample_of() * scheduler.init_noise_sigma))
    assert torch.equal(ends[0], ends[1]) and not torch.allclose(ends[0], ends[2], rtol=1e-3)


@pytest.mark.parametrize("solver", ["table", "AFS table", "dpmpp", "heun"])
def test_any_base_is_lifted_between_the_levels_of_its_schedule(solver: str, network: Any) -> None:
    """heun takes two levels a step, an AFS table one more than evaluations, and a table's are its own."""
    base, function = base_of(solver), lifts(3)
    base.set_timesteps(5)
    levels = base.plan.schedule.levels
    expected, ends = function.lift(levels, base.host.prediction), []
    assert len(expected.alpha) == {"AFS table": 6, "heun": 9}.get(solver, 5)
    for scheduler in (on(base, function), on(base, function)):
        if ends:  # the same, as the lift of this count
            scheduler.lifts[5], scheduler.continuous_lift = expected, None
        scheduler.set_timesteps(5)
        ends.append(run(scheduler, network, sample_of() * scheduler.init_noise_sigma))
    assert torch.equal(*ends)
    assert torch.equal(base.sigmas, scheduler.sigmas) and torch.equal(base.timesteps, scheduler.timesteps)


def test_lifts_win_for_their_own_count_and_the_function_gives_all_others() -> None:
    base, function = of_kind("flow"), lifts(operator="any")
    own = Lift(torch.full((3,), 0.9).double(), torch.full((3,), 0.1).double(), "three")
    scheduler = on(base, function)
    scheduler.lifts[3] = own
    scheduler = randomise(scheduler.initialize())
    assert sorted(scheduler.operators) == ["any", "three"]
    for n in (1, 2, 3, 4, 17):
        scheduler.set_timesteps(n)
        base.set_timesteps(n)
        expected = own if n == 3 else function.lift(base.plan.schedule.levels, Flow())
        assert (scheduler.plan.lift.lift.operator, scheduler.plan.lift.alpha) == (
            expected.operator,
            expected.alpha.tolist(),
        )
        assert scheduler.plan.lift.beta == expected.beta.tolist()
    assert sorted(shown_tables(scheduler)) == [3] and len(shown_tables(on(base, function))) > 1
    without = copy.deepcopy(scheduler)
    without.continuous_lift = None
    with pytest.raises(ValueError, match=r"No SpanLift for num_inference_steps=4: it was learned for \[3\] steps"):
        without.set_timesteps(4)


def in_a_pipeline(name: str) -> tuple[tp.Tiny, SpanLiftScheduler]:
    tiny = tp.build(name)
    own = DyWeightScheduler.from_config(tiny.pipe.scheduler.config)
    flux = {"name": "flow"} if name == "FluxPipeline" else default_grid(own)
    size = {"channels": 4, "order": 2, "width": 8}
    return tiny, on(own.with_continuous(table_of(2, flux)), lifts(), operator=size, layout=tiny.layout)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("FluxPipeline", {"height": 32, "width": 32}),
        ("FluxPipeline", {"height": 64, "width": 64}),
        ("StableDiffusion3Pipeline", {"sigmas": [1.0, 0.7, 0.2]}),
        ("StableDiffusionPipeline (v-prediction)", {"sigmas": [14.0, 3.0, 0.4, 0.0]}),
        ("StableDiffusionPipeline (v-prediction)", {"timesteps": [990, 480, 35]}),
        ("StableDiffusionImg2ImgPipeline", {"num_inference_steps": 4}),
        ("StableDiffusion3Img2ImgPipeline", {"num_inference_steps": 4}),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_grids_of_the_call_shifts_and_later_starts_are_the_bases(name: str, call: dict[str, Any]) -> None:
    """What the base is asked for in a call, its lift is for too."""
    tiny, scheduler = in_a_pipeline(name)
    if "Img2Img" in name:
        bind(tiny.pipe)
    outputs, levels = [tp.run(tiny, scheduler, [0], **call).output], scheduler.plan.schedule.levels
    begin, steps = 2 if "Img2Img" in name else 0, len(levels) - 1
    rest = lifts().lift(levels[begin:], scheduler.host.prediction, whole=steps)
    before = torch.zeros(begin).double()
    expected = replace(rest, alpha=torch.cat([before + 1, rest.alpha]), beta=torch.cat([before, rest.beta]))
    assert scheduler.plan.lift.alpha == expected.alpha.tolist() and scheduler.plan.lift.beta == expected.beta.tolist()
    base = DyWeightScheduler.from_config(scheduler.config)
    outputs.append(tp.run(tiny, base, [0], **call).output)
    assert torch.equal(base.plan.schedule.levels, levels) and not torch.allclose(*outputs, rtol=1e-2, atol=1e-3)
    nominal = on(base, lifts(), **{k: scheduler.config[k] for k in ("operator", "layout")})
    nominal.set_timesteps(steps, mu=0.7 if name == "FluxPipeline" else None)
    assert not torch.allclose(nominal.plan.lift.lift.beta[begin:], rest.beta)
    discrete = copy.deepcopy(scheduler)
    discrete.lifts, discrete.continuous_lift = {scheduler.num_inference_steps: expected}, None
    assert torch.equal(tp.run(tiny, discrete, [0], **call).output, outputs[0])


# ---------------------------------------------------------------------- in an artefact


def test_it_survives_an_artefact_bit_for_bit(tmp_path: Path, network: Any) -> None:
    made = {"held_out_error": {"3": {"before": 0.3, "after": 0.1}}}
    function = lifts(3, horizon=5.5, operator="any", provenance=made)
    own = on(of_kind("epsilon", 3), lifts(), lifts={"4": {"alpha": [1.0] * 4, "beta": [0.1] * 4, "operator": "any"}})
    own.continuous_lift = function  # what was learned after it was made is saved too
    own.operators = {"any": own.operators["shared"]}
    own.save_pretrained(tmp_path / "one")
    again = SpanLiftScheduler.from_pretrained(tmp_path / "one")
    assert not any(p.requires_grad for p in again.operators["any"].parameters())
    ends = []
    for other in (own, again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        found = other.continuous_lift
        assert torch.equal(found.coefficients, function.coefficients) and found.provenance == made
        assert (found.order, found.horizon, found.operator) == (3, 5.5, "any")
        other.set_timesteps(5)
        ends.append(run(other, network, sample_of() * other.init_noise_sigma))
    assert all(torch.equal(end, ends[0]) for end in ends)
    again.save_pretrained(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    config = SpanLiftScheduler.from_config(again.config)
    assert torch.equal(config.continuous_lift.coefficients, function.coefficients)
    with pytest.raises(ValueError, match="weights are not part of a configuration"):
        config.set_timesteps(5)
    with pytest.raises(ValueError, match=r"never loaded, .*or set lifts=None, continuous_lift=None"):
        SpanLiftScheduler.from_config(again.config, lifts=None).save_pretrained(tmp_path / "three")
    text = (tmp_path / "one" / "scheduler_config.json").read_text(encoding="utf-8")
    assert json.loads(text)["continuous_lift"]["features"] == list(FEATURES)
    assert json.dumps(function.coefficients[1].tolist()) in text, "a row is one line"


def test_the_operator_of_a_function_alone_is_loaded(tmp_path: Path) -> None:
    own = on(of_kind("flow"), lifts())
    own.save_pretrained(tmp_path)
    again = SpanLiftScheduler.from_pretrained(tmp_path)
    assert torch.equal(again.operators["shared"].head.weight, own.operators["shared"].head.weight)
    (tmp_path / SpanLiftScheduler.weights_name).unlink()
    with pytest.raises(OSError, match="this solver is a configuration and this file"):
        SpanLiftScheduler.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs its operator's size"):
        on(of_kind("flow"), lifts(), operator=None)


GOOD = continuous_to_json(lifts())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"coefficients": [[0.0] * 8] * 3}, r"must be 2 x 8 numbers; got shape \(3, 8\)"),
        ({"coefficients": [[0.0] * 7] * 2}, r"must be 2 x 8 numbers; got shape \(2, 7\)"),
        ({"coefficients": [[0.0] * 7, [0.0] * 6]}, r"rows of the same length; they have \[7, 6\]"),
        ({"coefficients": [["a"] * 7] * 2}, "row 0 must hold numbers only"),
        ({"coefficients": [[float("nan")] * 8] * 2}, "must be finite; got .*nan"),
        ({"features": ["1", "u"]}, r"features are \['1', 'u'\], this version's .*upgrade dywspan"),
        ({"order": 0}, "order=0 must be a whole number from 1 to 8"),
        ({"order": 2.0}, "order=2.0 must be a whole number from 1 to 8"),
        ({"order": True}, "order=True must be"),
        ({"order": 9}, "order=9 must be a whole number from 1 to 8"),
        ({"order": 10**400}, "order=a whole number of 1329 bits must be"),
        ({"operator": "a.stem"}, "operator='a.stem' must be 1 to 64 letters"),
        ({"horizon": 0}, "horizon=0 must be a positive number"),
        ({"operator": None}, "operator=None must be 1 to 64 letters"),
    ],
    ids=str,
)
def test_damage_is_named(damage: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)Damaged continuous lift: .*{said}.*Download or distil it again"):
        SpanLiftScheduler(operator=SIZE, continuous_lift={**GOOD, **damage})
    with pytest.raises(ValueError, match="it is a mapping with at least 'coefficients' and 'order'"):
        SpanLiftScheduler(operator=SIZE, continuous_lift={"coefficients": GOOD["coefficients"]})


def test_horizon_and_operator_may_be_left_out() -> None:
    found = read_continuous({"coefficients": GOOD["coefficients"], "order": 3}, ContinuousLift)
    assert found is not None and (found.order, found.horizon, found.operator) == (3, 8.0, "shared")


def test_solvers_of_one_base_are_put_together() -> None:
    """A function replaces another, and stays where there is none."""
    one, other = (on(of_kind("flow"), lifts(k), lifts=None) for k in (2, 3))
    other.lifts[2] = Lift(torch.ones(2), torch.ones(2))
    assert one.with_lifts(other).continuous_lift.order == 3 and sorted(one.with_lifts(other).lifts) == [2]
    other.continuous_lift = None
    assert one.with_lifts(other).continuous_lift.order == other.with_lifts(one).continuous_lift.order == 2


def test_an_operator_that_others_use_is_not_replaced() -> None:
    """Two artefacts may call different operators by one name."""
    many, one = (on(of_kind("flow"), lifts(2)) for _ in range(2))
    for scheduler, steps in ((many, (2, 3)), (one, (4,))):
        scheduler.continuous_lift = None
        scheduler.lifts = {n: Lift(torch.ones(n), torch.ones(n)) for n in steps}
        randomise(scheduler.initialize())
    one.operators["shared"].head.weight.data += 1
    merged = many.with_lifts(one)
    assert {n: lift.operator for n, lift in merged.lifts.items()} == {2: "shared", 3: "shared", 4: "shared-2"}
    for scheduler, n in ((many, 2), (many, 3), (one, 4)):
        ours, theirs = (s.operators[s.lifts[n].operator].state_dict() for s in (merged, scheduler))
        assert all(torch.equal(value, theirs[k]) for k, value in ours.items())
    unloaded = SpanLiftScheduler.from_config(one.config, lifts={"4": lift_to_json(one.lifts[4])})
    for a, b in ((many, unloaded), (unloaded, many)):
        with pytest.raises(ValueError, match=r"\['shared'\] were never loaded"):
            a.with_lifts(b)
    # Again, or with the same weights, it takes the same name; one that nobody uses any more goes.
    assert sorted(merged.with_lifts(one).operators) == ["shared", "shared-2"]
    assert [*many.with_lifts(many).operators] == ["shared"]
    one.lifts = {n: Lift(torch.ones(n), torch.ones(n)) for n in (2, 3)}
    assert [*many.with_lifts(one).operators] == ["shared"]
    assert torch.equal(many.with_lifts(one).operators["shared"].head.weight, one.operators["shared"].head.weight)


def test_inspect_prints_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    errors = {"3": {"before": 0.25, "after": 0.125}}
    function = ContinuousLift.initial(2, horizon=4.0, operator="any")
    function.coefficients[0, FEATURES.index("last")] = -0.75
    function = replace(function, provenance={"held_out_error": errors})
    base = DyWeightScheduler(prediction_type="flow_prediction").with_continuous(ContinuousTable.initial(2, FLOW))
    on(base, function).save_pretrained(tmp_path)
    assert main(["inspect", "--full", str(tmp_path), "--plot", str(tmp_path / "solver.png")]) == 0
    shown = capsys.readouterr().out
    assert "lifts for any number of steps, of order 2 that halve at 4 steps, operator 'any'" in shown
    assert re.search(r"\| 3 +\| 0.25 +\| 0.125 ", shown) and "operator 'any': " in shown
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if "|" in line]
    header = next(i for i, row in enumerate(rows) if row[0] == "alpha - 1") - 2
    assert dict(zip(rows[header], rows[header + 2]))["last"] == "-0.7500"
    assert dict(zip(rows[header], rows[header + 3]))["1"] == "1.0000"
    f = 4 / 7  # of three steps
    three = next(i for i, row in enumerate(rows) if i > header and row[0] == "i")
    assert rows[three][-2:] == ["alpha", "beta"]
    assert [row[-2:] for row in rows[three + 2 : three + 5]] == [
        ["1.0000", f"{f**2:.4f}"], ["1.0000", f"{f**2:.4f}"], [f"{1 - 0.75 * f**2:.4f}", f"{f**2:.4f}"]
    ]  # fmt: skip
    assert (tmp_path / "solver.png").stat().st_size > 10_000


# ---------------------------------------------------------------------- learning


@pytest.mark.usefixtures("float64")
def test_gradients_are_those_of_central_differences() -> None:
    subject, eps = fresh("StableDiffusion3Pipeline"), 1e-5
    own, pairs = subject.solver(), subject.pairs(range(2))
    size: dict[str, Any] = {"layout": subject.tiny.layout, "operator": {"width": 8, "blocks": 1}, "horizon": 8.0}
    base = own.with_continuous(table_of(2, default_grid(own), 0.1))
    student = LiftStudent(base, [3], pairs.endpoints.shape[1:], **size)
    randomise(student.lifted)
    for network in student.networks:
        network.requires_grad_(True)
    values, *_ = student.parameters()
    assert values.shape == (2, len(FEATURES)) and len(student.vector()) == COUNT
    slopes, *others = subject.gradients(student, pairs)
    differences = [subject.central_difference(student, pairs, values.detach().view(-1), i, eps) for i in range(COUNT)]
    torch.testing.assert_close(slopes.flatten(), torch.tensor(differences), rtol=1e-6, atol=1e-8)
    assert bool(slopes.all()) and all(bool(gradient.any()) for gradient in others)


def test_it_starts_as_its_base_and_every_parameter_gets_a_gradient_after_one_update() -> None:
    subject = fresh("StableDiffusion3Pipeline")
    own, pairs = subject.solver(), subject.pairs(range(2))
    base = own.with_continuous(table_of(2, default_grid(own), 0.1))
    student = LiftStudent(base, [3], pairs.endpoints.shape[1:], layout=subject.tiny.layout, horizon=4.0)
    call = {"num_inference_steps": 3, **subject.tiny.inputs([0])}
    ends = [tp.run(subject.tiny, scheduler, [0], **call).output for scheduler in (base, student.scheduler)]
    assert torch.equal(*ends) and student.lifted.continuous_lift.horizon == 4.0
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        for parameter, gradient in zip(student.parameters(), subject.gradients(student, pairs)):
            parameter.grad = gradient
        optimizer.step()
    assert all(p.grad is not None and bool(p.grad.any()) for p in student.parameters())


@pytest.mark.parametrize(
    ("base", "order"), [("euler", 1), ("ipndm", 2), ("heun", 2), ("deis of order 3", 3), ("table of order 3", 3)]
)
def test_it_fades_with_the_order_of_its_base(base: str, order: int) -> None:
    solver, _, given_order = base.partition(" of order ")
    own = of_kind("flow", 3) if solver == "table" else DyWeightScheduler.from_config(SOURCES["flow"].config)
    if solver != "table":
        own = DyWeightScheduler.from_config(own.config, solver=solver, solver_order=int(given_order or 2))
    student = LiftStudent(own, [3], (4, 8, 8), order=4, horizon=8.0)
    assert student.lifted.continuous_lift.order == order and student.lifted.operators["shared"].order == 4


@pytest.mark.parametrize(
    ("continuous", "counts", "operators"), [(True, [], ["any"]), (False, [2], ["few"])], ids=["function", "lifts"]
)
def test_no_more_is_gone_on_with_than_is_learned(continuous: bool, counts: list[int], operators: list[str]) -> None:
    """A lift that stayed would win where the function learns, and a function be saved as if it had been learned."""
    scheduler = on(of_kind("flow"), lifts(operator="any"))
    scheduler.lifts = {n: Lift(torch.ones(n), torch.ones(n), name) for n, name in ((2, "few"), (3, "many"))}
    student = LiftStudent(scheduler.initialize(), [2], (4, 8, 8), horizon=8.0 if continuous else None)
    learned = student.lifted
    assert sorted(learned.lifts) == counts and sorted(learned.operators) == operators
    assert (learned.continuous_lift is not None) == continuous and len(student.vector()) == (COUNT if continuous else 4)
    assert sorted(scheduler.lifts) == [2, 3] and scheduler.continuous_lift is not None


TABLES: dict[str, Any] = {"continuous": True, "steps": [2, 4], "optimizer": "least_squares", "updates": 1}
LIFT: dict[str, Any] = {
    "solver": "spanlift",
    "continuous": True,
    "steps": [2, 4],
    "optimizer": "adam",
    "operator": {"width": 4, "blocks": 1},
    "updates": 8,
    "lr": 1e-2,
}


@pytest.fixture(scope="module")
def runs(pixels: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The artefacts of two runs: a continuous table, and a lift of it."""
    folder = tmp_path_factory.mktemp("runs")
    tables, lift = folder / "tables", folder / "lift"
    assert learn(pixels, tables, **TABLES) == 0
    assert learn(pixels, lift, **LIFT, base=tables, cache=tables / "cache", pictures=1) == 0
    return tables, lift


def test_what_is_learned_at_some_counts_lowers_their_errors_and_samples_at_any(
    pixels: Path, runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, folder = runs
    scheduler = SpanLiftScheduler.from_pretrained(folder)
    function, base = scheduler.continuous_lift, DyWeightScheduler.from_pretrained(tables).continuous
    assert scheduler.lifts == {} and list(scheduler.operators) == ["continuous"] == [function.operator]
    assert function.order == base.order and torch.equal(scheduler.continuous.coefficients, base.coefficients)
    assert bool(function.coefficients.any(dim=1).all()) and not function.coefficients.requires_grad
    errors, of_tables = (part.provenance["held_out_error"] for part in (function, base))
    assert list(errors) == ["2", "4"]
    for n, error in errors.items():
        assert error["before"] == pytest.approx(of_tables[n]["after"], rel=1e-5)
        assert error["after"] < 0.97 * error["before"]
        again = held_out_error(pixels, folder, int(n), **{**LIFT, "steps": [int(n)], "base": str(tables)})
        assert again == pytest.approx(error["after"], rel=1e-4)
    (state,) = (folder / "state").iterdir()
    assert state.name.startswith("2-4-"), "learned together"
    pipe = load_pipeline(str(pixels))
    pipe.scheduler = scheduler
    for n in (1, 3, 11):
        assert len(pipe(num_inference_steps=n).images) == 1 and len(scheduler.plan.lift.lift.beta) == n
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "`SpanLiftScheduler` for 2, 4 and any other number of steps" in card
    for n, error in errors.items():
        assert re.search(rf"\| {n} +\| {error['before']:.5g} +\| {error['after']:.5g} ", card)
    for name in ("samples-2.png", "samples-4.png", "solver.png"):
        assert f"({name})" in card and (folder / name).exists()
    assert len(run_usage(card, folder, monkeypatch)["result"].images) == 1


def test_half_learned_it_is_gone_on_with(pixels: Path, runs: tuple[Path, Path], tmp_path: Path) -> None:
    """From its first checkpoint, as after a kill: bit for bit the same, and so it is from the artefact it leaves."""
    (tables, folder), output = runs, tmp_path / "again"
    settings = {**LIFT, "base": tables, "cache": tables / "cache", "checkpoint_every": 1}
    assert learn(pixels, output, **settings, keep_checkpoints=99) == 0
    (state,) = (output / "state").iterdir()
    files = sorted(state.glob("*.safetensors"))
    assert len(files) == LIFT["updates"]
    for file in files[3:]:
        file.unlink()
    (output / "scheduler_config.json").unlink()
    assert learn(pixels, output, **settings) == 0
    whole, rest = (SpanLiftScheduler.from_pretrained(f) for f in (folder, output))
    assert torch.equal(whole.continuous_lift.coefficients, rest.continuous_lift.coefficients)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name])
    errors = (s.continuous_lift.provenance["held_out_error"] for s in (whole, rest))
    assert next(errors)["4"]["after"] == next(errors)["4"]["after"]


def test_its_coefficients_alone_are_fitted_by_least_squares(
    pixels: Path, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    tables, folder = runs
    settings = {**LIFT, "optimizer": "least_squares", "updates": 1, "base": folder, "cache": tables / "cache"}
    assert learn(pixels, tmp_path, **settings) == 0
    before, after = (SpanLiftScheduler.from_pretrained(f) for f in (folder, tmp_path))
    assert not torch.equal(before.continuous_lift.coefficients, after.continuous_lift.coefficients)
    for name, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], value), "the operator stays"
    errors = after.continuous_lift.provenance["held_out_error"]
    for n, error in before.continuous_lift.provenance["held_out_error"].items():
        assert errors[n]["before"] == pytest.approx(error["after"], rel=1e-4)
    assert errors["2"]["after"] * errors["4"]["after"] < 0.999 * errors["2"]["before"] * errors["4"]["before"]


def test_a_function_and_lifts_lie_in_one_artefact(pixels: Path, runs: tuple[Path, Path], tmp_path: Path) -> None:
    (tables, folder), output = runs, tmp_path / "both"
    shutil.copytree(folder, output)
    one = {**LIFT, "base": tables, "cache": tables / "cache", "continuous": False, "steps": [3], "updates": 2}
    assert learn(pixels, output, **one) == 0
    before, both = (SpanLiftScheduler.from_pretrained(f) for f in (folder, output))
    assert torch.equal(both.continuous_lift.coefficients, before.continuous_lift.coefficients)
    assert sorted(both.operators) == ["3", "continuous"] and sorted(both.lifts) == [3]
    for name, value in before.state_dict().items():
        assert torch.equal(both.state_dict()[name], value)
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "for 2, 3, 4 and any other number of steps" in card
    assert f"{both.lifts[3].provenance['held_out_error']['after']:.5g}" in card


@pytest.mark.parametrize(
    ("base", "settings", "said"),
    [
        (
            "learned",
            {"steps": [2, 3]},
            "has tables for [2, 3] steps only, and continuous needs a base for every",
        ),
        ("lift", {"continuous": False, "steps": [3]}, "The SpanLift base was learned for [] steps, not for [3]"),
        ("discrete", {"steps": [2]}, "The SpanLift base has no continuous lift to continue from: leave out continuous"),
        ("tables", {"optimizer": "least_squares"}, "must be a SpanLift artefact"),
    ],
)
def test_what_cannot_be_learned_is_said_before_anything_is_computed(
    base: str,
    settings: dict[str, Any],
    said: str,
    pixels: Path,
    learned: Path,
    runs: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    nothing_computed: None,
) -> None:
    own = lifted("ipndm", n=2)
    own.save_pretrained(tmp_path / "discrete")
    bases = {"learned": learned, "tables": runs[0], "lift": runs[1], "discrete": tmp_path / "discrete"}
    assert learn(pixels, tmp_path / "out", **{**LIFT, "base": bases[base], **settings}) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("optimizer", "samples", "calls"), [("adam", 16, 1), ("least_squares", 32, 2 + COUNT)])
def test_the_plan_counts_what_learning_it_takes(
    optimizer: str,
    samples: int,
    calls: int,
    pixels: Path,
    runs: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By gradients they take turns; by differences all see all, and once for each coefficient."""
    base = runs[optimizer == "least_squares"]
    assert learn(pixels, tmp_path / "out", **{**LIFT, "base": base, "optimizer": optimizer}, dry_run=True) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    plan = {row[0]: (row[1], int(row[2])) for row in rows[1:]}
    for n in (2, 4):
        assert plan[f"{n} steps, learning"] == (f"{samples} samples", samples * calls * n)
