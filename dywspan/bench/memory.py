"""What learning a solver costs in memory: one update, by gradients through every step or by forward passes alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import torch
from tqdm.auto import tqdm

from ..core.table import SolverTable
from ..distill.config import LearningConfig
from ..distill.least_squares import Problem
from ..distill.lift import LiftStudent
from ..distill.losses import latent_mse
from ..distill.student import Student, TableStudent
from ..distill.task import Term
from ..pipelines.classical import default_grid
from ..pipelines.memory import peak_bytes
from ..pipelines.pairs import Pairs
from ..pipelines.rollout import frozen, load_pipeline, sample
from ..schedulers.dyweight import DyWeightScheduler

STEPS = (3, 9)
CALL = {"guidance_scale": 7.5}


def table_student(pipe: Any, steps: int) -> Student:
    """DyWeight, K = 2."""
    scheduler = DyWeightScheduler.from_config(pipe.scheduler)
    return TableStudent(scheduler, SolverTable.initial(steps, 2, default_grid(scheduler), scheduler.host.prediction))


def lift_student(pipe: Any, steps: int) -> Student:
    """SpanLift, K = 2, on iPNDM(2M)."""
    base = DyWeightScheduler.from_config(pipe.scheduler, solver="ipndm", solver_order=2)
    size = pipe.unet.config.sample_size
    return LiftStudent(base, [steps], (pipe.unet.config.in_channels, size, size))


STUDENTS: dict[str, Callable[[Any, int], Student]] = {"DyWeight": table_student, "SpanLift": lift_student}


def memory(model: str, full: bool = False, batch_size: int = 8, device: str | None = None) -> list[dict[str, Any]]:
    """Peak memory, above what the weights take, of one update of a batch, beside that of sampling it.

    By gradients, one forward and backward pass for both solvers at 3 and 9 steps; by least squares, the Jacobian of a
    table at 3 steps.

    Args:
        model: a small text-to-image pipeline with a UNet, measured with and without recomputing.
        full: also Stable Diffusion 1.5's UNet at 256 x 256 (random weights, float32, batch 1), recomputing only: a
            quarter of an hour on a CPU.
        batch_size: of the small pipeline; guidance doubles it for the network.

    Returns:
        Rows of ``pipeline``, ``solver``, ``optimizer``, ``num_inference_steps``, ``recompute``, ``peak_mib``,
        ``ratio_to_3_steps``, ``ratio_to_sampling``, ``seconds`` (measuring slows small pipelines).
    """
    rows = _rows(load_pipeline(model, device=device), Path(model).name, batch_size, (False, True))
    if full:
        rows += _rows(sd15(device, 32), "SD1.5's UNet at 256 x 256, random weights", 1, (True,))
    return rows


def sd15(device: str | None = None, latent: int = 64) -> Any:
    """Stable Diffusion 1.5's pipeline with random weights, without the parts that text embeddings make needless."""
    unet: Any = diffusers.UNet2DConditionModel(sample_size=latent, cross_attention_dim=768)
    scheduler: Any = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
    )
    absent: Any = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe: Any = diffusers.StableDiffusionPipeline(
        unet=unet.eval(), scheduler=scheduler, requires_safety_checker=False, **absent
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def forward_backward(pipe: Any, student: Student, steps: int, batch_size: int, recompute: bool) -> None:
    """The gradient of one update."""
    part = pairs(pipe, batch_size)
    with frozen(pipe, recompute, student.networks), torch.enable_grad():
        student.apply()
        endpoint, _ = sample(pipe, student.scheduler, steps, part.inputs, part.seeds, CALL)
        latent_mse(pipe, endpoint.float(), part.endpoints.to(endpoint.device)).backward()


def jacobian(pipe: Any, student: Student, steps: int, batch_size: int) -> None:
    """What an iteration of least squares asks of one batch."""
    term = Term(steps, CALL, pairs(pipe, batch_size), pairs(pipe, 1))
    config = LearningConfig(optimizer="least_squares", batch_size=batch_size, difference=1e-2)
    problem = Problem(pipe, student, [term], config=config, loss=latent_mse)
    problem.see(problem.sample(problem.batch(0)))


def pairs(pipe: Any, count: int) -> Pairs:
    """Random endpoints, and text embeddings in place of prompts."""
    unet = pipe.unet
    size, text = unet.config.sample_size, (1, 77, unet.config.cross_attention_dim)
    names = ("prompt_embeds", "negative_prompt_embeds")
    inputs = [{name: torch.randn(text).to(unet.device, unet.dtype) for name in names} for _ in range(count)]
    return Pairs(inputs, range(count), torch.randn(count, unet.config.in_channels, size, size))


def _rows(pipe: Any, name: str, batch_size: int, recompute: Sequence[bool]) -> list[dict[str, Any]]:
    few, part = STEPS[0], pairs(pipe, batch_size)
    plain = partial(sample, pipe, table_student(pipe, few).scheduler, few, part.inputs, part.seeds, CALL)
    sampling = peak_bytes(torch.no_grad()(plain), pipe.device)[1]
    by_gradients = [
        (solver, "adam", n, again, partial(forward_backward, pipe, STUDENTS[solver](pipe, n), n, batch_size, again))
        for solver, again, n in product(STUDENTS, recompute, STEPS)
    ]
    forward_only = partial(jacobian, pipe, table_student(pipe, few), few, batch_size)
    rows: list[dict[str, Any]] = []
    least = 0
    runs = [("DyWeight", "least_squares", few, None, forward_only), *by_gradients]
    for solver, optimizer, n, again, run in tqdm(runs, f"memory, {name}"):
        started = time.perf_counter()
        peak = peak_bytes(run, pipe.device)[1]
        least = peak if n == few else least
        row = {"pipeline": f"{name}, batch {batch_size}", "solver": solver, "optimizer": optimizer}
        row |= {"num_inference_steps": n, "recompute": again, "peak_mib": peak / 2**20}
        row |= {f"ratio_to_{few}_steps": peak / least, "ratio_to_sampling": peak / sampling}
        rows.append(row | {"seconds": time.perf_counter() - started})
    return rows
