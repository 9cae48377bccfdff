"""What a solver costs beside the network and beside diffusers' own: time and memory of ``step``, within one run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..core.operator import Lift
from ..core.table import SolverTable
from ..core.time_lift import TimeLift
from ..pipelines.conditioning import looking_for_modulation
from ..schedulers.dyweight import DyWeightScheduler
from ..schedulers.spanlift import SpanLiftScheduler
from ..schedulers.time_lifting import time_lifted
from .memory import sd15

REFERENCE = "DPM-Solver++(2M), diffusers"


@dataclass(frozen=True)
class Size:
    """A latent as some pipeline has it.

    Attributes:
        shape: of one sample.
        config: of the diffusers schedulers that suit its network.
        grid: of a table.
        channels: of the latent that SpanLift's operator reads, with Stable Diffusion 1.5's UNet beside the solvers,
            which TimeLift modulates; without it, none of these is measured.
    """

    shape: tuple[int, ...]
    config: dict[str, Any]
    grid: dict[str, Any]
    channels: int | None = None


_VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
_FLOW_GRID = {"name": "flow", "shift": 3.0}
SIZES = {
    "sd15": Size((1, 4, 64, 64), _VP, {"name": "discrete", "sigma_min": 0.0, "sigma_max": 14.6146}, channels=4),
    "flux": Size((1, 4096, 64), _FLOW, _FLOW_GRID),  # 1024 x 1024 pixels, packed
    "wan": Size((1, 16, 21, 60, 104), _FLOW, _FLOW_GRID),  # 81 frames of 480 x 832
}


class _HostReads(TorchDispatchMode):
    """Counts operations that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def overhead(
    sizes: Sequence[str] = tuple(SIZES),
    steps: Sequence[int] = (3, 10, 50),
    repeats: int = 30,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Time and memory of one step of each solver; at "sd15" also as a share of one evaluation of its UNet.

    Untrained tables stand for learned ones, random weights for the UNet's: neither changes the time. Float32.

    Args:
        sizes: keys of ``SIZES``.
        steps: numbers of steps N.
        repeats: runs of N steps by each solver; they take turns, so that what else the machine does slows all alike.
            Of each step the fastest repeat counts, and of a run the mean of its steps.

    Returns:
        Rows of ``scheduler``, ``shape``, ``num_inference_steps``, ``us_per_step``, ``ratio_to_dpmpp2m``, ``syncs``
        (host reads a run), ``state_bytes`` (most that is held after a step in tensors of the sample's shape) and
        ``percent_of_denoiser`` (or None).
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    for size in (SIZES[name] for name in sizes):
        x, output = torch.randn(2, *size.shape, device=device)
        pipe = sd15(device) if size.channels else None
        network = pipe and _denoiser_seconds(pipe.unet, x)
        offsets = _offsets(pipe, x) if pipe else {}
        for n in steps:
            solvers = _solvers(size, n, offsets)
            runs = [
                {k: _laps(_steps(s, n, x, output, pipe), device) for k, s in solvers.items()} for _ in range(repeats)
            ]
            seconds = {name: sum(map(min, zip(*(run[name] for run in runs)))) / n for name in solvers}
            for name, scheduler in solvers.items():
                taken = _steps(scheduler, n, x, output, pipe)
                next(taken)  # choosing the steps may read; stepping may not
                with _HostReads() as reads:
                    held = max(state_bytes(scheduler, x.shape) for _ in taken)
                rows.append(
                    {
                        "scheduler": name,
                        "shape": list(size.shape),
                        "num_inference_steps": n,
                        "us_per_step": 1e6 * seconds[name],
                        "ratio_to_dpmpp2m": seconds[name] / seconds[REFERENCE],
                        "syncs": reads.count,
                        "state_bytes": held,
                        "percent_of_denoiser": network and 100 * seconds[name] / network,
                    }
                )
    return rows


def state_bytes(scheduler: Any, shape: Sequence[int]) -> int:
    """Bytes of the tensors of this shape among a scheduler's attributes and its state, each counted once."""
    leaves = tree_leaves([*vars(scheduler).values(), getattr(scheduler, "state", None)])
    held = [v for v in leaves if isinstance(v, Tensor) and v.shape == torch.Size(shape)]
    return sum({v.data_ptr(): v.nbytes for v in held}.values())


def _solvers(size: Size, n: int, offsets: Mapping[str, Tensor]) -> dict[str, Any]:
    """Those measured, the reference first.

    Args:
        offsets: of TimeLift, for one evaluation.
    """
    host = diffusers.DPMSolverMultistepScheduler(**size.config)
    solvers: dict[str, Any] = {REFERENCE: host, "UniPC, diffusers": diffusers.UniPCMultistepScheduler(**size.config)}
    if size.grid["name"] == "flow":
        solvers["Euler, diffusers"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=size.grid["shift"])
    plain = DyWeightScheduler.from_config(host.config)
    for order in (2, 3):
        table = SolverTable.initial(n, order, size.grid, plain.host.prediction)
        solvers[f"DyWeight, K = {order}"] = plain.with_tables([table])
    if size.channels:
        base = solvers["DyWeight, K = 2"].config
        lifted = SpanLiftScheduler.from_config(base, operator={"channels": size.channels, "order": 2})
        lifted.lifts[n] = Lift(torch.ones(n), torch.ones(n))
        lifted.initialize()
        for operator in lifted.operators.values():
            nn.init.normal_(operator.head.weight, std=0.01)
        solvers["SpanLift, K = 2"] = lifted
        lift = TimeLift({name: offset.expand(n, *offset.shape) for name, offset in offsets.items()})
        solvers["TimeLift, K = 2"] = solvers["DyWeight, K = 2"].with_time_lifts({n: lift})
    return solvers


def _denoiser_seconds(unet: Any, x: Tensor) -> float:
    text, t = torch.randn(1, 77, 768, device=x.device), torch.tensor(500.0, device=x.device)
    return min(_laps((unet(x, t, text) for _ in range(5)), x.device.type))  # the first one, which warms up, is no lap


def _offsets(pipe: Any, x: Tensor) -> dict[str, Tensor]:
    """Small ones for all that TimeLift moves in the pipeline's network."""
    with looking_for_modulation(pipe) as found:
        pipe.unet(x[..., :8, :8], torch.tensor(500.0, device=x.device), torch.randn(1, 77, 768, device=x.device))
    return {name: torch.full(shape, 1e-3, device=x.device) for name, shape in found.items()}


def _steps(scheduler: Any, n: int, x: Tensor, output: Tensor, pipe: Any) -> Iterator[None]:
    """Yields before the first step and after each, as a pipeline takes them, ``output`` being the network's.

    Where there is a TimeLift, each step also calls the network of ``pipe``, which is modulated and does nothing.
    """
    network = pipe.unet if getattr(scheduler, "time_lifts", None) else None
    with patch.object(network, "forward", lambda: None) if network else nullcontext(), time_lifted(pipe, scheduler):
        scheduler.set_timesteps(n, device=x.device)
        if network:
            network()  # a run's first call reads the parameters, once
        yield
        for t in list(scheduler.timesteps):
            if network:
                network()
            x = scheduler.step(output, t, x, return_dict=False)[0]
            yield


def _laps(events: Iterable[Any], device: str) -> list[float]:
    """Seconds between one event and the next, on the device's own clock."""
    if torch.device(device).type != "cuda":
        return [after - before for before, after in pairwise([time.perf_counter() for _ in events])]
    marks: list[torch.cuda.Event] = []
    for _ in events:
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]
