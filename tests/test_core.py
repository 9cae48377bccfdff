"""The maths core against closed forms, plain loops and autograd. New registry entries are tested by being there."""

import inspect
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dywspan.core.bases import BASES, cab, multistep, res
from dywspan.core.check import shown
from dywspan.core.grid import GRIDS, flow, make_grid
from dywspan.core.prediction import EDM, PREDICTIONS, Epsilon, Flow, Prediction, Sample, VariancePreserving, Velocity
from dywspan.core.step import Schedule, analytical_derivative, fold, rollout, step
from dywspan.core.table import SolverTable

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # Stable Diffusion's
ALPHAS_CUMPROD = torch.cumprod(1 - BETAS, 0)

INSTANCES: dict[str, list[Prediction]] = {
    "epsilon": [Epsilon(ALPHAS_CUMPROD)],
    "v_prediction": [Velocity(ALPHAS_CUMPROD)],
    "sample": [Sample(ALPHAS_CUMPROD)],
    "edm": [EDM(0.5), EDM(1.3, velocity=True)],
    "flow_prediction": [Flow(1000), Flow(700, inverted=True)],
}
CONVENTIONS = [
    pytest.param(p, id=f"{name}{i or ''}") for name, instances in INSTANCES.items() for i, p in enumerate(instances)
]
GRID_SPECS: dict[str, dict[str, float]] = {
    "polynomial": {"sigma_min": 0.002, "sigma_max": 80.0},
    "logsnr": {"sigma_min": 0.01, "sigma_max": 50.0},
    "time_uniform": {"sigma_min": 0.002, "sigma_max": 80.0},
    "discrete": {"sigma_min": 0.0292, "sigma_max": 14.6146},
    "flow": {"shift": 3.0},
}


def test_every_registry_entry_has_an_instance_here() -> None:
    assert INSTANCES.keys() == PREDICTIONS.keys()
    assert GRID_SPECS.keys() == GRIDS.keys()
    assert all(1 <= base.highest <= 4 for base in BASES.values())


# ---------------------------------------------------------------------- orders of convergence


class Gaussian:
    """Independent components x0 ~ N(0, c^2): the probability-flow ODE has x(sigma) proportional to its own spread."""

    c = torch.tensor([0.5, 0.8, 1.5], dtype=torch.float64)

    def __init__(self, is_flow: bool) -> None:
        self.is_flow = is_flow

    def signal(self, sigma: Tensor) -> Tensor:
        return 1 - sigma if self.is_flow else torch.ones_like(sigma)

    def exact(self, sigma: Tensor) -> Tensor:
        return (self.signal(sigma) ** 2 * self.c**2 + sigma**2).sqrt()

    def derivative(self, x: Tensor, sigma: Tensor, tau: Tensor | None = None) -> Tensor:
        spread = self.signal(sigma) ** 2 * self.c**2 + sigma**2
        return x * ((sigma - (1 - sigma) * self.c**2 if self.is_flow else sigma) / spread)

    def denoising_grid(self, n: int, short: int) -> Tensor:
        """Smooth levels from HIGH to LOW after ``short`` steps of relative length 1 / n^2."""
        u = torch.cat([torch.arange(short) / n**2, (short / n**2) + torch.linspace(0, 1, n + 1)]).double()
        return (HIGH**0.5 + u * (LOW**0.5 - HIGH**0.5)) ** 2

    def error(self, schedule: Schedule, sigmas: Tensor) -> float:
        x = rollout(schedule, self.derivative, self.exact(sigmas[0]))
        return float((x - self.exact(sigmas[-1])).norm())


FRAMES = [pytest.param(Gaussian(False), id="VE"), pytest.param(Gaussian(True), id="flow")]
STEPS = (32, 45, 64, 90, 128)
HIGH, LOW = 0.9, 0.3  # inside both frames


def slope(error: Callable[[int], float]) -> float:
    """Order of convergence: least squares of log error over log step."""
    points = [(-math.log(n), math.log(error(n))) for n in STEPS]
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


# The published 3M weights its second difference by phi_3 where Taylor has 2 phi_3: local error O(h^3), so order 2.
# CAB adds a share of a second difference, which falls with h^2 at any order of what it is added to.
ORDERS = {("uniform", k): 1 for k in range(1, 5)} | {("dpmpp", 3): 2, ("cab", 3): 2}


@pytest.mark.parametrize("problem", FRAMES)
@pytest.mark.parametrize("base, order", [(b, k) for b in multistep() for k in range(1, BASES[b].highest + 1)])
def test_bases_converge_at_their_order(base: str, order: int, problem: Gaussian) -> None:
    """Entered so that the low order of the first steps does not show: it would cap the order of the whole."""

    def with_exact_history(n: int) -> float:
        """Start in mid-table with past derivatives of the true solution, on a smooth grid that goes back that far."""
        u = torch.arange(1 - order, n + 1, dtype=torch.float64) / n
        p = 1.0 if base == "ipndm" else 0.5  # its constants are those of equal steps
        sigmas = (HIGH**p + u * (LOW**p - HIGH**p)) ** (1 / p)
        rows = Schedule.from_weights(sigmas, BASES[base](sigmas, problem.signal(sigmas), order)).increments
        past = sigmas[: order - 1].flip(0)
        x, history = problem.exact(sigmas[order - 1]), tuple(problem.derivative(problem.exact(s), s) for s in past)
        for row, sigma in zip(rows[order - 1 :], sigmas[order - 1 :]):
            x, history = step(row, x, problem.derivative(x, sigma), history)
        return float((x - problem.exact(sigmas[-1])).norm())

    def with_short_first_steps(n: int) -> float:
        """Past states, which data-prediction tables rebuild from derivatives, are exact to O(h^4)."""
        sigmas = problem.denoising_grid(n, short=order - 1)
        weights = BASES[base](sigmas, problem.signal(sigmas), order)
        return problem.error(Schedule.from_weights(sigmas, weights), sigmas)

    rebuilds_states = BASES[base](torch.linspace(3, 1, 9).double(), torch.ones(9), order).shape[1] > order
    measured = slope(with_short_first_steps if rebuilds_states else with_exact_history)
    assert abs(measured - ORDERS.get((base, order), order)) < 0.35


@pytest.mark.parametrize("problem", FRAMES)
@pytest.mark.parametrize("name", ["dpm2", "heun"])
def test_two_stage_solvers_are_second_order(name: str, problem: Gaussian) -> None:
    def error(n: int) -> float:
        sigmas = torch.linspace(HIGH**0.5, LOW**0.5, n + 1, dtype=torch.float64) ** 2
        return problem.error(BASES[name].schedule(sigmas, torch.ones_like(sigmas), 1), sigmas)

    assert abs(slope(error) - 2) < 0.35


@pytest.mark.parametrize("name", ["dpm2", "heun"])
def test_two_stage_solvers_step_into_zero_by_euler(name: str) -> None:
    sigmas = torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64)
    schedule = BASES[name].schedule(sigmas, torch.ones_like(sigmas), 1)
    assert len(schedule) == 3
    assert schedule.increments[2].tolist() == [-0.5, 0.0]
    x = torch.tensor([1.7], dtype=torch.float64)
    # The denoiser D = 0 has d = x / sigma: Euler into zero lands on it exactly.
    assert rollout(schedule, lambda x, sigma, tau: x / sigma, x).abs().item() < 1e-15


# ---------------------------------------------------------------------- tables of classical solvers


@pytest.mark.parametrize("is_flow", [False, True])
@pytest.mark.parametrize("base, order", [(b, k) for b in multistep() for k in range(1, BASES[b].highest + 1)])
def test_rows_sum_to_one_and_use_only_what_exists(base: str, order: int, is_flow: bool) -> None:
    sigmas = flow(8, shift=2.0) if is_flow else torch.tensor([9.0, 5, 2, 1.5, 0.6, 0.1, 0.0], dtype=torch.float64)
    weights = BASES[base](sigmas, Gaussian(is_flow).signal(sigmas), order)
    assert weights.shape[0] == len(sigmas) - 1
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights), dtype=torch.float64), rtol=0, atol=1e-10)
    assert not weights.triu(1).any()


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_has_the_published_constants_and_adams_reduces_to_it(order: int) -> None:
    sigmas = torch.linspace(3, 1, 8, dtype=torch.float64)
    table = torch.zeros(7, order, dtype=torch.float64)
    published = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    for i in range(7):
        row = published[min(i, order - 1)]
        table[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    for base in ("ipndm", "adams"):
        torch.testing.assert_close(BASES[base](sigmas, torch.ones(8), order), table, rtol=0, atol=1e-12)


def test_res_is_exact_where_the_data_prediction_is_a_line_in_log_snr() -> None:
    sigmas = torch.tensor([3.0, 1.3, 0.7, 0.2], dtype=torch.float64)
    lambdas, u = -sigmas.log(), torch.linspace(0, 1, 20_001, dtype=torch.float64)
    rows, line = res(sigmas, torch.ones(4), 2), 0.7 - 0.4 * lambdas
    for i in (1, 2):
        h = lambdas[i + 1] - lambdas[i]
        # x' = e^-h x + (1 - e^-h) mean, mean = the integral of e^-(lambda' - lambda) D over the step / (1 - e^-h)
        weight = torch.exp(-h * (1 - u))
        mean = torch.trapezoid(weight * (0.7 - 0.4 * (lambdas[i] + h * u)), u) / torch.trapezoid(weight, u)
        assert float(rows[i] @ line[[i, i - 1]]) == pytest.approx(float(mean), abs=1e-8)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("is_flow", [False, True])
def test_cab_is_its_formula_over_noise_predictions(is_flow: bool, order: int) -> None:
    """Written out as the paper has it, beside our weights of derivatives; also from a flow's first level, alpha = 0."""
    sigmas = flow(6, shift=2.0) if is_flow else torch.tensor([9.0, 5, 2, 1.5, 0.6, 0.1, 0.0], dtype=torch.float64)
    problem = Gaussian(is_flow)
    alphas = problem.signal(sigmas)
    weights = cab(sigmas, alphas, order)
    x = torch.tensor([1.3, -0.4, 0.2], dtype=torch.float64)
    end = rollout(Schedule.from_weights(sigmas, weights), lambda x, s, tau: problem.derivative(x, s) + x.sin(), x)
    past: list[tuple[Tensor, Tensor, Tensor]] = []  # (rho, eps, d)
    for i in range(len(sigmas) - 1):
        d = problem.derivative(x, sigmas[i]) + x.sin()
        past = [(sigmas[i] / alphas[i], x + alphas[i] * d if is_flow else d, d), *past]
        if i < 2 and (is_flow or i == 0):
            x = x + (sigmas[i + 1] - sigmas[i]) * (d if i == 0 else 1.5 * d - 0.5 * past[1][2])
            continue
        rho, h = sigmas[i + 1] / alphas[i + 1], sigmas[i + 1] / alphas[i + 1] - past[0][0]
        h1 = past[0][0] - past[1][0]
        mean = past[0][1] + h / (2 * h1) * (past[0][1] - past[1][1])
        if i > 1:
            h2 = past[1][0] - past[2][0]
            slopes = [(past[j][1] - past[j + 1][1]) / g for j, g in enumerate((h1, h2))]
            if order == 3:
                mean = mean + (h**2 / 3 + h * h1 / 2) * (slopes[0] - slopes[1]) / (h1 + h2)
            mean = mean + 0.9 * (past[0][1] - past[1][1] - h1 * slopes[1])
        x = alphas[i + 1] * (x / alphas[i] + (rho - past[0][0]) * mean)
    torch.testing.assert_close(end, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("base", ["dpmpp", "unipc"])
@pytest.mark.parametrize("order", [2, 3])
def test_data_prediction_solvers_are_exact_for_a_constant_denoiser(base: str, order: int) -> None:
    """D(x, sigma) = m: any number of steps lands on x = m + r (x_0 - m), r = sigma_N / sigma_0."""
    sigmas = torch.tensor([10.0, 4, 1, 0.3, 0.2], dtype=torch.float64)
    schedule = Schedule.from_weights(sigmas, BASES[base](sigmas, torch.ones(5), order))
    x, m = torch.tensor([7.0, -3.0], dtype=torch.float64), torch.tensor([0.4, -0.9], dtype=torch.float64)
    end = rollout(schedule, lambda x, sigma, tau: (x - m) / sigma, x)
    torch.testing.assert_close(end, m + 0.02 * (x - m), rtol=1e-12, atol=0)


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("base", multistep())
def test_an_untrained_table_is_its_base(base: str, afs: bool) -> None:
    """Columns a base does not have are zero; a base that looks back further than K still keeps its row sums."""
    spec = {"name": "polynomial", "sigma_min": 0.1, "sigma_max": 10.0}
    table = SolverTable.initial(5, 3, spec, EDM(), base=base, afs=afs)
    sigmas = make_grid(spec, 5 + afs, EDM())
    rows = BASES[base](sigmas, torch.ones_like(sigmas), min(3, BASES[base].highest))
    assert table.weights.shape == (5 + afs, 3) and table.num_inference_steps == 5
    assert torch.equal(table.weights[:3, : rows.shape[1]], rows[:3, :3])
    torch.testing.assert_close(table.weights.sum(1), torch.ones(5 + afs, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(table.schedule(EDM()).levels, sigmas, rtol=1e-10, atol=1e-12)


def test_initial_names_the_bases_there_are() -> None:
    with pytest.raises(ValueError, match=r"Unknown base solver 'rk4'.*'ipndm'"):
        SolverTable.initial(5, 2, {"name": "flow"}, Flow(), base="rk4")


# ---------------------------------------------------------------------- predictions


def levels_of(prediction: Prediction) -> Tensor:
    """Levels on and off the integer times and, where there is such a thing, beyond the trained ends."""
    if isinstance(prediction, Flow):
        return torch.linspace(0.003, 1, 40, dtype=torch.float64)
    return torch.logspace(-3, 2.5, 40, dtype=torch.float64)


@pytest.mark.parametrize("prediction", CONVENTIONS)
def test_levels_and_times_are_inverse_functions(prediction: Prediction) -> None:
    tau = levels_of(prediction)
    times = prediction.timestep(tau)
    torch.testing.assert_close(prediction.sigma(times), tau, rtol=1e-8, atol=0)
    torch.testing.assert_close(prediction.timestep(prediction.sigma(times)), times, rtol=1e-9, atol=1e-9)


def test_vp_times_are_the_trained_ones_on_the_integers_and_linear_in_log_alpha_between() -> None:
    prediction = Epsilon(ALPHAS_CUMPROD)
    sigmas = ((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD).sqrt()
    times = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(prediction.sigma(times), sigmas, rtol=1e-10, atol=0)
    torch.testing.assert_close(prediction.timestep(sigmas), times, rtol=0, atol=1e-8)
    between = (ALPHAS_CUMPROD[100] ** 0.7 * ALPHAS_CUMPROD[101] ** 0.3).item()
    assert prediction.timestep(torch.tensor((1 / between - 1) ** 0.5, dtype=torch.float64)).item() == pytest.approx(
        100.3, abs=1e-8
    )
    assert prediction.sigma(torch.tensor(-1.0)).item() == 0
    assert prediction.timestep(torch.tensor([0.001, 100.0])).tolist()[0] < 0
    assert prediction.timestep(torch.tensor([0.001, 100.0])).tolist()[1] > 999


def test_vp_refuses_a_schedule_without_inverse_and_floors_zero_terminal_snr() -> None:
    with pytest.raises(ValueError, match="must decrease"):
        Epsilon(torch.tensor([0.9, 0.9, 0.5]))
    assert Epsilon(torch.tensor([0.9, 0.5, 0.0])).sigma(torch.tensor(2.0)).item() == pytest.approx(2**12, rel=1e-6)


def exact_output(prediction: Prediction, x: Tensor, clean: Tensor, tau: Tensor) -> Tensor:
    """What a perfect network of each convention returns, from its definition in terms of x0 and eps."""
    if isinstance(prediction, Flow):
        velocity = (x - (1 - tau) * clean) / tau - clean
        return -velocity if prediction.inverted else velocity
    noise, alpha = (x - clean) / tau, 1 / (1 + tau**2).sqrt()
    if isinstance(prediction, Velocity):
        return alpha * noise - tau * alpha * clean
    if isinstance(prediction, EDM):
        variance = prediction.sigma_data**2 + tau**2
        f = (clean - prediction.sigma_data**2 / variance * x) / (prediction.sigma_data * tau / variance.sqrt())
        return -f if prediction is INSTANCES["edm"][1] else f  # diffusers' v-prediction has the other sign
    return noise if isinstance(prediction, Epsilon) else clean


@pytest.mark.parametrize("prediction", CONVENTIONS)
def test_every_convention_sees_the_same_denoiser_and_derivative(prediction: Prediction) -> None:
    """Gaussian data of spread c: D and d are known, whatever the network was trained to say."""
    c, is_flow = 0.8, isinstance(prediction, Flow)
    problem = Gaussian(is_flow)
    problem.c = torch.tensor(c, dtype=torch.float64)
    for tau in levels_of(prediction)[5:-5:6]:
        signal = problem.signal(tau)
        x = torch.randn(5, dtype=torch.float64) * (signal**2 * c**2 + tau**2).sqrt()
        clean = signal * c**2 / (signal**2 * c**2 + tau**2) * x
        output = exact_output(prediction, x, clean, tau)
        torch.testing.assert_close(prediction.denoised(x, output, tau), clean, rtol=1e-9, atol=1e-9)
        derivative = prediction.derivative(x, output, tau, tau)
        torch.testing.assert_close(derivative, problem.derivative(x, tau), rtol=1e-8, atol=1e-9)
        # Told another level than the state's: d = (x - D) / sigma in the VE frame, the velocity itself in flow.
        sigma = tau / 1.1
        expected = problem.derivative(x, tau) if is_flow else (x - clean) / sigma
        torch.testing.assert_close(prediction.derivative(x, output, sigma, tau), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("prediction", CONVENTIONS)
def test_input_scale_gives_the_network_its_training_frame(prediction: Prediction) -> None:
    for tau in levels_of(prediction)[::8]:
        if isinstance(prediction, VariancePreserving):  # alpha x0 + sqrt(1 - alpha^2) eps
            assert prediction.input_scale(tau).item() ** 2 * (1 + tau.item() ** 2) == pytest.approx(1)
        elif isinstance(prediction, EDM):  # unit variance for data of spread sigma_data
            assert prediction.input_scale(tau).item() ** 2 * (prediction.sigma_data**2 + tau.item() ** 2) == (
                pytest.approx(1)
            )
        else:
            assert prediction.input_scale(tau).item() == 1
        assert prediction.signal(tau).item() == (1 - tau.item() if isinstance(prediction, Flow) else 1)


@pytest.mark.parametrize("prediction", CONVENTIONS)
def test_timestep_is_differentiable(prediction: Prediction) -> None:
    tau = levels_of(prediction)[3:-3:4].clone().requires_grad_()
    assert torch.autograd.gradcheck(prediction.timestep, tau)


# ---------------------------------------------------------------------- schedule, step, rollout

finite = st.floats(-2, 2)
tables = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(0.05, 3), min_size=n, max_size=n),  # step sizes
        st.integers(1, n).flatmap(lambda k: st.lists(st.lists(finite, min_size=k, max_size=k), min_size=n, max_size=n)),
        st.lists(st.floats(0.5, 1.5), min_size=n, max_size=n),  # time scale
    )
)


def as_tensors(data: tuple) -> tuple[Tensor, Tensor, Tensor]:
    sizes, rows, scale = data
    sigmas = torch.tensor([0.0, *itertools.accumulate(sizes)], dtype=torch.float64).flip(0)
    return sigmas, torch.tensor(rows, dtype=torch.float64).tril(), torch.tensor(scale, dtype=torch.float64)


@given(tables)
def test_calibration_is_equation_9(data: tuple) -> None:
    sigmas, weights, scale = as_tensors(data)
    schedule = Schedule.from_weights(sigmas, weights, scale)
    true = float(sigmas[0])
    for i in range(len(weights)):
        size = float(sigmas[i + 1]) - true
        assert schedule.levels[i].item() == pytest.approx(true, rel=1e-9, abs=1e-9)
        assert schedule.queries[i].item() == pytest.approx(float(scale[i]) * true, rel=1e-9, abs=1e-9)
        for j in range(weights.shape[1]):
            expected = size * float(weights[i, j])
            assert schedule.increments[i, j].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        true += sum(float(w) for w in weights[i]) * size
    assert schedule.levels[-1] == sigmas[-1]


@given(tables)
def test_a_constant_derivative_moves_the_state_by_the_sum_of_increments(data: tuple) -> None:
    sigmas, weights, scale = as_tensors(data)
    schedule = Schedule.from_weights(sigmas, weights, scale)
    x, d = torch.tensor([0.3, -1.2], dtype=torch.float64), torch.tensor([1.0, 0.7], dtype=torch.float64)
    end = rollout(schedule, lambda x, sigma, tau: d, x)
    torch.testing.assert_close(end, x + schedule.increments.sum() * d, rtol=1e-9, atol=1e-9)


@given(tables)
def test_rollout_is_equation_5_by_absolute_step(data: tuple) -> None:
    """The same sum, written with every derivative kept and indexed by the step it was taken at."""
    sigmas, weights, scale = as_tensors(data)

    def derivative(x: Tensor, sigma: Tensor, tau: Tensor) -> Tensor:
        return torch.tanh(x + tau) + 0.1 * sigma

    x = torch.tensor([0.3, -1.2], dtype=torch.float64)
    end = rollout(Schedule.from_weights(sigmas, weights, scale), derivative, x)
    true, taken = sigmas[0], []
    for i, row in enumerate(weights):
        taken.append(derivative(x, true, scale[i] * true))
        direction = sum(row[j] * taken[i - j] for j in range(min(len(row), i + 1)))
        x, true = x + (sigmas[i + 1] - true) * direction, true + row.sum() * (sigmas[i + 1] - true)
    torch.testing.assert_close(end, x, rtol=1e-9, atol=1e-9)


@given(st.lists(finite, min_size=1, max_size=6), st.integers(1, 8))
def test_fold_keeps_row_sums_and_what_is_there(row: list[float], available: int) -> None:
    kept = fold(row, available)
    assert len(kept) == min(available, len(row))
    assert sum(kept) == pytest.approx(sum(row), abs=1e-12)
    assert kept[:-1] == row[: len(kept) - 1]


def test_history_is_bounded_by_the_order() -> None:
    x, history = torch.zeros(1), ()
    for i in range(6):
        x, history = step([1.0, 0.0, 0.5], x, torch.tensor([float(i)]), history)
        assert [float(d) for d in history] == list(range(i, max(i - 3, -1), -1))


def test_analytical_first_step_replaces_the_first_evaluation() -> None:
    """d_0 = x_0 / sqrt(1 + sigma_0^2): the network is asked from the second step on, and d_0 stays in the history."""
    sigmas = torch.tensor([80.0, 20.0, 5.0], dtype=torch.float64)
    schedule = Schedule.from_weights(sigmas, torch.tensor([[0.9, 0.0], [1.3, -0.2]], dtype=torch.float64), afs=True)
    asked = []

    def derivative(x: Tensor, sigma: Tensor, tau: Tensor) -> Tensor:
        asked.append(float(tau))
        return 0.5 * x

    x = torch.tensor([80.0, -3.0], dtype=torch.float64)
    d_0 = x / math.sqrt(1 + 80.0**2)
    x_1 = x - 60 * 0.9 * d_0
    level = 80 - 0.9 * 60
    expected = x_1 + (5 - level) * (1.3 * 0.5 * x_1 - 0.2 * d_0)
    torch.testing.assert_close(rollout(schedule, derivative, x), expected, rtol=1e-12, atol=0)
    assert asked == [pytest.approx(level)]
    torch.testing.assert_close(analytical_derivative(x, 80.0), d_0, rtol=1e-14, atol=0)


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("prediction", CONVENTIONS)
def test_gradients_of_a_whole_rollout(prediction: Prediction, afs: bool, network: Callable[..., Tensor]) -> None:
    """Weights and time scale act through increments, calibrated levels, network inputs and times alike."""
    top = 1.0 if isinstance(prediction, Flow) else 6.0
    sigmas = top * torch.tensor([1.0, 0.6, 0.25, 0.05], dtype=torch.float64)
    x = torch.randn(3, dtype=torch.float64) * top
    # The scale of times differs by convention; the network needs some that it can see.
    stretch = 400 / (prediction.timestep(sigmas[0]) - prediction.timestep(sigmas[-1])).abs()

    def end(weights: Tensor, scale: Tensor) -> Tensor:
        def derivative(x: Tensor, sigma: Tensor, tau: Tensor) -> Tensor:
            output = network(prediction.input_scale(tau) * x, stretch * prediction.timestep(tau))
            return prediction.derivative(x, output, sigma, tau)

        return rollout(Schedule.from_weights(sigmas, weights.tril(), scale, afs), derivative, x)

    weights = torch.tensor([[0.9, 0.0], [1.3, -0.35], [1.4, -0.45]], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.97, 1.04, 0.93], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(end, (weights, scale))
    gradients = torch.autograd.grad(end(weights, scale).sum(), (weights, scale))
    assert gradients[0].tril().count_nonzero() == 5
    assert gradients[1].count_nonzero() == (2 if afs else 3)


# ---------------------------------------------------------------------- grids


@pytest.mark.parametrize("n", [1, 2, 7, 50])
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_grids_run_from_end_to_end(name: str, n: int) -> None:
    spec = GRID_SPECS[name]
    sigmas = make_grid({"name": name, **spec}, n, INSTANCES["epsilon"][0])
    assert sigmas.dtype == torch.float64 and len(sigmas) == n + 1
    assert (sigmas.diff() < 0).all()
    assert sigmas[0].item() == pytest.approx(spec.get("sigma_max", 1), rel=1e-9)
    assert sigmas[-1].item() == pytest.approx(spec.get("sigma_min", 0), rel=1e-9, abs=1e-15)


def test_polynomial_grid_is_edm_equation_5() -> None:
    sigmas = make_grid({"name": "polynomial", "sigma_min": 0.002, "sigma_max": 80}, 17, EDM())
    for i, sigma in enumerate(sigmas.tolist()):
        assert sigma == pytest.approx((80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, rel=1e-12)


def test_logsnr_grid_has_constant_ratios() -> None:
    sigmas = make_grid({"name": "logsnr", "sigma_min": 0.1, "sigma_max": 10.0}, 8, EDM())
    torch.testing.assert_close(sigmas[1:] / sigmas[:-1], torch.full((8,), 100 ** (-1 / 8)).double(), rtol=1e-7, atol=0)


def test_time_uniform_grid_is_the_vp_process() -> None:
    """log(1 + sigma(t)^2) is a parabola in t without constant term: as many conditions as it has."""
    sigmas = make_grid({"name": "time_uniform", "sigma_min": 0.002, "sigma_max": 80.0}, 10, EDM())
    t, y = torch.linspace(1, 1e-3, 11, dtype=torch.float64), torch.log1p(sigmas**2)
    powers = torch.stack([t**2, t], 1)
    fit = powers @ torch.linalg.lstsq(powers, y[:, None]).solution
    torch.testing.assert_close(fit[:, 0], y, rtol=1e-8, atol=1e-10)


def test_discrete_grid_is_uniform_in_model_time() -> None:
    prediction = INSTANCES["epsilon"][0]
    sigmas = make_grid({"name": "discrete", **GRID_SPECS["discrete"]}, 9, prediction)
    times = prediction.timestep(sigmas)
    torch.testing.assert_close(times.diff(), times.diff()[:1].expand(9), rtol=1e-8, atol=0)
    to_zero = make_grid({"name": "discrete", "sigma_min": 0, "sigma_max": 14.6146}, 9, prediction)
    assert to_zero[-1].item() == 0


def test_flow_grid_by_mu_and_by_shift() -> None:
    """FLUX: e^mu / (e^mu + 1/t - 1); SD3: shift t / (1 + (shift - 1) t)."""
    mu, n = 0.83, 6
    by_mu = make_grid({"name": "flow", "mu": mu}, n, Flow())
    assert torch.equal(by_mu, make_grid({"name": "flow", "shift": math.exp(mu)}, n, Flow()))
    assert torch.equal(by_mu, make_grid({"name": "flow"}, n, Flow(), mu=mu))
    assert torch.equal(by_mu, make_grid({"name": "flow", "mu": mu}, n, Flow(), mu=0.1))  # the table's own wins
    for i, sigma in enumerate(by_mu.tolist()[:-1]):
        t = 1 - i / n
        assert sigma == pytest.approx(math.exp(mu) / (math.exp(mu) + 1 / t - 1), rel=1e-12)
        assert sigma == pytest.approx(math.exp(mu) * t / (1 + (math.exp(mu) - 1) * t), rel=1e-12)
    assert by_mu[0].item() == 1 and by_mu[-1].item() == 0
    unshifted = make_grid({"name": "flow"}, n, Flow())
    torch.testing.assert_close(unshifted, torch.linspace(1, 0, n + 1, dtype=torch.float64), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"name": "cosine"}, r"Unknown grid 'cosine'.*'polynomial'.*sigmas"),
        ({}, r"Unknown grid None"),
        (
            {"name": "logsnr", "sigma_min": 1, "sigma_max": 2, "rho": 7},
            r"'logsnr' has no parameter \['rho'\].*sigma_max",
        ),
        ({"name": "polynomial", "sigma_max": 2.0}, r"'polynomial'.*sigma_min"),
        ({"name": "flow", "shift": 2.0, "mu": 0.5}, r"one of shift and mu"),
        ({"sigmas": [3.0, 2.0, 0.0]}, r"for 3 steps has 4 levels; got 3 from"),
        ({"sigmas": [3.0, 2.0, 2.0, 0.0]}, r"decreasing.*2\.0, 2\.0"),
        ({"sigmas": [3.0, 2.0, float("nan"), 0.0]}, r"finite"),
        ({"sigmas": [3.0, 2.0, 1.0, -0.1]}, r"end at 0 or above.*-0\.1"),
        ({"name": "discrete", "sigma_min": 0.1, "sigma_max": 2.0}, r"'discrete': it needs .* not EDM"),
    ],
)
def test_make_grid_names_the_problem(spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_grid(spec, 3, EDM())


ENDS = {"sigma_min": 0.1, "sigma_max": 9.0}
NO_NUMBERS = [True, "3", math.nan, math.inf, 1e400, 10**400, -(10**5000), [1.0], {}, 1e300, -1e300]


@pytest.mark.parametrize("value", [*NO_NUMBERS, None], ids=shown)
@pytest.mark.parametrize("name", ["polynomial", "logsnr", "time_uniform", "discrete"])
def test_parameters_are_finite_numbers_in_their_range(name: str, value: Any) -> None:
    known = inspect.signature(GRIDS[name]).parameters.keys() - {"n", "prediction"}
    for key in known:
        with pytest.raises(ValueError, match=rf"Grid '{name}': {key}=.* must be a finite number from .* to "):
            make_grid({"name": name, **ENDS, key: value}, 3, INSTANCES["epsilon"][0])


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0], ids=shown)
def test_flows_shift_is_a_finite_number_in_its_range(value: Any) -> None:
    for key, prediction in (("shift", Flow()), ("mu", Flow())):
        if (key, value) != ("mu", 0):
            with pytest.raises(ValueError, match=rf"Grid 'flow': {key}=.* must be a finite number from .* to "):
                make_grid({"name": "flow", key: value}, 3, prediction)
    plain = make_grid({"name": "flow", "shift": None, "mu": None}, 3, Flow())
    assert torch.equal(plain, make_grid({"name": "flow"}, 3, Flow()))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"name": "flow", "shfit": 3.0}, r"Grid 'flow' has no parameter \['shfit'\]: it takes \['mu', 'shift'\]"),
        ({"name": "flow", "shift": None, "shfit": 3.0}, r"no parameter \['shfit'\]"),
        ({"name": ["flow"]}, r"Unknown grid \['flow'\]"),
        ({"name": "polynomial"}, "Grid 'polynomial' needs sigma_min and sigma_max"),
        ({"name": "logsnr", "sigma_min": 0.0, "sigma_max": 2.0}, "'logsnr': sigma_min=0 must be above 0"),
        ({"name": "polynomial", "sigma_min": 9.0, "sigma_max": 9.0}, "sigma_min=9 must be less than sigma_max=9"),
        ({"sigmas": [1.0, 0.6, 0.3, 0.0], "name": "flow"}, r"no other keys; got \['name'\] too"),
        ({"sigmas": "3210"}, "sigmas='3210' must be a list of finite numbers"),
        ({"sigmas": 3.0}, "sigmas=3.0 must be a list"),
        ({"sigmas": [3.0, 2.0, "1", 0.0]}, "must be a list of finite numbers"),
        ({"sigmas": [3.0, 2.0, True, 0.0]}, "must be a list of finite numbers"),
        ({"sigmas": [[3.0], 2.0, 1.0, 0.0]}, "must be a list of finite numbers"),
        ({"sigmas": [10**400, 2.0, 1.0, 0.0]}, "must be a list of finite numbers"),
        ({"sigmas": [1e300, 2.0, 1.0, 0.0]}, "from 0 to 1e\\+06"),
        ([], r"A grid is a mapping .* got \[\]"),
    ],
    ids=str,
)
def test_nothing_in_a_grid_is_dropped_or_guessed(spec: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_grid(spec, 3, Flow())


def test_a_flow_network_has_levels_up_to_1() -> None:
    for spec in ({"sigmas": [2.0, 0.6, 0.3, 0.0]}, {"name": "polynomial", **ENDS}):
        with pytest.raises(ValueError, match=r"flow network's levels are in \[0, 1\]: the grid .* starts at"):
            make_grid(spec, 3, Flow())


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_a_thousand_steps_take_no_time(name: str) -> None:
    start = time.perf_counter()
    assert len(make_grid({"name": name, **GRID_SPECS[name]}, 1000, INSTANCES["epsilon"][0])) == 1001
    assert time.perf_counter() - start < 1


# ---------------------------------------------------------------------- SolverTable


GRID = {"name": "polynomial", "sigma_min": 0.002, "sigma_max": 80.0}


@pytest.mark.parametrize(
    "weights, scale, afs, message",
    [
        (torch.ones(3), torch.ones(3), False, r"N x K table; got shape \(3,\)"),
        (torch.ones(0, 2), torch.ones(0), False, r"N x K table; got shape \(0, 2\)"),
        (torch.ones(3, 1), torch.ones(2), False, r"one entry per step \(3\); got shape \(2,\)"),
        (torch.tensor([[1.0], [float("nan")]]), torch.ones(2), False, r"weights must be finite.*nan"),
        (torch.ones(2, 1), torch.tensor([1.0, float("inf")]), False, r"time_scale must be finite.*inf"),
        (torch.ones(2, 1), torch.tensor([1.0, 0.0]), False, r"time_scale must be positive.*0\.0"),
        (torch.ones(3, 2), torch.ones(3), False, r"do not exist yet"),
        (torch.ones(3, 3).tril().index_fill(1, torch.tensor(2), 1.0), torch.ones(3), False, r"do not exist yet"),
        (torch.ones(1, 1), torch.ones(1), True, r"AFS table needs at least two steps"),
    ],
)
def test_table_validates_itself(weights: Tensor, scale: Tensor, afs: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SolverTable(weights, scale, GRID, afs)


def test_table_refuses_levels_no_network_can_be_asked_at() -> None:
    table = SolverTable(torch.tensor([[1.5], [1.0], [1.0]]), torch.ones(3), {"sigmas": [3.0, 0.1, 0.05, 0.0]})
    with pytest.raises(ValueError, match=r"must be positive.*belong to this grid"):
        table.schedule(EDM())


def test_table_schedule_uses_its_own_grid_or_the_pipelines_mu() -> None:
    table = SolverTable(torch.ones(4, 1), torch.full((4,), 0.9), {"name": "flow"})
    schedule = table.schedule(Flow(), mu=1.1)
    torch.testing.assert_close(schedule.levels, flow(4, mu=1.1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(schedule.queries, 0.9 * flow(4, mu=1.1)[:-1], rtol=1e-6, atol=0)
