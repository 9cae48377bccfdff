"""A ComfyUI node for learned few-step solvers: a solver file becomes SAMPLER and SIGMAS. See README.md beside this."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from comfy.model_sampling import CONST  # pyright: ignore[reportMissingImports]
from comfy.samplers import KSAMPLER  # pyright: ignore[reportMissingImports]
from torch import Tensor, tensor

from .read_table import Solver, make_solver, run


def sample_table(
    solver: Solver,
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
) -> Tensor:
    """A sampler function as ComfyUI calls it; ``model(x, level)`` is the estimate of x0.

    Raises:
        ValueError: the levels are not those of the solver, or a stretch of them.
    """
    begin, options = _first_step(solver, sigmas.tolist()), extra_args or {}
    steps = run(
        solver, lambda x, tau, _: model(x, x.new_full((len(x),), tau), **options), x, begin, begin + len(sigmas) - 1
    )
    for i, (following, x0) in enumerate(steps):
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": x0})
        x = following
    return x


def _first_step(solver: Solver, sigmas: list[float]) -> int:
    """Where in the solver's levels these begin: ``SplitSigmas`` makes a late start, or an early end."""
    own, count = solver.levels, len(sigmas)
    for begin in range(len(own) - count + 1):
        if np.allclose(own[begin : begin + count], sigmas, rtol=1e-4, atol=1e-6):
            return begin
    raise ValueError(
        f"These SIGMAS are not the solver's: {[round(v, 4) for v in sigmas]}, and its own are "
        f"{[round(v, 4) for v in own.tolist()]}. Connect the SIGMAS of the same Dywspan Solver node, or a part of them."
    )


class TableSampler(KSAMPLER):
    """KSAMPLER, and a run starts from sigma_0 * noise, as the table was learned, not sqrt(1 + sigma_0^2) * noise."""

    def __init__(self, solver: Solver) -> None:
        super().__init__(partial(sample_table, solver))
        self.solver = solver

    def max_denoise(self, model_wrap: Any, sigmas: Tensor) -> bool:
        return False

    def sample(self, model_wrap: Any, *args: Any, **kwargs: Any) -> Tensor:
        flow = isinstance(model_wrap.inner_model.model_sampling, CONST)
        if flow != self.solver.flow:
            kinds = {True: "a flow model", False: "no flow model"}
            raise ValueError(
                f"This solver was learned for {kinds[self.solver.flow]}, and the model is {kinds[flow]}: load a solver "
                "of this model."
            )
        return super().sample(model_wrap, *args, **kwargs)


class DywspanSolver:
    """Solver file, number of steps -> SAMPLER, SIGMAS."""

    CATEGORY = "sampling/custom_sampling/samplers"
    RETURN_TYPES = ("SAMPLER", "SIGMAS")
    FUNCTION = "load"
    DESCRIPTION = "A few-step solver learned by dywspan, for SamplerCustom and SamplerCustomAdvanced."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size: dict[str, Any] = {"default": 1024, "min": 16, "max": 16384, "step": 8}
        size["tooltip"] = "Of the image. It matters to flow models whose shift depends on the size, such as FLUX."
        return {
            "required": {
                "solver": ("STRING", {"default": "", "tooltip": "scheduler_config.json of a solver, or its folder."}),
                "steps": (
                    "INT",
                    {"default": 5, "min": 1, "max": 1000, "tooltip": "A number the solver has a table for."},
                ),
                "width": ("INT", size),
                "height": ("INT", size),
            }
        }

    @classmethod
    def IS_CHANGED(cls, solver: str, **others: Any) -> float:
        return _file(solver).stat().st_mtime

    def load(self, solver: str, steps: int, width: int, height: int) -> tuple[TableSampler, Tensor]:
        config = json.loads(_file(solver).read_text(encoding="utf-8"))
        table = make_solver(config, steps, flow_mu(config, width * height // 256))
        return TableSampler(table), tensor(table.levels.tolist())


def flow_mu(config: dict[str, Any], tokens: int) -> float:
    """Log of the shift of a flow pipeline, linear in the number of tokens, which are 16 x 16 pixels each."""
    if not config.get("use_dynamic_shifting"):
        return 0.0
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    mu = config["base_shift"] + (config["max_shift"] - config["base_shift"]) * (tokens - low) / (high - low)
    return math.log(mu) if config.get("time_shift_type") == "linear" else mu


def _file(solver: str) -> Path:
    return path / "scheduler_config.json" if (path := Path(solver).expanduser()).is_dir() else path


NODE_CLASS_MAPPINGS = {"DywspanSolver": DywspanSolver}
NODE_DISPLAY_NAME_MAPPINGS = {"DywspanSolver": "Dywspan Solver"}
