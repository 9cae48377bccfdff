"""What a solver costs beside the network: time of ``step`` on the CPU or GPU, as ratios within one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.operator import Lift
from ..core.table import SolverTable
from ..schedulers.dyweight import DyWeightScheduler
from ..schedulers.spanlift import SpanLiftScheduler

SHAPE, STEPS = (1, 4, 64, 64), 5


class _HostReads(TorchDispatchMode):
    """Counts operations that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def overhead(repeats: int = 20, device: str | None = None) -> list[dict[str, Any]]:
    """Time one step of each solver beside one evaluation of Stable Diffusion 1.5's UNet (random weights, float32).

    Args:
        repeats: runs of 5 steps; the fastest counts.

    Returns:
        Rows of ``scheduler``, ``shape``, ``num_inference_steps``, ``us_per_step``, ``ratio_to_dpmpp2m``, ``syncs``
        (host reads a run), ``percent_of_denoiser``.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.randn(SHAPE, device=device)
    network = _denoiser_seconds(x, device)
    config = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
    ).config
    learned = DyWeightScheduler.from_config(config)
    grid = {"name": "discrete", "sigma_min": 0.0, "sigma_max": 14.6146}
    learned = learned.with_tables([SolverTable.initial(STEPS, 2, grid, learned.host.prediction)])
    lifted = SpanLiftScheduler.from_config(learned.config, operator={"channels": SHAPE[1], "order": 2})
    lifted.lifts[STEPS] = Lift(torch.ones(STEPS), torch.ones(STEPS))
    lifted.initialize()
    for operator in lifted.operators.values():
        nn.init.normal_(operator.head.weight, std=0.01)

    solvers = {
        "DPM-Solver++(2M), diffusers": diffusers.DPMSolverMultistepScheduler.from_config(config),
        "DyWeight, K = 2": learned,
        "SpanLift, K = 2": lifted,
    }
    rows: list[dict[str, Any]] = []
    for name, scheduler in solvers.items():
        seconds = _fastest(lambda s=scheduler: _run(s, x, device), repeats, device) / STEPS
        with _HostReads() as reads:
            _run(scheduler, x, device, counted=reads)
        first = rows[0]["us_per_step"] if rows else 1e6 * seconds
        rows.append(
            {
                "scheduler": name,
                "shape": list(SHAPE),
                "num_inference_steps": STEPS,
                "us_per_step": 1e6 * seconds,
                "ratio_to_dpmpp2m": 1e6 * seconds / first,
                "syncs": reads.count,
                "percent_of_denoiser": 100 * seconds / network,
            }
        )
    return rows


def _denoiser_seconds(x: Tensor, device: str) -> float:
    unet: Any = diffusers.UNet2DConditionModel(sample_size=SHAPE[-1], cross_attention_dim=768)
    unet.eval().to(device)
    text, t = torch.randn(1, 77, 768, device=device), torch.tensor(500.0, device=device)
    return _fastest(lambda: unet(x, t, text).sample, 3, device)


def _run(scheduler: Any, x: Tensor, device: str, counted: _HostReads | None = None) -> Tensor:
    scheduler.set_timesteps(STEPS, device=device)
    if counted is not None:
        counted.count = 0  # choosing the steps may read; stepping may not
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x, return_dict=False)[0]
    return x


def _fastest(run: Callable[[], Any], repeats: int, device: str) -> float:
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])
