"""Solvers that others published, as tables of ours.

:func:`convert` reads DyWeight's released files (arXiv 2603.11607). They are pickles, and a pickle is a program: here
nothing in it is imported or called. :func:`neuralsolver_tables` are NeuralSolver's, which come with dywspan.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .artifact import table_to_json
from .core.bases import from_data_prediction
from .core.check import MAX_STEPS, number, whole
from .core.table import SolverTable
from .inert_pickle import Inert, read_pickle
from .schedulers.dyweight import DyWeightScheduler

PathLike = str | os.PathLike[str]

# Stable Diffusion's range. Its files carry the default of the pixel models, up to 80, where that network ends at 14.6.
_SD_RANGE = {"sigma_min": 0.029167532920837402, "sigma_max": 14.614641189575195}
_PIXEL_RANGE = {"sigma_min": 0.002, "sigma_max": 80.0}

_EDM = {"host_scheduler": "EDMEulerScheduler", "prediction_type": "epsilon", "sigma_data": 0.5, **_PIXEL_RANGE}
_LATENT = {"host_scheduler": "DDIMScheduler", "prediction_type": "epsilon", "beta_schedule": "scaled_linear"}
_LATENT |= {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading", "steps_offset": 1}

# The scheduler configuration of the model behind each published data set.
CONFIGS: dict[str, dict[str, Any]] = {
    "cifar10": _EDM,
    "ffhq": _EDM,
    "afhqv2": _EDM,
    "imagenet64": _EDM,
    "lsun_bedroom_ldm": {**_LATENT, "beta_start": 0.0015, "beta_end": 0.0195},
    "ms_coco": {**_LATENT, "beta_start": 0.00085, "beta_end": 0.012},
    "flux": {
        "host_scheduler": "FlowMatchEulerDiscreteScheduler",
        "prediction_type": "flow_prediction",
        "use_dynamic_shifting": True,
        "shift": 3.0,
    },
}

# What a file may say about its table; the first name found wins.
_FIELDS = {
    "num_steps", "max_history_steps", "afs", "hybrid_weights", "weights", "mask", "t_scale", "schedule_type",
    "schedule_rho", "sigma_min", "sigma_max", "dataset_name", "dataset", "guidance_rate", "guidance_type",
    "teacher", "sampler_tea", "teacher_steps", "max_order", "loss_type",
    "window_size", "dyweight_weights_raw", "dyweight_t_scales", "tscale_low", "tscale_high",
}  # fmt: skip


def convert(
    src: PathLike | Sequence[PathLike],
    dst: PathLike,
    *,
    grid: Mapping[str, Any] | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    config: Mapping[str, Any] | None = None,
) -> DyWeightScheduler:
    """Turn published DyWeight files into an artefact folder, one table for each number of evaluations.

    Args:
        src: a file, several, or a folder, searched for ``*.pt`` and ``*.pkl``.
        dst: folder for ``scheduler_config.json``.
        grid, sigma_min, sigma_max: see :func:`read_published`.
        config: scheduler configuration of the base model, ``pipe.scheduler.config``; by default the published one's.

    Raises:
        ValueError: no table in a file, tables of different models, two for the same number of evaluations, or a data
            set whose model is not known.
    """
    tables: dict[int, SolverTable] = {}
    for path in _files(src):
        table = read_published(path, grid=grid, sigma_min=sigma_min, sigma_max=sigma_max)
        n = table.num_inference_steps
        if n in tables:
            raise ValueError(f"{path} and {tables[n].provenance['source']} are both for {n} evaluations: convert one.")
        tables[n] = table
    datasets = {str(table.provenance["dataset"]) for table in tables.values()}
    if len(datasets) > 1:
        raise ValueError(f"These tables belong to different models ({sorted(datasets)}): convert them one by one.")
    if config is None:
        (dataset,) = datasets
        if dataset not in CONFIGS:
            raise ValueError(
                f"The model behind data set {dataset!r} is not one of {sorted(CONFIGS)}: "
                "pass config=pipe.scheduler.config of the pipeline the table was learned for."
            )
        config = CONFIGS[dataset]
    data = {str(n): table_to_json(tables[n]) for n in sorted(tables)}
    scheduler = DyWeightScheduler.from_config(config, tables=data)
    scheduler.save_pretrained(dst)
    return scheduler


def read_published(
    path: PathLike,
    *,
    grid: Mapping[str, Any] | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> SolverTable:
    """Read one of DyWeight's files: a FLUX ``.pt`` or an EDM-style ``.pkl`` snapshot. Nothing in it is executed.

    A[i, j] multiplies the derivative of the absolute step j; ours is w_ij = A[i, i - j], j < K. With AFS the file has
    no s for the first step, which asks no network: it gets 1. FLUX tables use grid "flow" with the pipeline's mu; the
    others say theirs. MS-COCO files that carry the pixel models' range get Stable Diffusion's and grid "discrete",
    which their solver was run on.

    Args:
        path: the file.
        grid: replaces the stored grid, see :func:`dywspan.core.grid.make_grid`.
        sigma_min, sigma_max: replace the ends of the stored grid.

    Raises:
        ValueError: damaged, or no solver table in it.
    """
    path = Path(path)
    content = path.read_bytes()
    try:
        fields = _collect(read_pickle(content))
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"{path} is not a readable DyWeight file ({type(error).__name__}: {error}).") from error
    try:
        weights, time_scale, afs = _decode(fields)
        ends = {k: v for k, v in {"sigma_min": sigma_min, "sigma_max": sigma_max}.items() if v is not None}
        spec = {**(grid if grid is not None else _grid({**fields, **ends})), **ends}
        provenance = {
            "source": path.name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "dataset": _dataset(fields),
            "stored": {k: v for k, v in fields.items() if not isinstance(v, Tensor)},
        }
        return SolverTable(weights, time_scale, spec, afs, provenance)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}") from error


def neuralsolver_tables(family: str = "flow_matching") -> list[SolverTable]:
    """The solvers of NeuralSolver, found on small class-conditional models and published for use on any.

        DyWeightScheduler.from_config(pipe.scheduler.config).with_tables(neuralsolver_tables())

    "flow_matching" has 5 to 10 and 15 steps, for any flow-matching network: x' = x + (sigma' - sigma) sum_j w_j d_j,
    sigma = 1 - t, on a grid of its own, without shift. Published step sizes are rounded to 1e-4; here they are scaled
    to sum to 1, so that the grid ends at 0.

    "ddpm" has 5 to 10 steps, for networks with linear betas from 0.0001 to 0.02 (DiT, PixArt; not Stable Diffusion,
    whose noise levels end at 14.6). It combines data predictions,
    x'/sigma' = x/sigma + (alpha'/sigma' - alpha/sigma) sum_j c_j D_j, on the continuous-time VP process with t from
    0.999 to 0.001; re-expressed over derivatives this needs the whole history. The network is told the time of the
    level it is at, 1000 t - 1; the published sampler says 1000 t.

    Source: Differentiable Solver Search for Fast Diffusion Sampling (ICML 2025), code MCG-NJU/NeuralSolver, MIT.
    """
    published = json.loads((resources.files("dywspan") / "data" / "neuralsolver.json").read_text("utf-8"))["tables"]
    if family not in published:
        raise ValueError(f"family={family!r} is not one of {sorted(published)}.")
    grid, combine = _NEURALSOLVER[family]
    tables = []
    for name, data in published[family].items():
        sigmas = grid(torch.tensor(data["timedeltas"], dtype=torch.float64))
        rows = [[1 - sum(row), *reversed(row)] for row in data["coeffs"]]
        weights = combine(sigmas, rows)
        provenance = {"source": f"NeuralSolver {family} {name}", "license": "MIT"}
        ones = torch.ones(len(rows), dtype=torch.float64)
        own = {"provenance": provenance, "convention": "flow" if family == "flow_matching" else "vp"}
        tables.append(SolverTable(weights, ones, {"sigmas": sigmas.tolist()}, **own))
    return tables


# ---------------------------------------------------------------------- NeuralSolver


def _flow_levels(steps: Tensor) -> Tensor:
    """sigma = 1 - t, t the running sum of the steps."""
    return torch.cat([torch.ones(1, dtype=torch.float64), 1 - steps.cumsum(0)[:-1] / steps.sum(), torch.zeros(1)])


def _vp_levels(steps: Tensor) -> Tensor:
    """sigma/alpha of the VP process with beta from 0.1 to 20, t from 0.999 down, at least 0.001."""
    t = (0.999 - torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])).clamp(min=1e-3)
    return torch.expm1(0.1 * t + 19.9 * t**2 / 2).sqrt()


def _as_weights(sigmas: Tensor, rows: list[list[float]]) -> Tensor:
    return torch.tensor([row + [0.0] * (len(rows) - len(row)) for row in rows], dtype=torch.float64)


def _from_data(sigmas: Tensor, rows: list[list[float]]) -> Tensor:
    return from_data_prediction(sigmas, _as_weights(sigmas, rows))


_NEURALSOLVER: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, list[list[float]]], Tensor]]] = {
    "flow_matching": (_flow_levels, _as_weights),
    "ddpm": (_vp_levels, _from_data),
}


# ---------------------------------------------------------------------- DyWeight


def _files(src: PathLike | Sequence[PathLike]) -> list[Path]:
    paths = [Path(p) for p in ([src] if isinstance(src, (str, os.PathLike)) else src)]
    found = [
        f for p in paths for f in (sorted(x for x in p.rglob("*.p*") if x.suffix in _SUFFIXES) if p.is_dir() else [p])
    ]
    if not found:
        raise ValueError(f"No {' or '.join(_SUFFIXES)} file in {[str(p) for p in paths]}.")
    return found


_SUFFIXES = (".pt", ".pkl")


def _decode(fields: Mapping[str, Any]) -> tuple[Tensor, Tensor, bool]:
    """(weights over lags, time scale, afs) from the fields of a file."""
    names = ("dyweight_weights_raw", "hybrid_weights", "weights")
    absolute = next((fields[n] for n in names if isinstance(fields.get(n), Tensor)), None)
    if absolute is None:
        raise ValueError(f"it holds no solver table: none of {list(names)} is in it.")
    n = len(absolute) if absolute.ndim else 0
    if n == 0 or absolute.shape != (n, n):
        raise ValueError(f"weights must be an N x N table; got shape {tuple(absolute.shape)}.")
    whole("number of weights rows", n, 1, MAX_STEPS)
    if (points := fields.get("num_steps")) is not None and number("num_steps", points) != n + 1:
        raise ValueError(f"num_steps={points} grid points make {points - 1} steps; the weights are for {n}.")
    absolute = absolute.double()
    if isinstance(mask := fields.get("mask"), Tensor):
        if mask.shape != absolute.shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}; the weights {tuple(absolute.shape)}.")
        absolute = absolute * mask
    window = fields.get("window_size") or fields.get("max_history_steps") or n
    order = int(min(number("max_history_steps", window, 1), n))
    if bool((absolute - absolute.tril().triu(1 - order)).any()):
        raise ValueError(f"row i may weigh the derivatives of steps i - {order - 1} to i only (K = {order}).")
    weights = torch.zeros(n, order, dtype=torch.float64)
    for i in range(n):
        k = min(i + 1, order)
        weights[i, :k] = absolute[i, i + 1 - k : i + 1].flip(0)
    afs = bool(fields.get("afs", False))
    scale = fields.get("dyweight_t_scales", fields.get("t_scale"))
    scale = torch.ones(n - afs, dtype=torch.float64) if scale is None else scale.double()
    if scale.shape != (n - afs,):
        raise ValueError(f"t_scale must have {n - afs} entries ({n} steps, {afs=}); got shape {tuple(scale.shape)}.")
    return weights, torch.cat([torch.ones(int(afs), dtype=torch.float64), scale]), afs


def _grid(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The grid a file stores, corrected for Stable Diffusion."""
    if "dyweight_weights_raw" in fields:
        return {"name": "flow"}
    if missing := [k for k in ("schedule_type", "sigma_min", "sigma_max") if k not in fields]:
        raise ValueError(f"it does not say its {missing}: pass grid={{...}}, sigma_min and sigma_max.")
    name, ends = fields["schedule_type"], {k: float(fields[k]) for k in _PIXEL_RANGE}
    if _dataset(fields) == "ms_coco" and ends == _PIXEL_RANGE:
        return {"name": "discrete", **_SD_RANGE}
    rho = float(fields.get("schedule_rho", 7.0))
    if name == "discrete" and rho != 1:
        raise ValueError(f"grid 'discrete' with schedule_rho={rho} has no counterpart here: pass grid={{...}}.")
    return {"name": name, **ends, **({"rho": rho} if name in ("polynomial", "time_uniform") else {})}


def _dataset(fields: Mapping[str, Any]) -> str:
    flux = "dyweight_weights_raw" in fields
    return "flux" if flux else fields.get("dataset_name", fields.get("dataset", "unknown"))


def _collect(root: Any) -> dict[str, Any]:
    """The known fields wherever they are in a decoded file, the outermost of each name."""
    fields: dict[str, Any] = {}
    queue, seen = deque([root]), set()
    while queue:
        node = queue.popleft()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, dict):
            for key, value in node.items():
                if (
                    isinstance(key, str)
                    and key in _FIELDS
                    and key not in fields
                    and isinstance(value, (bool, int, float, str, Tensor))
                ):
                    fields[key] = value.item() if isinstance(value, Tensor) and value.ndim == 0 else value
            queue.extend(node.values())
        if isinstance(node, Inert):
            queue.extend(vars(node).values())
        elif isinstance(node, (list, tuple)):
            queue.extend(node)
    return fields
