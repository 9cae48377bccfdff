"""Pictures of solvers: the numbers of a table, drawn."""

from __future__ import annotations

import os
from typing import Any

from matplotlib import pyplot

from ..core.grid import make_grid


def plot_tables(scheduler: Any, path: str | os.PathLike[str]) -> None:
    """One row of three panels for each number of steps: weights, row sums with the time scale, and noise levels.

    Args:
        scheduler: a DyWeight or SpanLift scheduler with tables.
        path: of the picture, PNG, SVG or PDF.
    """
    tables = sorted(scheduler.tables.items())
    figure, axes = pyplot.subplots(len(tables), 3, figsize=(12, 2.6 * len(tables)), squeeze=False, layout="constrained")
    for (n, table), (left, middle, right) in zip(tables, axes):
        schedule = table.schedule(scheduler.host.prediction)
        limit = 1.8 * float(table.weights.abs().max())  # numbers stay readable on the darkest cells
        left.imshow(table.weights.T, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        for i, row in enumerate(table.weights.tolist()):
            for j, weight in enumerate(row[: i + 1]):
                left.text(i, j, f"{weight:.2f}", ha="center", va="center", fontsize=8)
        left.set(ylabel=f"{n} steps", xticks=range(len(table.weights)), yticks=range(table.weights.shape[1]))
        left.set_yticklabels(["$d_i$", *(f"$d_{{i-{j}}}$" for j in range(1, table.weights.shape[1]))])
        middle.axhline(1, color="grey", lw=0.8)
        middle.plot(table.weights.sum(1), "o-", label=r"$\sum_j w_{ij}$")
        middle.plot(table.time_scale, "s-", label="$s_i$")
        lift = getattr(scheduler, "lifts", {}).get(n)
        if lift is not None:
            middle.plot(lift.alpha, "^--", label=r"$\alpha_i$")
            middle.plot(lift.beta, "v--", label=r"$\beta_i$")
        middle.set_xticks(range(len(table.weights)))
        nominal = make_grid(table.grid, len(table.weights), scheduler.host.prediction)
        right.plot(nominal, "o-", color="grey", label=r"grid $\sigma_i$")
        right.plot(schedule.levels[:-1], "o-", label=r"state $\tilde\sigma_i$")
        right.plot(schedule.queries, "s--", label=r"network $\tau_i$")
        right.set(yscale="symlog" if float(schedule.levels[0]) > 2 else "linear", xticks=range(len(table.weights) + 1))
        for panel in (middle, right):
            panel.legend(fontsize=8)
    for panel, title in zip(axes[0], ("weights", "row sums and scalars", "noise levels")):
        panel.set_title(title)
    for panel in axes[-1]:
        panel.set_xlabel("step i")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
