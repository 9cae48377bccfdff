"""What learning a solver costs in memory: the forward and backward pass of one update, through every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..core.table import SolverTable
from ..distill.memory import peak_bytes
from ..distill.rollout import frozen, generators, load_pipeline, rollout
from ..distill.student import LiftStudent, Student, TableStudent
from ..distill.train import default_grid
from ..schedulers.dyweight import DyWeightScheduler

STEPS = (3, 9)
GUIDANCE_SCALE = 7.5


def table_student(pipe: Any, steps: int) -> Student:
    """DyWeight, K = 2."""
    scheduler = DyWeightScheduler.from_config(pipe.scheduler.config)
    return TableStudent(scheduler, SolverTable.initial(steps, 2, default_grid(scheduler), scheduler.host.prediction))


def lift_student(pipe: Any, steps: int) -> Student:
    """SpanLift, K = 2, on iPNDM(2M)."""
    base = DyWeightScheduler.from_config(pipe.scheduler.config, solver="ipndm", order=2)
    size = pipe.unet.config.sample_size
    return LiftStudent(base, [steps], (pipe.unet.config.in_channels, size, size))


STUDENTS: dict[str, Callable[[Any, int], Student]] = {"DyWeight": table_student, "SpanLift": lift_student}


def memory(model: str, full: bool = False, batch_size: int = 8, device: str | None = None) -> list[dict[str, Any]]:
    """Peak memory, above what the weights take, of one forward and backward pass for both solvers at 3 and 9 steps.

    Args:
        model: a small text-to-image pipeline with a UNet, measured with and without recomputing.
        full: also Stable Diffusion 1.5's UNet (random weights, float32, batch 1), recomputing only: an hour on a CPU.
        batch_size: of the small pipeline; guidance doubles it for the network.

    Returns:
        Rows of ``pipeline``, ``solver``, ``num_inference_steps``, ``recompute``, ``peak_mib``, ``ratio_to_3_steps``,
        ``seconds`` (of the pass measured, which measuring slows on small pipelines).
    """
    rows = _rows(load_pipeline(model, device=device), Path(model).name, batch_size, (False, True))
    if full:
        rows += _rows(sd15(device), "SD1.5's UNet, random weights", 1, (True,))
    return rows


def sd15(device: str | None = None) -> Any:
    """Stable Diffusion 1.5's pipeline with random weights, without the parts that text embeddings make needless."""
    unet: Any = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
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
    """The gradient of one update, from random text embeddings; the endpoint's mean square stands for the loss."""
    text = torch.randn(2, batch_size, 77, pipe.unet.config.cross_attention_dim).to(pipe.unet.device, pipe.unet.dtype)
    call: dict[str, Any] = {"prompt_embeds": text[0], "negative_prompt_embeds": text[1]}
    call |= {"generator": generators(range(batch_size)), "num_inference_steps": steps}
    with frozen(pipe, recompute, student.networks), torch.enable_grad():
        student.apply()
        endpoint, _ = rollout(pipe, student.scheduler, guidance_scale=GUIDANCE_SCALE, **call)
        endpoint.float().square().mean().backward()


def _rows(pipe: Any, name: str, batch_size: int, recompute: Sequence[bool]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for solver, again in product(STUDENTS, recompute):
        peaks: list[int] = []
        for n in STEPS:
            run = partial(forward_backward, pipe, STUDENTS[solver](pipe, n), n, batch_size, again)
            started = time.perf_counter()
            peaks.append(peak_bytes(run, pipe.device)[1])
            rows.append(
                {
                    "pipeline": f"{name}, batch {batch_size}",
                    "solver": solver,
                    "num_inference_steps": n,
                    "recompute": again,
                    "peak_mib": peaks[-1] / 2**20,
                    f"ratio_to_{STEPS[0]}_steps": peaks[-1] / peaks[0],
                    "seconds": time.perf_counter() - started,
                }
            )
    return rows
