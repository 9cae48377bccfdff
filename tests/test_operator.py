"""R_phi: what it can see, what it costs, that it is differentiable, and that it keeps its precision."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dywspan import DyWeightScheduler, SpanLiftScheduler
from dywspan.core.continuous import ContinuousLift
from dywspan.core.operator import (
    OPERATORS,
    Kind,
    Lift,
    Operator,
    ResidualOperator,
    conditioning,
    make_operator,
    residual,
)

SIZE = {"channels": 2, "order": 3, "width": 4, "expansion": 2}
CONDITION = torch.tensor([0.3, -0.6, 0.2])


def randomised(**changes: Any) -> ResidualOperator:
    """No weight is zero, the head's included."""
    operator = ResidualOperator(**SIZE | changes).requires_grad_(False)
    for parameter in operator.parameters():
        nn.init.normal_(parameter, std=1 / max(1, parameter[0].numel()) ** 0.5)
    return operator


def values(batch: int, k: int, side: int = 9, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A state and k derivatives."""
    return list(torch.randn(1 + k, batch, SIZE["channels"], side, side, dtype=torch.float64).to(dtype))


# ---------------------------------------------------------------------- size


def test_the_papers_size() -> None:
    """3 x 64 x 64 and K = 3: 0.111M parameters; +4.79 GFLOPs over 8 lifted steps."""
    operator = ResidualOperator(3, 3)
    assert sum(p.numel() for p in operator.parameters()) == 111_555
    with FlopCounterMode(display=False) as counter:
        operator(torch.zeros(1, 12, 64, 64), torch.zeros(1, 3))
    # The counter has the conditioning's linear layers too, which cost next to nothing.
    linear = 2 * sum(m.weight.numel() for m in operator.modules() if isinstance(m, nn.Linear))
    assert counter.get_total_flops() == operator.flops(64, 64) + linear
    assert linear < 2e-4 * operator.flops(64, 64)
    assert 8 * operator.flops(64, 64) == pytest.approx(4.79e9, rel=0.01)


@given(
    channels=st.integers(1, 4), order=st.integers(1, 4), width=st.integers(1, 9), blocks=st.integers(0, 3),
    expansion=st.integers(1, 3), kernel=st.sampled_from([1, 3, 5]), height=st.integers(1, 9), side=st.integers(1, 9),
)  # fmt: skip
def test_flops_of_any_size(height: int, side: int, **size: int) -> None:
    operator = ResidualOperator(**size)
    with FlopCounterMode(display=False) as counter:
        operator(torch.zeros(1, (1 + size["order"]) * size["channels"], height, side), torch.zeros(1, 3))
    linear = 2 * sum(m.weight.numel() for m in operator.modules() if isinstance(m, nn.Linear))
    assert counter.get_total_flops() == operator.flops(height, side) + linear


def test_even_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="kernel=2 must be odd"):
        ResidualOperator(3, 3, kernel=2)


@pytest.mark.parametrize("kind", sorted(OPERATORS))
def test_every_size_has_limits_and_is_made_within_them_at_once(kind: str) -> None:
    limits, start = OPERATORS[kind].limits, time.perf_counter()
    for end in (0, 1):
        with torch.device("meta"):
            operator = make_operator({"kind": kind, **{k: v[end] for k, v in limits.items()}})
        assert (operator.channels, operator.order) == (limits["channels"][end], limits["order"][end])
    assert time.perf_counter() - start < 2
    least = {"kind": kind, **{k: v[0] for k, v in limits.items()}}
    for key, (low, high) in limits.items():
        for value in (low - 1, high + 1, -(10**400), True, 1.0, "1", None, [1], math.nan):
            with pytest.raises(ValueError, match=rf"{key}=.* must be a whole number from {low} to {high}"):
                make_operator({**least, key: value})


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"channels": 2}, "Operator 'spatial' needs order"),
        ({**SIZE, "depth": 3}, r"Operator 'spatial' has no size \['depth'\]: it takes \['blocks'"),
        ({**SIZE, 3: 3}, r"has no size \['3'\]"),
        ({**SIZE, "kind": "mlp"}, r"Unknown operator kind='mlp': use one of \['spatial'"),
        ({**SIZE, "kind": ["spatial"]}, r"Unknown operator kind=\['spatial'\]"),
        ({**SIZE, "kind": None}, "Unknown operator kind=None"),
        ({**SIZE, "kernel": 2}, "kernel=2 must be odd"),
        ([2, 3], r"operator=\[2, 3\] must be a mapping of sizes"),
        (None, "operator=None must be a mapping"),
    ],
    ids=str,
)
def test_what_is_no_operator_is_named(spec: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_operator(spec)


class Toy(Operator):
    """A 1x1 convolution of the state."""

    def __init__(self, channels: int, order: int) -> None:
        super().__init__()
        self.channels, self.order = channels, order
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        return self.mix(images[:, : self.channels])


def test_another_kind_takes_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATORS, "toy", Kind(Toy, {"channels": (1, 8), "order": (1, 4)}))
    lifts = {"2": {"alpha": [1.0, 1.0], "beta": [0.5, 0.5]}}
    made = SpanLiftScheduler(operator={"kind": "toy", "channels": 2, "order": 3}, lifts=lifts, solver="ipndm")
    made.initialize().save_pretrained(tmp_path)
    results = []
    for scheduler in (made, SpanLiftScheduler.from_pretrained(tmp_path)):
        assert isinstance(scheduler.operators["shared"], Toy)
        scheduler.set_timesteps(2)
        x = torch.linspace(-1, 1, 32).reshape(1, 2, 4, 4)
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * x, t, x).prev_sample
        results.append(x)
    assert torch.equal(*results)
    with pytest.raises(ValueError, match="channels=9 must be a whole number from 1 to 8"):
        make_operator({"kind": "toy", "channels": 9, "order": 3})


@pytest.mark.parametrize("name", ["a.stem", "", "a b", "é", "x" * 65, "a\n", 3, None, ["a"]], ids=str)
def test_an_operators_name_is_part_of_its_weights_names(name: Any) -> None:
    """ "a" and "a.stem" would read each other's weights."""
    said = "operator=.* must be 1 to 64 letters, digits, '-' or '_'"
    with pytest.raises(ValueError, match=said):
        Lift(torch.ones(2), torch.ones(2), name)
    with pytest.raises(ValueError, match=said):
        ContinuousLift(torch.zeros(2, 8), 2, operator=name)
    entry = {"alpha": [1.0, 1.0], "beta": [0.0, 0.0], "operator": name}
    with pytest.raises(ValueError, match=said):
        SpanLiftScheduler(operator={"channels": 2, "order": 1}, lifts={"2": entry})


@pytest.mark.parametrize("bad", [{"alpha": [1.0, math.nan]}, {"beta": [1.0]}, {"beta": [1.0, math.inf]}])
def test_scalars_that_are_none(bad: dict[str, list[float]]) -> None:
    good = {"alpha": [1.0, 1.0], "beta": [0.0, 0.0]}
    with pytest.raises(ValueError, match=f"finite, one entry per step; got {next(iter(bad))} ="):
        Lift(**{k: torch.tensor(v) for k, v in (good | bad).items()})


# ---------------------------------------------------------------------- what it sees


def reach(operator: ResidualOperator, side: int = 13) -> set[tuple[int, int]]:
    """Offsets (dy, dx) of the inputs on which the centre of the output depends."""
    images = torch.randn(1, (1 + operator.order) * operator.channels, side, side).requires_grad_()
    output = operator(images, CONDITION[None])[0, :, side // 2, side // 2].square().sum()
    seen = torch.autograd.grad(output, images)[0].abs().sum((0, 1)).nonzero() - side // 2
    return {(int(y), int(x)) for y, x in seen}


@pytest.mark.parametrize(("kernel", "blocks"), [(1, 2), (3, 2), (3, 1), (5, 1), (3, 0)])
def test_receptive_field(kernel: int, blocks: int) -> None:
    """Depthwise convolutions and the head look (k - 1) / 2 far each, everything else at its own pixel."""
    radius = (blocks + 1) * (kernel - 1) // 2
    inside = range(-radius, radius + 1)
    assert reach(randomised(kernel=kernel, blocks=blocks)) == {(y, x) for y in inside for x in inside}


@pytest.mark.parametrize("kernel", [1, 3])
def test_only_the_spatial_one_knows_its_neighbours(kernel: int) -> None:
    """The pointwise ablation is a function of each pixel's own values: shuffled pixels, shuffled output."""
    operator = randomised(kernel=kernel)
    x, *history = values(2, 3)
    order = torch.randperm(81)

    def shuffled(v: Tensor) -> Tensor:
        return v.flatten(2)[:, :, order].unflatten(2, (9, 9))

    output = residual(operator, x, history, CONDITION)
    same = residual(operator, shuffled(x), [shuffled(d) for d in history], CONDITION)
    equal = torch.allclose(same, shuffled(output), rtol=1e-5, atol=1e-5)
    assert equal == (kernel == 1) and output.std() > 0.1


@pytest.mark.parametrize("part", range(4))
def test_state_and_every_derivative_are_read_from_their_own_place(part: int) -> None:
    """Each input moves the output, and by what the stem's own columns for it say (a stem alone is linear)."""
    operator = randomised(blocks=0, kernel=1)
    x = values(1, 3, dtype=torch.float64)
    operator.double()
    before = residual(operator, x[0], x[1:], CONDITION.double())
    bump = torch.randn_like(x[part])
    x[part] = x[part] + bump
    after = residual(operator, x[0], x[1:], CONDITION.double())
    columns = operator.stem.weight[:, 2 * part : 2 * part + 2, 0, 0]
    expected = torch.einsum("oc,ci,bihw->bohw", operator.head.weight[:, :, 0, 0], columns, bump)
    torch.testing.assert_close(after - before, expected, rtol=1e-9, atol=1e-12)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("known", [0, 1, 2, 3, 5])
def test_missing_history_is_zeros_and_older_history_unused(known: int) -> None:
    operator = randomised()
    x, *history = values(2, known)
    padded = (history + [torch.zeros_like(x)] * 3)[:3]
    expected = operator(torch.cat([x, *padded], 1), CONDITION[None])
    torch.testing.assert_close(residual(operator, x, history, CONDITION), expected, rtol=1e-5, atol=1e-5)


def test_every_condition_matters() -> None:
    operator = randomised()
    x, *history = values(1, 3)
    base = residual(operator, x, history, CONDITION)
    for k in range(3):
        moved = residual(operator, x, history, CONDITION + 0.1 * torch.eye(3)[k])
        assert (moved - base).abs().max() > 1e-3


def test_samples_do_not_mix() -> None:
    operator = randomised()
    x, *history = values(3, 2)
    together = residual(operator, x, history, CONDITION)
    alone = [residual(operator, x[i : i + 1], [d[i : i + 1] for d in history], CONDITION) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    # A condition each, too.
    images = torch.cat([x, *history, torch.zeros_like(x)], 1)
    conditions = CONDITION + 0.3 * torch.randn(3, 3)
    together = operator(images, conditions)
    alone = [operator(images[i : i + 1], conditions[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert (together - operator(images, conditions.flip(0))).abs().max() > 0.01


# ---------------------------------------------------------------------- conditioning


@given(
    st.lists(st.floats(-2, 2), min_size=1, max_size=4),
    st.floats(0, 1e30),
    st.one_of(st.floats(-1e30, 1e30), st.just(0.0)),
)
def test_conditions_are_bounded_at_any_level(times: list[float], level: float, size: float) -> None:
    log_snr = -torch.full((len(times),), level, dtype=torch.float64).log()
    xi = conditioning(torch.tensor(times).double(), log_snr, torch.full((len(times),), size, dtype=torch.float64))
    assert xi.shape == (len(times), 3)
    assert bool(xi.isfinite().all()) and float(xi[:, 1:].abs().max()) <= 1 and float(xi[:, 0].abs().max()) <= 5


def test_conditions_tell_levels_and_sizes_apart() -> None:
    levels = torch.tensor([1e-3, 1e-2, 0.1, 1.0, 10.0, 80.0, 4096.0], dtype=torch.float64)
    xi = conditioning(torch.linspace(0, 1, 7), -levels.log(), -levels)
    assert bool((xi[:, 0].diff() > 0.01).all() and (xi[:, 1].diff() < -0.01).all() and (xi[:, 2].diff() > 0.01).all())
    # xi = (2 t - 1, tanh(lambda / 4), tanh(log|h| / 4)) at t = 1, sigma = 4096, h = -4096
    expected = [1.0, math.tanh(-12 * math.log(2) / 4), math.tanh(12 * math.log(2) / 4)]
    torch.testing.assert_close(xi[-1].tolist(), expected, rtol=1e-12, atol=0)
    assert float(xi[0, 0]) == -1  # t = 0


ENDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "flow, sigma = 1": (diffusers.FlowMatchEulerDiscreteScheduler(), {"sigmas": [1.0, 0.5, 1e-6, 0.0]}),
    "flow, inverted": (
        diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), {"sigmas": [1.0, 0.5, 1e-6, 0.0]},
    ),
    "VP": (
        diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False), {"sigmas": [150.0, 1.0, 1e-4, 0.0]},
    ),
    "VP, zero terminal SNR": (
        diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True,
            prediction_type="v_prediction",
        ),
        {"sigmas": [4096.0, 1.0, 1e-3, 0.0]},
    ),
    "EDM": (diffusers.EDMEulerScheduler(), {"sigmas": [80.0, 1.0, 0.002, 0.0]}),
    "continuous (SVD)": (
        diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
        {"sigmas": [700.0, 1.0, 0.002, 0.0]},
    ),
    # Time shifting may take a level past sigma = 1, where no signal is left and log SNR has no value.
    "flow, past 1": (diffusers.FlowMatchEulerDiscreteScheduler(), {"sigmas": [1.0, 0.9, 0.3, 0.0]}),
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_conditions_at_both_ends_of_every_kind_of_grid(end: str) -> None:
    source, grid = ENDS[end]
    table = {"weights": [[-0.5] if "past" in end else [1.0], [1.0, 0.0], [1.0, 0.0]], "grid": grid}
    scheduler = SpanLiftScheduler.from_config(
        source.config, tables={"3": table}, operator=SIZE,
        lifts={"3": {"alpha": [1.0] * 3, "beta": [1.0] * 3}},
    ).initialize()  # fmt: skip
    scheduler.operators["shared"] = randomised()
    scheduler.set_timesteps(3)
    conditions = scheduler.plan.lift.conditions
    assert bool(conditions.isfinite().all()) and float(conditions.abs().max()) <= 5
    assert conditions.dtype == torch.float32 and len({tuple(row) for row in conditions.tolist()}) == 3
    if "past" in end:
        assert float(scheduler.plan.schedule.levels[1]) > 1 and conditions[1, 1] == -1
    elif "flow" in end:
        assert conditions[0, 1] == -1
    else:
        expected = [math.tanh(-math.log(sigma) / 4) for sigma in grid["sigmas"][:-1]]
        torch.testing.assert_close(conditions[:, 1], torch.tensor(expected))
    x = torch.randn(1, 2, 5, 5) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(x.sin(), t, x).prev_sample
        assert bool(x.isfinite().all())


# ---------------------------------------------------------------------- derivatives


def test_gradcheck_of_the_operator() -> None:
    operator = randomised().double()
    names, leaves = zip(*((n, p.clone().requires_grad_()) for n, p in operator.named_parameters()))
    images = torch.randn(2, 8, 3, 3, dtype=torch.float64, requires_grad=True)
    condition = CONDITION[None].double().requires_grad_()

    def output(images: Tensor, condition: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(operator, dict(zip(names, parameters)), (images, condition))

    assert torch.autograd.gradcheck(output, (images, condition, *leaves), fast_mode=True)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_gradcheck_of_a_whole_run(kind: str) -> None:
    """Through every step of the scheduler, to alpha, beta and each weight of the operator."""
    source = diffusers.FlowMatchEulerDiscreteScheduler() if kind == "flow" else diffusers.DDIMScheduler()
    base = DyWeightScheduler.from_config(source.config, solver="ipndm", solver_order=2)
    scheduler = SpanLiftScheduler.from_config(base.config, operator=SIZE)
    noise = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    scheduler.operators["shared"] = operator = randomised().double()
    names, leaves = zip(*((n, p.clone().requires_grad_()) for n, p in operator.named_parameters()))
    alpha, beta = (torch.tensor(v).double().requires_grad_() for v in ([0.9, 1.1, 1.05], [0.3, -0.4, 0.2]))

    def end(alpha: Tensor, beta: Tensor, *parameters: Tensor) -> Tensor:
        for name, value in zip(names, parameters):
            module, _, last = name.rpartition(".")
            owner = operator.get_submodule(module)
            owner._parameters.pop(last, None)
            setattr(owner, last, value)
        scheduler.lifts[3] = Lift(alpha, beta)
        scheduler.set_timesteps(3)
        x = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step((2 * x).sin() + 0.3 * x, t, x).prev_sample
        return x

    assert torch.autograd.gradcheck(end, (alpha, beta, *leaves), fast_mode=True)
    gradients = torch.autograd.grad(end(alpha, beta, *leaves).square().sum(), (alpha, beta, *leaves))
    assert all(float(g.abs().max()) > 0 for g in gradients)
    assert gradients[0].count_nonzero() == gradients[1].count_nonzero() == 3


def test_a_fresh_operator_is_silent_and_can_learn() -> None:
    """The head is zero, so the output is; with beta != 0 its gradient is not."""
    operator = ResidualOperator(**SIZE)
    x, *history = values(2, 3)
    output = residual(operator, x, history, CONDITION)
    assert not bool(output.any())
    output.sub(1).square().sum().backward()
    assert float(operator.head.weight.grad.abs().max()) > 0


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_computes_in_float32_whatever_surrounds_it(dtype: torch.dtype, autocast: bool) -> None:
    """The float32 result of the same inputs, rounded once."""
    operator = randomised()
    x, *history = values(2, 2, dtype=dtype)
    images = torch.cat([x, *history, torch.zeros_like(x)], 1).float()
    exact = operator(images.contiguous(memory_format=torch.channels_last), CONDITION[None])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = residual(operator, x, history, CONDITION)
        assert (operator(images, CONDITION[None]).dtype == torch.bfloat16) == autocast  # the surroundings are real
    assert output.dtype == dtype and torch.equal(output, exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_under_autocast_is_the_step_without(dtype: torch.dtype) -> None:
    lift = {"alpha": [0.9, 1.1], "beta": [0.6, -0.4]}
    scheduler = SpanLiftScheduler(solver="ipndm", operator=SIZE, lifts={"2": lift}).initialize()
    scheduler.operators["shared"] = randomised()
    start, ends = torch.randn(2, 2, 7, 7).to(dtype), []
    for autocast in (False, True):
        scheduler.set_timesteps(2)
        x = start * scheduler.init_noise_sigma
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for t in scheduler.timesteps:
                x = scheduler.step(x.sin(), t, x).prev_sample
        ends.append(x)
    assert ends[0].dtype == dtype and torch.equal(*ends)


def test_no_graph_break() -> None:
    operator = randomised()
    compiled = torch.compile(copy.deepcopy(operator), fullgraph=True, backend="aot_eager")
    for batch in (1, 3):
        images = torch.randn(batch, 8, 9, 5)
        torch.testing.assert_close(compiled(images, CONDITION[None]), operator(images, CONDITION[None]))
