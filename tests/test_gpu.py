"""What the CPU's tests cannot show: that it all runs where there is an accelerator too, with the CPU's numbers.

``pytest -m gpu`` runs these tests; a whole run starts that in a process of its own, as it sees no accelerator itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from test_distill import CALL, EMOJI, INPUTS, PROMPTS
from test_least_squares import CONFIG, columns_of
from test_memory import BYTES, _gradient
from test_scheduler import SOURCES, sample_of
from test_spanlift import TABLES, base_of, lifted, require_grad
from tiny import build
from torch import Tensor

import dywspan
from dywspan import DyWeightScheduler, SpanLiftScheduler
from dywspan.cli import main
from dywspan.distill import DistillConfig, SolverTrainer
from dywspan.distill.least_squares import Problem
from dywspan.distill.losses import latent_mse
from dywspan.distill.progress import Progress
from dywspan.distill.student import TableStudent, initial_table
from dywspan.distill.task import Term
from dywspan.evaluate.report import read_results
from dywspan.pipelines.memory import peak_bytes
from dywspan.pipelines.pairs import make_pairs
from dywspan.pipelines.rollout import frozen, generators, load_pipeline, rollout, sample
from dywspan.pipelines.teacher import Teacher

gpu = pytest.mark.gpu
ROOT = Path(__file__).parent.parent


def test_all_of_this_on_an_accelerator() -> None:
    if not torch.backends.cuda.is_built():
        pytest.skip("the installed PyTorch is for CPUs only")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "BEFORE"))}
    for name, value in json.loads(os.environ["BEFORE"]).items():
        env.pop(name)
        env |= {} if value is None else {name: value}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:xdist", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    if " passed" not in done.stdout:
        pytest.skip("this machine has no CUDA device")


@pytest.fixture(scope="module")
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is seen: is there one, and is this pytest -m gpu?")
    return "cuda"


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All digits of it in convolutions too, as on a CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    AcceleratorState._reset_state()


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-3) -> None:
    """In units of the largest value."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


# ---------------------------------------------------------------------- schedulers


@gpu
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("solver", [*TABLES, "dpmpp", "heun"])
@pytest.mark.parametrize("lift", [False, True])
def test_a_run_is_the_cpus_and_steps_wait_for_nothing(
    solver: str, kind: str, lift: bool, trainable: bool, device: str, network: Any
) -> None:
    if (kind == "flow" and "AFS" in solver) or (trainable and not lift):
        pytest.skip("there is no such solver")
    ends = []
    for place in ("cpu", device):
        scheduler = lifted(solver, kind) if lift else base_of(solver, kind)
        leaves = require_grad(scheduler) if trainable else []
        scheduler.set_timesteps(5, device=place)
        x = sample_of().to(place) * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            output = network(x, t)
            if place == "cuda" and i:  # the first one may move the operator
                torch.cuda.set_sync_debug_mode("error")
            try:
                x = scheduler.step(output, t, x, return_dict=False)[0]
            finally:
                torch.cuda.set_sync_debug_mode("default") if place == "cuda" else None
        assert x.device.type == place
        own = [x] if not trainable else [x, *torch.autograd.grad(x.square().sum(), leaves)]
        ends.append(own)
    for found, expected in zip(ends[1], ends[0]):
        near(found, expected)


@gpu
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline (not square)", "WanPipeline", "DiTPipeline"])
def test_a_bound_pipeline_samples_the_same(name: str, device: str) -> None:
    ends = []
    for place in ("cpu", device):
        tiny = build.__wrapped__(name)
        pipe = dywspan.bind(tiny.pipe.to(place))
        base = DyWeightScheduler.from_config(pipe.scheduler.config, solver="ipndm")
        size = {"channels": tiny.channels, "order": 2, "width": 8}
        lift = {"3": {"alpha": [0.9, 1.1, 1.0], "beta": [0.2, -0.1, 0.1]}}
        torch.manual_seed(0)
        pipe.scheduler = SpanLiftScheduler.from_config(base.config, layout=tiny.layout, operator=size, lifts=lift)
        torch.nn.init.normal_(pipe.scheduler.initialize().operators["shared"].head.weight, std=0.1)
        inputs = {k: v.to(place) if isinstance(v, Tensor) else v for k, v in tiny.inputs([0, 1]).items()}
        with torch.no_grad():
            call = {**inputs, "generator": generators([0, 1]), "num_inference_steps": 3}
            ends.append(rollout(pipe, pipe.scheduler, **call)[0])
    assert ends[1].device.type == device
    near(ends[1], ends[0])


# ---------------------------------------------------------------------- learning


@pytest.fixture(scope="module")
def pipes(device: str) -> list[Any]:
    """On the CPU, and where a pipeline goes that is told nothing."""
    return [load_pipeline(str(EMOJI), device="cpu"), load_pipeline(str(EMOJI))]


def student_of(pipe: Any) -> TableStudent:
    scheduler = DyWeightScheduler.from_config(pipe.scheduler.config)
    return TableStudent(scheduler, initial_table(scheduler, 2, CONFIG, None))


@gpu
def test_a_rollout_is_the_pipelines_own_sampling_and_its_gradients_the_cpus(pipes: list[Any], device: str) -> None:
    assert pipes[1].device.type == device
    results = []
    for pipe in pipes:
        student = student_of(pipe)
        with frozen(pipe, recompute=True):
            student.apply()
            end, _ = sample(pipe, student.scheduler, 2, INPUTS[:2], [5, 6], CALL)
            end.square().mean().backward()
        own, pipe.scheduler = pipe.scheduler, student.scheduler
        call = {"prompt": PROMPTS[:2], "num_inference_steps": 2, "output_type": "latent", **CALL}
        assert torch.equal(pipe(generator=generators([5, 6]), **call).images, end.detach())
        pipe.scheduler = own
        results.append([end, *(parameter.grad for parameter in student.parameters())])
    for found, expected in zip(results[1], results[0]):
        near(found, expected, 1e-2)


@gpu
def test_pairs_and_columns_of_least_squares_are_the_cpus(pipes: list[Any]) -> None:
    ends, columns = [], []
    for pipe in pipes:
        teacher = Teacher(DyWeightScheduler.from_config(pipe.scheduler.config, solver="ipndm"), 8)
        pairs = make_pairs(pipe, teacher, INPUTS[:2], range(2), call=CALL)
        ends.append(pairs.endpoints)
        problem = Problem(pipe, student_of(pipe), [Term(2, CALL, pairs, pairs)], config=CONFIG, loss=latent_mse)
        columns.append(columns_of(problem))
    near(ends[1], ends[0])
    near(columns[1], columns[0], 1e-2)


@gpu
@pytest.mark.parametrize(
    "settings",
    [
        ["--optimizer", "least_squares", "--updates", "3"],
        ["--updates", "4", "--init", "euler"],
        ["--updates", "4", "--init", "euler", "--mixed-precision", "bf16", "--recompute"],
        ["--updates", "4", "--init", "euler", "--mixed-precision", "fp16"],
        ["--updates", "4", "--solver", "spanlift", "--base", "euler", "--operator", '{"width": 8}'],
    ],
    ids=["least squares", "AdamW", "bf16", "fp16", "SpanLift"],
)
def test_a_run_learns_and_its_artefact_is_evaluated(settings: list[str], device: str, tmp_path: Path) -> None:
    prompts, solvers = ROOT / "examples" / "prompts" / "emoji-train.txt", tmp_path / "solvers"
    arguments = ["--model", str(EMOJI), "--prompts", str(prompts), "--guidance-scale", "4"]
    small = ["--steps", "2", "--pairs", "4", "--held-out", "4", "--teacher-steps", "6", "--batch-size", "4"]
    small += ["--evaluate-every", "2", "--pictures", "1"]
    assert main(["distill", *arguments, "--output", str(solvers), *small, *settings]) == 0
    kind = SpanLiftScheduler if "spanlift" in settings else DyWeightScheduler
    learned = kind.from_pretrained(solvers)
    error = next(iter((learned.tables or learned.lifts).values())).provenance["held_out_error"]
    # Four pairs teach an operator nothing about others.
    assert error["after"] < error["before"] or ("spanlift" in settings and error["after"] == error["before"])
    asked = ["--solver", "DDIM", str(solvers), "--steps", "2", "--samples", "4", "--teacher-steps", "8"]
    result = tmp_path / "evaluation.json"
    assert main(["eval", *arguments, *asked, "--output", str(result)]) == 0
    assert torch.cuda.get_device_name() in read_results(result)["device"] if device == "cuda" else True


# ---------------------------------------------------------------------- memory


@gpu
@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_chain_needs_what_its_backward_pass_was_promised(length: int, device: str) -> None:
    """At the peak: every output, and cos(x) and the gradient that the last operation's backward pass makes of it."""
    assert peak_bytes(_gradient(device, length), device)[1] == (length + 2) * BYTES


@gpu
@pytest.mark.parametrize("pieces", [1, 4, 9])
def test_a_checkpoint_holds_one_piece_and_the_bounds_between_pieces(pieces: int, device: str) -> None:
    assert peak_bytes(_gradient(device, 5, pieces), device)[1] == (pieces * 5 + 2) * BYTES
    assert peak_bytes(_gradient(device, 5, pieces, recompute=True), device)[1] == (pieces + 4 + 2) * BYTES


# ---------------------------------------------------------------------- whole runs, of a pipeline that is there

SETTINGS: dict[str, Any] = {"steps": [2], "pairs": 8, "held_out": 4, "teacher_steps": 8, "batch_size": 8, "pictures": 0}
SETTINGS |= {"prompts": ["a cat", "a red apple", "a house", "a tree"] * 3, "call": {"guidance_scale": 1.0}}
LIFTED: dict[str, Any] = {"solver": "spanlift", "updates": 6, "evaluate_every": 3, "checkpoint_every": 1}


def learned(pipe: Any, output: Path, **settings: Any) -> Any:
    return SolverTrainer(pipe, DistillConfig(output=str(output), **{**SETTINGS, **settings})).train()


@gpu
def test_an_operator_goes_on_where_its_learning_was_stopped(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the optimiser's state where the operator is."""
    pipe, done = load_pipeline(str(EMOJI)), Progress.done

    def stop(self: Progress, *args: Any) -> None:
        done(self, *args)
        if self.update == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Progress, "done", stop)
        learned(pipe, tmp_path / "stopped", **LIFTED)
    again, whole = (learned(pipe, tmp_path / name, **LIFTED) for name in ("stopped", "whole"))
    near(again.lifts[2].alpha, whole.lifts[2].alpha)
    for found, expected in zip(again.state_dict().values(), whole.state_dict().values()):
        near(found, expected, 1e-2)


@gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_gradients_learn_in_every_precision(precision: str, tmp_path: Path, device: str) -> None:
    scheduler = learned(load_pipeline(str(EMOJI)), tmp_path, updates=12, evaluate_every=4, mixed_precision=precision)
    error = scheduler.tables[2].provenance["held_out_error"]
    assert error["after"] < error["before"]


@gpu
@pytest.mark.parametrize("way", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("optimizer", ["least_squares", "adamw"])
def test_offloaded_pipelines_learn_what_others_learn(way: str, optimizer: str, tmp_path: Path, device: str) -> None:
    settings: dict[str, Any] = {"optimizer": optimizer, "updates": 2, "evaluate_every": 1}
    plain = learned(load_pipeline(str(EMOJI)), tmp_path / "plain", **settings).tables[2]
    pipe = load_pipeline(str(EMOJI), device="cpu")
    getattr(pipe, way)()
    other = learned(pipe, tmp_path / "offloaded", **settings).tables[2]
    near(other.weights, plain.weights, 1e-2)
    spent, expected = (dict(table.provenance["evaluations"]) for table in (other, plain))
    assert spent.pop("seconds") and expected.pop("seconds")
    if optimizer == "adamw":
        assert spent == expected


@gpu
def test_memory_that_runs_out_makes_batches_smaller(
    tmp_path: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The device says so itself, as its memory is limited to what a quarter of the batch takes."""
    pipe = load_pipeline(str(EMOJI))
    settings: dict[str, Any] = {"updates": 1, "batch_size": 64, "pairs": 64, "recompute": False}
    settings["prompts"] = SETTINGS["prompts"] * 6
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    small = learned(pipe, tmp_path / "small", micro_batch_size=16, **settings).tables[2]
    most, there = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.2 * most / there)
    try:
        found = learned(pipe, tmp_path / "found", **settings).tables[2]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Out of memory with" in capsys.readouterr().out
    near(found.weights, small.weights)
