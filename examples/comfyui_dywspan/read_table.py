"""Read a solver's table and sample with it, in numpy alone: docs/format.md in fewer than 100 lines.

    solver = make_solver(json.loads(Path("scheduler_config.json").read_text()), steps=3)
    *_, (image, _) = run(solver, denoise, solver.levels[0] * noise)

``denoise(x, tau, t)`` estimates x0 from the state x; the network is told level tau as time t. For a network that
predicts epsilon it is ``x - tau * network(x / (1 + tau**2) ** 0.5, t)``, for a flow's ``x - tau * network(x, t)``.
x may be an array or tensor of any library: steps only add states and multiply them by numbers.
"""

from typing import NamedTuple

import numpy as np


class Solver(NamedTuple):  # N steps in float64, by the names of docs/format.md
    levels: np.ndarray  # (N + 1,) sigma~_i; the last is the grid's end
    queries: np.ndarray  # (N,) tau_i
    times: np.ndarray  # (N,) t(tau_i)
    sizes: np.ndarray  # (N,) h_i
    weights: np.ndarray  # (N, K) w_ij
    afs: bool
    flow: bool


def make_solver(config, steps, mu=0.0):
    """The table for ``steps`` evaluations. mu: log of the flow's shift, where the table leaves that to the pipeline."""
    tables, n = config.get("tables") or {}, str(steps)
    if n in (config.get("lifts") or {}) or config.get("continuous_lift") or n in (config.get("time_lifts") or {}):
        raise ValueError(f"The solver for {n} steps has an operator or a TimeLift beside its table: use dywspan.")
    if n not in tables:
        raise ValueError(f"There is no table for {n} steps; there are tables for {sorted(map(int, tables))}.")
    if config.get("thresholding") or config.get("clip_sample"):
        raise ValueError("This solver's scheduler clips the estimate of x0, and this reader does not: use dywspan.")
    table, rows, predicts = tables[n], tables[n]["weights"], config["prediction_type"]
    video = predicts == "v_prediction" and config.get("timestep_type") == "continuous"  # Stable Video Diffusion
    edm = video or (config.get("host_scheduler") or "").startswith("EDM")
    kind = "flow" if predicts == "flow_prediction" else "edm" if edm else "vp"
    if table.get("convention", kind) != kind:
        raise ValueError(f"The table is for networks of convention {table['convention']!r}, not {kind!r}.")
    clock = vp_clock(config) if kind == "vp" else None
    grid = make_grid(table["grid"], np.linspace(0, 1, len(rows) + 1), clock, mu)
    weights, levels = np.array([row + [0.0] * (max(map(len, rows)) - len(row)) for row in rows]), grid.copy()
    for i in range(1, len(rows) if table.get("time_shifting", True) else 0):  # DyWeight eq. (9)
        levels[i] = levels[i - 1] + weights[i - 1].sum() * (grid[i] - levels[i - 1])
    queries = np.array(table.get("time_scale", np.ones(len(rows)))) * levels[:-1]
    told = np.log(queries) / 4 if edm else 1 - queries if config.get("invert_sigmas") else queries
    times = clock[0](queries) if clock else told if edm else config["num_train_timesteps"] * told
    return Solver(levels, queries, times, grid[1:] - levels[:-1], weights, table.get("afs", False), kind == "flow")


def run(solver, denoise, x, begin=0, end=None):
    """Yield x_{i+1} and the estimate of x0 it is made with, for steps ``begin`` to ``end``; x is at level ``begin``."""
    history = []
    for i in range(len(solver.queries))[begin:end]:
        sigma, tau, row = float(solver.levels[i]), float(solver.queries[i]), solver.weights[i]
        skip = solver.afs and i == 0
        x0 = x - sigma * x / (1 + sigma**2) ** 0.5 if skip else denoise(x, tau, float(solver.times[i]))
        history = [(x - x0) / (tau if solver.flow else sigma), *history][: len(row)]
        known = [*row[: len(history) - 1], row[len(history) - 1 :].sum()]  # what is missing: to the oldest there is
        x = x + sum(float(solver.sizes[i] * w) * d for w, d in zip(known, history))
        yield x, x0


def vp_clock(config):
    """The network's time of a level, and the level of a time: log alpha is piecewise linear in time."""
    last, name = config["num_train_timesteps"], config["beta_schedule"]
    if config.get("rescale_betas_zero_snr") or config.get("trained_betas") or name not in ("linear", "scaled_linear"):
        raise ValueError(f"This reader knows beta_schedule 'linear' and 'scaled_linear', not {name!r}: use dywspan.")
    p = 2 if name == "scaled_linear" else 1
    betas = np.float32(np.linspace(config["beta_start"] ** (1 / p), config["beta_end"] ** (1 / p), last)) ** p
    products = np.float32(np.cumprod(np.float64(1 - betas)))  # rounded as PyTorch rounds it
    nodes = np.append(0.0, np.log(np.float64(products)) / 2)  # log alpha at t = -1 .. M - 1; beyond, straight on
    slopes, at = np.diff(nodes), lambda k: np.clip(k, 0, last - 1).astype(int)

    def time(tau):
        wanted = -np.log1p(np.square(tau)) / 2
        k = at(np.searchsorted(-nodes, -wanted) - 1)
        return k - 1 + (wanted - nodes[k]) / slopes[k]

    def level(t):
        k = at(np.floor(t + 1))
        return np.sqrt(np.maximum(np.expm1(-2 * (nodes[k] + (t + 1 - k) * slopes[k])), 0))

    return time, level


def make_grid(spec, u, clock, mu):
    p, name = {"rho": 7.0, **{k: v for k, v in spec.items() if v is not None}}, spec.get("name")
    if "sigmas" in p:
        return np.array(p["sigmas"], dtype=float)
    if name == "flow":
        shift = p.get("shift", np.exp(p.get("mu", mu)))
        return shift * (1 - u) / (shift * (1 - u) + u)
    power, root = (lambda s: s ** p["rho"]), (lambda s: s ** (1 / p["rho"]))
    maps = {"polynomial": (root, power), "logsnr": (np.log, np.exp), "discrete": clock}
    if maps.get(name) is None:
        raise ValueError(f"This reader does not know grid {name!r}: use dywspan.")
    return maps[name][1](maps[name][0](p["sigma_max"]) * (1 - u) + maps[name][0](p["sigma_min"]) * u)
