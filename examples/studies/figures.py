"""The studies' pictures: each is one finding, said in its title."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot

Rows = Sequence[Mapping[str, Any]]
ORDER_COLOURS = {1: "#8a8a8a", 2: "#e07a00", 3: "#2a8f5b", 4: "#1558b0"}
DASHES = {"standard": "--", "optimised": "-"}


def save(figure: Any, path: Path, title: str) -> None:
    """Write a picture with its title, and let go of it."""
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def white_box(rows: Rows, path: Path) -> None:
    """DyWeight figure 3 at ``path``, figure A.2 beside it: NAME-all.png."""
    steps, degrees = (sorted({r[key] for r in rows if r["solver"] != "teacher"}) for key in ("steps", "degree"))
    middle = {"steps": steps[len(steps) // 4], "degree": degrees[len(degrees) // 2]}
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axis, fixed in zip(axes, ("steps", "degree")):
        _white_box_panel(axis, rows, fixed, middle[fixed])
    axes[0].set_ylabel("relative error of y(1), mean of the problems")
    axes[1].legend(fontsize=8, ncol=2)
    ratio = _ratio(rows)
    save(
        figure, path, f"Learned weights have {ratio[0]:.2g} to {ratio[1]:.3g} times smaller errors than classical ones"
    )
    count = max(len(steps), len(degrees))
    figure, axes = pyplot.subplots(4, count // 2 or 1, figsize=(3.1 * (count // 2 or 1), 10.5), layout="constrained")
    panels = [("steps", s) for s in steps] + [("degree", k) for k in degrees]
    for axis, (fixed, value) in zip(axes.flat, panels):
        _white_box_panel(axis, rows, fixed, value)
        axis.tick_params(labelsize=7)
    axes.flat[0].legend(fontsize=6, ncol=2)
    save(figure, path.with_stem(f"{path.stem}-all"), "Relative error of y(1), every number of steps and every degree")


def _white_box_panel(axis: Any, rows: Rows, fixed: str, value: int) -> None:
    moving = "degree" if fixed == "steps" else "steps"
    for kind, dash in DASHES.items():
        for order, colour in ORDER_COLOURS.items():
            own = [r for r in rows if (r["solver"], r["order"], r[fixed]) == (kind, order, value)]
            own.sort(key=lambda r: r[moving])
            axis.plot(
                [r[moving] for r in own], [r["error"] for r in own], dash, color=colour, label=f"AB-{order} {kind}"
            )
    teacher = [r for r in rows if r["solver"] == "teacher"]
    if fixed == "steps":
        axis.plot([r["degree"] for r in teacher], [r["error"] for r in teacher], ":", color="#c1121f", label="teacher")
    names = {"steps": f"{value} steps", "degree": f"degree {value}"}
    axis.set(yscale="log", title=names[fixed], xlabel="degree K of the solution" if fixed == "steps" else "steps S")
    if moving == "steps":
        axis.invert_xaxis()
    axis.grid(alpha=0.25, lw=0.5)


def _ratio(rows: Rows) -> tuple[float, float]:
    errors = {(r["solver"], r["order"], r["steps"], r["degree"]): r["error"] for r in rows}
    ratios = [e / errors["optimised", o, s, k] for (kind, o, s, k), e in errors.items() if kind == "standard"]
    return min(ratios), max(ratios)
