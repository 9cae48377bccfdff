"""SpanLiftScheduler: its equations, diffusers' contract, and files that say what is wrong with them."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_artifact import ROOT, RUN, _python
from test_scheduler import GRID, SOURCES, DeviceReads, classical, learned, run, sample_of, with_table
from torch import Tensor, nn

from dywspan import DyWeightScheduler, SpanLiftScheduler
from dywspan.core.bases import BASES
from dywspan.core.grid import make_grid
from dywspan.core.operator import Lift
from dywspan.core.prediction import EDM

CONFIG, WEIGHTS = "scheduler_config.json", "spanlift.safetensors"
SIZE = {"channels": 4, "order": 3, "width": 8}
KINDS = pytest.mark.parametrize(
    "kind, afs", [(k, a) for k in SOURCES for a in (False, True) if not (a and k == "flow")]
)
TABLES = ["table", "AFS table"]


def base_of(solver: str, kind: str = "epsilon", n: int = 5) -> DyWeightScheduler:
    if solver in TABLES:
        return with_table(kind, learned(kind, n, afs="AFS" in solver))
    return classical(solver, kind)


def randomise(scheduler: SpanLiftScheduler, seed: int = 0) -> SpanLiftScheduler:
    """No weight is zero, the heads included."""
    generator = torch.Generator().manual_seed(seed)
    for operator in scheduler.operators.values():
        for parameter in operator.requires_grad_(False).parameters():
            scale = max(1, parameter[0].numel()) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / scale)
    return scheduler


def lifted(
    solver: str = "table", kind: str = "epsilon", *, n: int = 5, beta: float = 0.5, alpha: float | None = None,
    seed: int = 0, **config: Any,
) -> SpanLiftScheduler:  # fmt: skip
    """A base, lifted by a random operator; alpha and beta differ from step to step."""
    base = base_of(solver, kind, n)
    base.set_timesteps(n)
    ramp = torch.linspace(0.8, 1.2, len(base.plan.schedule), dtype=torch.float64)
    alphas = ramp.flip(0) if alpha is None else torch.full_like(ramp, alpha)
    lift = {"alpha": alphas.tolist(), "beta": (beta * ramp).tolist()}
    config = {"operator": SIZE, "lifts": {str(n): lift}} | config
    return randomise(SpanLiftScheduler.from_config(base.config, **config).initialize(), seed)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# ---------------------------------------------------------------------- numbers


def by_hand(scheduler: SpanLiftScheduler, kind: str, network: Any, x: Tensor, start: int = 0) -> Tensor:
    """SpanLift eq. (15) written out in the solver frame; an AFS step has no network output and nothing to lift."""
    base, prediction = DyWeightScheduler.from_config(scheduler.config), scheduler.host.prediction
    base.set_timesteps(5)
    schedule, lift, operator = base.plan.schedule, scheduler.lifts[5], scheduler.operators["shared"]
    table = base.tables.get(5)
    grid = make_grid(GRID[kind], len(schedule), prediction) if table else base.plan.schedule.levels
    taken: list[Tensor] = []
    for i in range(start, len(schedule)):
        level, tau = schedule.levels[i], schedule.queries[i]
        afs = schedule.afs and i == 0
        if afs:
            d = x / math.sqrt(1 + float(level) ** 2)
        else:
            output = network(prediction.input_scale(tau) * x, prediction.timestep(tau).float())
            d = prediction.derivative(x, output, level, tau)
        taken.append(d)
        move = sum(c * taken[max(len(taken) - 1 - j, 0)] for j, c in enumerate(schedule.increments[i]))
        if not afs:
            h = float(grid[i + 1] - level)
            known = taken[::-1][:3]
            images = torch.cat([prediction.input_scale(tau) * x, *known, *[torch.zeros_like(x)] * (3 - len(known))], 1)
            time = float(prediction.timestep(tau)) / (1 if isinstance(prediction, EDM) else 1000)
            signal = float(prediction.signal(level))
            log_snr = math.log(signal / float(level)) if signal > 0 else -math.inf
            xi = [2 * time - 1, math.tanh(log_snr / 4), math.tanh(math.log(abs(h)) / 4)]
            residual = operator(images, torch.tensor([xi], dtype=torch.float64))
            move = lift.alpha[i] * move + h * lift.beta[i] * residual
        x = x + move
    return x


@KINDS
def test_a_lifted_run_is_the_method(kind: str, afs: bool, network: Any) -> None:
    scheduler = lifted("AFS table" if afs else "table", kind)
    scheduler.operators["shared"].double()
    scheduler.set_timesteps(5)
    noise = sample_of(dtype=torch.float64)
    end = run(scheduler, network, noise * scheduler.init_noise_sigma)
    sigma_0 = 1.0 if kind == "flow" else GRID[kind]["sigma_max"]
    torch.testing.assert_close(end, by_hand(scheduler, kind, network, sigma_0 * noise), rtol=1e-5, atol=1e-5)
    base = base_of("AFS table" if afs else "table", kind)
    base.set_timesteps(5)
    assert distance(end, run(base, network, noise * base.init_noise_sigma)) > 0.1  # the lift shows


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
@pytest.mark.parametrize("solver", ["euler", "ipndm"])
def test_the_operator_sees_further_back_than_its_base(solver: str, kind: str, network: Any) -> None:
    """Euler keeps one derivative, the operator reads three."""
    scheduler = lifted(solver, kind)
    scheduler.operators["shared"].double()
    scheduler.set_timesteps(5)
    x = sample_of(dtype=torch.float64)
    x_0 = (
        x
        * float(scheduler.init_noise_sigma)
        / scheduler.host.prediction.input_scale(scheduler.plan.schedule.queries[0])
    )
    end = run(scheduler, network, x * scheduler.init_noise_sigma)
    torch.testing.assert_close(end * 1.0, by_hand(scheduler, kind, network, x_0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("start", [1, 3])
def test_a_start_in_mid_table_takes_its_own_rows(kind: str, start: int, network: Any) -> None:
    """img2img: alpha, beta and conditions of the row it starts in; history that was never made is zeros."""
    scheduler = lifted("table", kind)
    scheduler.operators["shared"].double()
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(start)
    prediction, schedule = scheduler.host.prediction, scheduler.plan.schedule
    level, tau = schedule.levels[start], schedule.queries[start]
    clean, noise = sample_of(dtype=torch.float64), sample_of(dtype=torch.float64).flip(0)
    state = prediction.signal(level) * clean + level * noise
    end = run(scheduler, network, prediction.input_scale(tau) * state, scheduler.timesteps[start:])
    torch.testing.assert_close(end, by_hand(scheduler, kind, network, state, start), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("solver", [*TABLES, *BASES])
def test_no_lift_is_the_base_bit_for_bit(solver: str, dtype: torch.dtype, network: Any) -> None:
    """beta = 0 with an operator that says something; and any beta with one that says nothing."""
    base, x = base_of(solver), sample_of(dtype=dtype)
    silent = lifted(solver, alpha=1.0)
    nn.init.zeros_(silent.operators["shared"].head.weight)
    nn.init.zeros_(silent.operators["shared"].head.bias)
    for begin in (0, 2):
        ends = []
        for scheduler in (base, lifted(solver, beta=0.0, alpha=1.0), silent, lifted(solver, alpha=1.0)):
            scheduler.set_timesteps(5)
            scheduler.set_begin_index(begin)
            start = x * scheduler.init_noise_sigma
            ends.append(run(scheduler, network, start.to(dtype), scheduler.timesteps[begin:]))
        assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
        assert distance(ends[3].double(), ends[0].double()) > 0.05 and ends[0].dtype == dtype


@pytest.mark.parametrize("kind", SOURCES)
def test_no_lift_is_the_base_of_every_kind(kind: str, network: Any) -> None:
    ends = []
    for scheduler in (base_of("table", kind), lifted("table", kind, beta=0.0, alpha=1.0)):
        scheduler.set_timesteps(5)
        ends.append(run(scheduler, network, sample_of() * scheduler.init_noise_sigma))
    assert torch.equal(*ends)


@pytest.mark.parametrize("solver", [*TABLES, *BASES])
def test_runs_repeat_bit_for_bit_and_samples_do_not_mix(solver: str, network: Any) -> None:
    scheduler, noise, whole = lifted(solver), sample_of(3), []
    for _ in range(2):
        scheduler.set_timesteps(5)
        whole.append(run(scheduler, network, noise * scheduler.init_noise_sigma))
    assert torch.equal(*whole)
    for i in range(3):
        scheduler.set_timesteps(5)
        alone = run(scheduler, network, noise[i : i + 1] * scheduler.init_noise_sigma)
        assert distance(alone, whole[0][i : i + 1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_per_step(dtype: torch.dtype, network: Any) -> None:
    half, full = lifted(), lifted()
    for scheduler in (half, full):
        scheduler.set_timesteps(5)
        x = sample_of(dtype=dtype) * scheduler.init_noise_sigma
    for t, u in zip(half.timesteps, full.timesteps):
        output = network(x.float(), t).to(dtype)
        exact = full.step(output.float(), u, x.float()).prev_sample
        x = half.step(output, t, x).prev_sample
        assert x.dtype == dtype and torch.equal(x, exact.to(dtype))


# ---------------------------------------------------------------------- no waiting for the device


def require_grad(scheduler: SpanLiftScheduler, n: int = 5) -> list[Tensor]:
    """What a trainer does: the operator's weights become leaves, alpha and beta what some leaves make of them."""
    lift = scheduler.lifts[n]
    leaves = [v.clone().requires_grad_() for v in (lift.alpha, lift.beta)]
    scheduler.lifts[n] = Lift(*(2 * (v / 2) for v in leaves), lift.operator)
    scheduler.operators[lift.operator].requires_grad_()
    return [*leaves, *scheduler.operators[lift.operator].parameters()]


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("start", ["whole", "sliced", "begin index"])
@pytest.mark.parametrize("solver", ["table", "dpmpp", "heun"])
def test_step_never_reads_the_device(solver: str, start: str, trainable: bool, network: Any) -> None:
    scheduler = lifted(solver)
    if trainable:
        require_grad(scheduler)
    scheduler.set_timesteps(5)
    times, x = scheduler.timesteps, sample_of() * scheduler.init_noise_sigma
    if start != "whole":
        times = times[2:]
    if start == "begin index":
        scheduler.set_begin_index(2)
    for t in times:
        output = network(x, t)
        with DeviceReads() as reads:
            x = scheduler.step(output, t, x).prev_sample
        assert reads.seen == []
    assert scheduler.step_index == len(scheduler.timesteps)


@pytest.mark.parametrize("solver", [*TABLES, *BASES])
def test_on_a_device_that_cannot_be_read(solver: str) -> None:
    """Any host read of a meta tensor raises; operator and conditions are moved in set_timesteps, not in step."""
    scheduler = lifted(solver)
    scheduler.set_timesteps(5, device="meta")
    scheduler.set_begin_index(0)
    operator = scheduler.plan.lift.operator
    assert next(operator.parameters()).device.type == scheduler.plan.lift.conditions.device.type == "meta"
    assert next(scheduler.operators["shared"].parameters()).device.type == "cpu", "a pipeline's hooks never see it"
    x = torch.empty(2, 4, 3, 3, device="meta")
    for t in scheduler.timesteps:
        output = torch.empty_like(x)
        with DeviceReads() as reads:
            x = scheduler.step(output, t, x).prev_sample
        assert reads.seen == []
    assert x.device.type == "meta" and scheduler.step_index == len(scheduler.timesteps)


def test_without_a_device_the_sample_tells_it() -> None:
    """SDE editing scripts call set_timesteps(n) and step on the GPU: moved once, at the first step."""
    scheduler = lifted()
    scheduler.set_timesteps(5)
    moves, x = [], torch.empty(2, 4, 3, 3, device="meta")
    for t in scheduler.timesteps.tolist()[:3]:
        with DeviceReads() as reads:
            scheduler.step(x, t, x)
        moves.append(len(reads.seen))
    assert moves[0] > 0 and moves[1:] == [0, 0]


# ---------------------------------------------------------------------- gradients, copies


@pytest.mark.parametrize("how", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("solver", TABLES)
def test_copies_while_a_graph_is_held(how: Callable, solver: str, network: Any) -> None:
    scheduler = lifted(solver)
    leaves = require_grad(scheduler)
    scheduler.set_timesteps(5)
    x = sample_of() * scheduler.init_noise_sigma
    middle = run(scheduler, network, x, scheduler.timesteps[:2])
    assert middle.requires_grad
    twin = how(scheduler)
    assert twin.step_index == 2 and type(twin) is SpanLiftScheduler
    end = run(scheduler, network, middle, scheduler.timesteps[2:])
    gradients = torch.autograd.grad(end.square().sum(), leaves)
    used = [g[1:] if "AFS" in solver and i < 2 else g for i, g in enumerate(gradients)]
    assert all(float(g.abs().max()) > 0 for g in used) and used[1].count_nonzero() == 5
    with torch.no_grad():
        ready = run(twin, network, x.detach())  # as it is, without a new set_timesteps
    torch.testing.assert_close(ready, end.detach(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # a copy's own numbers: changing them leaves the first one alone
        next(twin.operators["shared"].parameters()).zero_()
    scheduler.set_timesteps(5)
    assert torch.equal(run(scheduler, network, sample_of() * scheduler.init_noise_sigma), end)


def test_a_copy_runs_beside_the_first(network: Any) -> None:
    scheduler = lifted()
    scheduler.set_timesteps(5)
    twin, ends = copy.deepcopy(scheduler), []
    x, y = sample_of(), sample_of().flip(0)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
        y = twin.step(network(y, t), t, y).prev_sample
    for start in (sample_of(), sample_of().flip(0)):
        scheduler.set_timesteps(5)
        ends.append(run(scheduler, network, start))
    assert torch.equal(ends[0], x) and torch.equal(ends[1], y)


# ---------------------------------------------------------------------- errors before sampling


def test_errors_name_the_way_out() -> None:
    scheduler = lifted("ipndm")
    with pytest.raises(
        ValueError, match=r"No SpanLift for num_inference_steps=4: .*\[5\].*DyWeightScheduler\.from_config"
    ):
        scheduler.set_timesteps(4)
    without = SpanLiftScheduler.from_config(scheduler.config)
    with pytest.raises(ValueError, match=r"weights are not part of a configuration: .*from_pretrained.*deepcopy"):
        without.set_timesteps(5)
    with pytest.raises(ValueError, match=r"never loaded, .*from_pretrained, or set lifts=None"):
        without.save_pretrained("nowhere")
    assert not Path("nowhere").exists()
    with pytest.raises(ValueError, match=r"Unknown layout 'hwc': use one of .*'packed'"):
        SpanLiftScheduler(layout="hwc")
    with pytest.raises(ValueError, match=r"needs its operator's size: operator="):
        SpanLiftScheduler(lifts={"1": {"alpha": [1.0], "beta": [0.0]}})
    scheduler.lifts[5] = Lift(torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match="SpanLift for 5 steps has 4 entries; its base takes 5"):
        scheduler.set_timesteps(5)
    scheduler = lifted()
    scheduler.set_timesteps(5)
    with pytest.raises(
        ValueError,
        match=r"Layout 'image' does not fit this sample of shape \(2, 3, 8, 8\): .*made for 4 channels; this has 3",
    ):
        scheduler.step(torch.zeros(2, 3, 8, 8), scheduler.timesteps[0], torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        ({"channels": 4}, "does not describe a ResidualOperator: .*order"),
        ({**SIZE, "depth": 3}, "does not describe a ResidualOperator: .*depth"),
        ({**SIZE, "width": "8"}, "does not describe a ResidualOperator"),
        ({**SIZE, "kernel": 2}, "kernel=2 must be odd"),
    ],
)
def test_an_operator_that_cannot_be_built(operator: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lifted(operator=operator)


@pytest.mark.parametrize(
    ("lifts", "message"),
    [
        ([1, 2], "lifts must map numbers of steps to SpanLift entries; got a list"),
        ({"5": [1.0]}, 'Damaged SpanLift entry "5"'),
        ({"5": {"alpha": [1.0] * 5}}, '"5": .*beta'),
        ({"5": {"alpha": [1.0] * 5, "beta": [0.0] * 4}}, '"5": .*one entry per step'),
        ({"5": {"alpha": [1.0] * 5, "beta": [0.0] * 4 + [math.nan]}}, '"5": .*finite'),
        ({"5": {"alpha": ["1"] * 5, "beta": [0.0] * 5}}, '"5": .*alpha must hold numbers only'),
        ({"five": {"alpha": [1.0], "beta": [0.0]}}, 'Damaged SpanLift entry "five"'),
        ({"05": {"alpha": [1.0], "beta": [0.0]}}, 'Damaged SpanLift entry "05": .*number of steps'),
    ],
)
def test_damaged_scalars(lifts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpanLiftScheduler(operator=SIZE, lifts=lifts)


def test_the_base_alone(network: Any) -> None:
    """What the error above recommends: the configuration still makes a DyWeightScheduler."""
    ends = []
    for scheduler in (DyWeightScheduler.from_config(lifted().config), base_of("table")):
        scheduler.set_timesteps(5)
        ends.append(run(scheduler, network, sample_of()))
    assert torch.equal(*ends)


# ---------------------------------------------------------------------- files


def two_operators() -> SpanLiftScheduler:
    """Three step counts, of which two share an operator."""
    scalars = {n: torch.linspace(-1, 1, n, dtype=torch.float64) / 3 for n in (3, 4, 5)}
    lifts = {
        str(n): {"alpha": (1 + v).tolist(), "beta": v.tolist(), "operator": "few" if n < 5 else "many"}
        for n, v in scalars.items()
    }
    return lifted("dpmpp", lifts=lifts)


def test_save_and_load_bit_for_bit(tmp_path: Path, network: Any) -> None:
    made = two_operators()
    # What was learned after it was made is saved too, every double of it.
    made.lifts[4] = Lift(torch.rand(4, dtype=torch.float64), -torch.rand(4, dtype=torch.float64) * 1e-300, "few")
    made.save_pretrained(tmp_path / "one")
    loaded = SpanLiftScheduler.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    assert sorted(os.listdir(tmp_path / "one")) == [CONFIG, WEIGHTS]
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for n in (3, 4, 5):
        assert loaded.lifts[n].operator == made.lifts[n].operator
        assert torch.equal(loaded.lifts[n].alpha, made.lifts[n].alpha)
        assert torch.equal(loaded.lifts[n].beta, made.lifts[n].beta)
        ends = []
        for scheduler in (made, loaded, pickle.loads(pickle.dumps(loaded))):
            scheduler.set_timesteps(n)
            ends.append(run(scheduler, network, sample_of() * scheduler.init_noise_sigma))
        assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    state = load_file(tmp_path / "one" / WEIGHTS)
    assert {k.split(".")[0] for k in state} == {"few", "many"} and all(v.dtype == torch.float32 for v in state.values())
    assert not any(p.requires_grad for p in loaded.operators["few"].parameters())


def test_the_configuration_survives_json(tmp_path: Path) -> None:
    made = lifted()
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["_class_name"] == "SpanLiftScheduler" and config["operator"] == SIZE
    assert config["lifts"]["5"]["alpha"] == made.lifts[5].alpha.tolist()
    assert f'"alpha": {json.dumps(made.lifts[5].alpha.tolist())}' in (tmp_path / CONFIG).read_text()  # on one line
    again = SpanLiftScheduler.from_config(config).load_operator(tmp_path / WEIGHTS)
    assert again.to_json_string() == made.to_json_string()


def test_overrides_and_unused_arguments(tmp_path: Path) -> None:
    lifted("ipndm").save_pretrained(tmp_path / "sub")
    scheduler, unused = SpanLiftScheduler.from_pretrained(
        tmp_path, subfolder="sub", return_unused_kwargs=True, solver="euler", stranger=1
    )
    assert scheduler.config["solver"] == "euler" and unused["stranger"] == 1 and scheduler.operators


def test_weights_are_there_before_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds a new configuration finds the weights it was saved with."""
    made, seen, write = lifted(), [], SpanLiftScheduler.to_json_file

    def watch(self: Any, path: Any) -> None:
        seen.append(load_file(tmp_path / WEIGHTS))
        write(self, path)

    monkeypatch.setattr(SpanLiftScheduler, "to_json_file", watch)
    made.save_pretrained(tmp_path)
    assert len(seen) == 1 and torch.equal(seen[0]["shared.head.weight"], made.operators["shared"].head.weight)


@pytest.mark.parametrize("broken", ["writing", "renaming"])
def test_a_failed_write_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    lifted().save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS)}

    def full(target: Any, *args: Any) -> None:
        if broken == "writing":
            with open(target, "wb") as file:
                file.write(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "write_bytes") if broken == "writing" else (os, "replace")), full)
        with pytest.raises(OSError, match="No space left"):
            lifted(seed=1).save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_a_save_cut_short_between_the_files_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New weights beside the old configuration fit in shape, and mean nothing."""
    lifted().save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(SpanLiftScheduler, "to_json_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            lifted(seed=1).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]
    with pytest.raises(ValueError, match=f"{WEIGHTS} is not the file this configuration was saved with.*both again"):
        SpanLiftScheduler.from_pretrained(tmp_path)


def test_a_scheduler_folder_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        lifted().save_pretrained(tmp_path / "spanlift")
        assert not caplog.records
        lifted().save_pretrained(tmp_path / "scheduler")
    assert "keeps diffusers from downloading the pipeline" in caplog.text and "push_to_hub" in caplog.text
    assert SpanLiftScheduler.from_pretrained(tmp_path, subfolder="scheduler").operators
    for subfolder in ("scheduler", "v2/scheduler", "scheduler/"):
        with pytest.raises(ValueError, match=r"subfolder='.*scheduler/?'.*repository of its own"):
            lifted().push_to_hub("org/name", subfolder=subfolder)


# ---------------------------------------------------------------------- damaged files


def _edit(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS)

    return damage


def _with(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return _edit(lambda state: state.update({name: change(state[name]).contiguous()}))


class Bomb:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("exploded",))


def _from(**config: Any) -> Callable[[Path], None]:
    """Weights of another solver."""
    return lambda folder: _keep_config(folder, lambda: lifted(**config).save_pretrained(folder))


def _keep_config(folder: Path, save: Callable[[], None]) -> None:
    config = (folder / CONFIG).read_bytes()
    save()
    (folder / CONFIG).write_bytes(config)


HEAD, FIT = "shared.head.weight", "both again"
DAMAGE: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "missing": (lambda f: (f / WEIGHTS).unlink(), OSError, "is not there: .*copy both"),
    "renamed": (lambda f: (f / WEIGHTS).rename(f / "model.safetensors"), OSError, "is not there: .*copy both"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), ValueError, "is damaged .*download it again"),
    "text": (lambda f: (f / WEIGHTS).write_text("<html>404</html>" * 9), ValueError, "is damaged"),
    "pointer": (lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com"), ValueError, "damaged"),
    "pickle": (lambda f: (f / WEIGHTS).write_bytes(pickle.dumps(Bomb())), ValueError, "is damaged"),
    "torch.save": (lambda f: torch.save({HEAD: Bomb()}, f / WEIGHTS), ValueError, "is damaged"),
    "float16": (_with(HEAD, Tensor.half), ValueError, f"{HEAD} is torch.float16 .*made for another model"),
    "float64": (_with(HEAD, Tensor.double), ValueError, f"{HEAD} is torch.float64"),
    "shape": (_with(HEAD, lambda v: v.transpose(2, 3)[:, :, :2]), ValueError, f"{HEAD} is .*needs torch.float32"),
    "flattened": (_with(HEAD, lambda v: v.flatten()), ValueError, f"{HEAD} is .*needs torch.float32"),
    "nan": (_with(HEAD, lambda v: v / 0 * 0), ValueError, f"{HEAD} holds numbers that are not finite"),
    "inf": (_with(HEAD, lambda v: v.abs() / 0), ValueError, f"{HEAD} holds numbers that are not finite"),
    "tensor missing": (_edit(lambda s: s.pop(HEAD)), ValueError, f"missing .*{HEAD}.*same save"),
    "tensor extra": (_edit(lambda s: s.update(other=torch.ones(1))), ValueError, "unexpected .*other.*same save"),
    "no tensors": (_edit(dict.clear), ValueError, "missing .*shared"),
    "sign flipped": (_with(HEAD, lambda v: -v), ValueError, FIT),
    "other channels": (_from(operator={**SIZE, "channels": 16}), ValueError, r"stem\.weight|head\.|another model"),
    "other order": (_from(operator={**SIZE, "order": 2}), ValueError, r"stem\.weight .*another model"),
    "other width": (_from(operator={**SIZE, "width": 16}), ValueError, "another model"),
    "other kernel": (_from(operator={**SIZE, "kernel": 1}), ValueError, "another model"),
    "other blocks": (_from(operator={**SIZE, "blocks": 3}), ValueError, r"unexpected .*blocks\.2.*same save"),
    "other name": (
        _from(lifts={"5": {"alpha": [1.0] * 5, "beta": [0.0] * 5, "operator": "mine"}}), ValueError, "missing .*shared",
    ),
    "same size, other training": (_from(seed=1), ValueError, FIT),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named_when_loaded(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lifted().save_pretrained(tmp_path)
    SpanLiftScheduler.from_pretrained(tmp_path)
    damage, kind, message = DAMAGE[name]
    damage(tmp_path)
    with pytest.raises(kind, match=f"(?s){WEIGHTS}.*{message}"):
        SpanLiftScheduler.from_pretrained(tmp_path)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("size", [{"width": -1}, {"kernel": -1}, {"width": 10**12}, {"width": "wide"}, {"hue": 3}])
def test_a_damaged_size_costs_no_memory(tmp_path: Path, size: dict[str, Any]) -> None:
    lifted().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["operator"] |= size
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="operator="):
        SpanLiftScheduler.from_pretrained(tmp_path)


def test_the_bomb_is_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Bomb()))
    assert Path("exploded").exists()


def test_a_configuration_of_another_solver(tmp_path: Path) -> None:
    lifted().save_pretrained(tmp_path)
    lifted(seed=1).save_pretrained(tmp_path / "other")
    os.replace(tmp_path / "other" / CONFIG, tmp_path / CONFIG)
    with pytest.raises(ValueError, match=f"{WEIGHTS} is not the file this configuration was saved with.*{FIT}"):
        SpanLiftScheduler.from_pretrained(tmp_path)


def test_no_byte_goes_unnoticed(tmp_path: Path) -> None:
    """Cut anywhere, or one bit changed anywhere: an error that names the file, never other numbers."""
    lifted().save_pretrained(tmp_path)
    file, generator = tmp_path / WEIGHTS, torch.Generator().manual_seed(0)
    whole = file.read_bytes()
    places = [0, 1, 7, 8, 9, len(whole) - 1, *torch.randint(len(whole), (60,), generator=generator).tolist()]
    for place in places:
        bit = 1 << place % 8
        for content in (whole[:place], whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :]):
            file.write_bytes(content)
            with pytest.raises(ValueError, match=WEIGHTS):
                SpanLiftScheduler.from_pretrained(tmp_path)
    file.write_bytes(whole)
    SpanLiftScheduler.from_pretrained(tmp_path)


# ---------------------------------------------------------------------- inside a saved pipeline


@pytest.mark.slow
def test_saved_pipeline_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        ROOT / "examples" / "emoji-sd", text_encoder=None, tokenizer=None, safety_checker=None
    )
    base = DyWeightScheduler.from_config(pipe.scheduler.config, solver="dpmpp")
    lift = {"alpha": [1.0, 0.9, 1.1], "beta": [0.1, 0.2, 0.1]}
    operator = {**SIZE, "channels": pipe.unet.config.in_channels}
    pipe.scheduler = randomise(
        SpanLiftScheduler.from_config(base.config, operator=operator, lifts={"3": lift}).initialize()
    )
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("pipe")
    assert sorted(os.listdir("pipe/scheduler")) == [CONFIG, WEIGHTS]
    assert json.loads(Path("pipe/model_index.json").read_text())["scheduler"] == ["dywspan", "SpanLiftScheduler"]
    here: dict[str, Any] = {"PIPE": pipe}
    load = 'StableDiffusionPipeline.from_pretrained("pipe", text_encoder=None, tokenizer=None)'
    exec(RUN.replace(load, "PIPE"), here)
    done = _python("import dywspan\n" + RUN + "torch.save(latents, 'again.pt')\nprint(type(pipe.scheduler))", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "dywspan.SpanLiftScheduler" in done.stdout
    assert torch.equal(torch.load("again.pt"), here["latents"])
    pipe.scheduler = base
    without = dict(here)
    exec(RUN.replace(load, "PIPE"), without)
    assert distance(without["latents"], here["latents"]) > 0.01
