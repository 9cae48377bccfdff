"""The studies' pictures: each is one finding, said in its title."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot
from PIL import Image

from dywspan.plot import color

Rows = Sequence[Mapping[str, Any]]
ORDER_COLOURS = {1: "#8a8a8a", 2: "#e07a00", 3: "#2a8f5b", 4: "#1558b0"}
DASHES = {"standard": "--", "optimised": "-"}


def save(figure: Any, path: Path, title: str) -> None:
    """Write a picture with its title, and let go of it."""
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    if path.suffix == ".png":  # 256 colours are enough, and a third of the bytes
        Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def white_box(rows: Rows, path: Path) -> None:
    """DyWeight figure 3 at ``path``, figure A.2 beside it: NAME-all.png."""
    steps, degrees = (sorted({r[key] for r in rows if r["solver"] != "teacher"}) for key in ("steps", "degree"))
    middle = {"steps": steps[len(steps) // 4], "degree": degrees[len(degrees) // 2]}
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, fixed in zip(axes, ("steps", "degree")):
        _white_box_panel(axis, rows, fixed, middle[fixed])
    axes[0].set_ylabel("relative error of y(1), mean of the problems")
    axes[0].legend(fontsize=8, ncol=2)
    ratio = _ratio(rows)
    save(
        figure, path, f"Learned weights have {ratio[0]:.2g} to {ratio[1]:.2g} times smaller errors than classical ones"
    )
    count = max(len(steps), len(degrees))
    figure, axes = pyplot.subplots(4, count // 2 or 1, figsize=(3.1 * (count // 2 or 1), 10.5), layout="constrained")
    panels = [("steps", s) for s in steps] + [("degree", k) for k in degrees]
    for axis, (fixed, value) in zip(axes.flat, panels):
        _white_box_panel(axis, rows, fixed, value)
        axis.tick_params(labelsize=7, which="both")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncol=5, fontsize=8)
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
        teacher.sort(key=lambda r: r["degree"])
        label = "teacher: AB-4, 100 steps"
        axis.plot([r["degree"] for r in teacher], [r["error"] for r in teacher], ":", color="#c1121f", label=label)
    names = {"steps": f"{value} steps", "degree": f"degree {value}"}
    axis.set(yscale="log", title=names[fixed], xlabel="degree K of the solution" if fixed == "steps" else "steps S")
    if moving == "steps":
        axis.invert_xaxis()
    axis.grid(alpha=0.25, lw=0.5)


def _ratio(rows: Rows) -> tuple[float, float]:
    errors = {(r["solver"], r["order"], r["steps"], r["degree"]): r["error"] for r in rows}
    ratios = [e / errors["optimised", o, s, k] for (kind, o, s, k), e in errors.items() if kind == "standard"]
    return min(ratios), max(ratios)


SOLVER_COLOURS = {"Adams-Bashforth": "#e07a00", "DyWeight": "#1558b0", "SpanLift": "#c1121f"}


def halvorsen(test: Any, moves: Mapping[str, Any], means: Rows, path: Path) -> None:
    """SpanLift figure 3 (B) and (C): the mean start's step over the plane V, and the mean squares of all starts."""
    figure = pyplot.figure(figsize=(11, 4.6), layout="constrained")
    left: Any = figure.add_subplot(1, 2, 1, projection="3d")
    right = figure.add_subplot(1, 2, 2)
    (u, before), exact = (d[0].numpy() for d in test.derivatives), test.exact[0].numpy()
    first = u / np.linalg.norm(u)
    second = before - before @ first * first
    second /= np.linalg.norm(second)
    axes = np.stack([first, second, np.cross(first, second)])
    points = {"exact step": exact, **{name: move[0].numpy() for name, move in moves.items()}}
    shown = {name: axes @ point for name, point in points.items()}
    x, y = ([f(p[k] for p in shown.values()) for f in (min, max)] for k in (0, 1))
    x, y = ([low - 0.4 * (high - low), high + 0.4 * (high - low)] for low, high in (x, y))
    left.plot_surface(*np.meshgrid(x, y), np.zeros((2, 2)), alpha=0.18, color="#1558b0")
    for name, (a, b, c) in shown.items():
        colour = SOLVER_COLOURS.get(name, "black")
        left.scatter([a], [b], [c], color=colour, s=50, marker="*" if name == "exact step" else "o", label=name)
        left.plot([a, a], [b, b], [0, c], ":", color=colour)
    left.scatter(*shown["exact step"][:2], 0, color="black", marker="x", label="its projection on V")
    left.set(
        xlabel="along $u_i$",
        ylabel="in V, across $u_i$",
        zlabel="out of V",
        title="one step: velocities in and out of V",
    )
    left.legend(fontsize=8)
    names, floor = [row["solver"] for row in means], means[0]["floor"]
    inside, outside = ([row[key] for row in means] for key in ("in_span", "out_of_span"))
    right.bar(names, outside, color="#8a8a8a", label="out of span")
    right.bar(names, inside, bottom=outside, color=[SOLVER_COLOURS[name] for name in names], label="in span")
    right.axhline(floor, color="black", ls=":", lw=1)
    right.text(2.45, floor, "no weights get below this", ha="right", va="bottom", fontsize=9)
    for k, row in enumerate(means):
        right.text(k, row["mismatch"], f"{row['mismatch']:.3g}", ha="center", va="bottom")
    right.set(
        ylabel="squared mismatch of the velocity, mean of 256 starts", title="grey: out of span; coloured: in span"
    )
    gained = 1 - means[1]["in_span"] / means[0]["in_span"]
    title = f"Learned weights remove {gained:.0%} of the in-span part; below the floor is what only SpanLift reaches"
    save(figure, path, title)


def out_of_span(rows: Rows, path: Path) -> None:
    """SpanLift table 6 and figure 4 as curves, and what each step misses: a line of panels for each pipeline."""
    lines = list(dict.fromkeys((r["subject"], r["num_inference_steps"]) for r in rows))
    panels = {
        "error": "error of a step / exact step",
        "out_of_span": "the part that no weights reach",
        "lift_out_of_span": "SpanLift: share out of the span",
        "lift_size": "SpanLift: size / base step",
    }
    figure, axes = pyplot.subplots(len(lines), 4, figsize=(14, 2.7 * len(lines)), layout="constrained", squeeze=False)
    for (subject, n), line in zip(lines, axes):
        here = [r for r in rows if (r["subject"], r["num_inference_steps"]) == (subject, n)]
        kinds = {f"{subject}-solvers": "DyWeight", f"{subject}-spanlift": "SpanLift"}
        names = {name: kinds.get(name) or name for name in dict.fromkeys(r["solver"] for r in here)}
        for (key, title), axis in zip(panels.items(), line):
            for name, label in names.items():
                own = [r for r in here if r["solver"] == name and key in r]
                if own:
                    axis.plot([r["step"] for r in own], [r[key] for r in own], "o-", color=color(label), label=label)
            axis.set(xlabel="step i", xticks=range(n), title=f"{title}\n{subject}, {n} steps")
            axis.set_ylim(0, 1.03 if key == "lift_out_of_span" else None)
            axis.grid(alpha=0.25, lw=0.5)
        line[2].axhline(0.84, color="black", ls=":", lw=1)
        line[3].axhline(0.23, color="black", ls=":", lw=1)
    axes[0][0].legend(fontsize=8)
    shares = [r["lift_out_of_span"] for r in rows if "lift_size" in r]
    sizes = [r["lift_size"] for r in rows if "lift_size" in r]
    title = f"{min(shares):.0%} to {max(shares):.0%} of SpanLift's correction is out of the span, "
    title += f"its size {min(sizes):.0%} to {max(sizes):.0%} of the step (dotted: above 84 %, below 23 % in the paper)"
    save(figure, path, title)


def errors_of_lines(rows: Rows, path: Path, title: str) -> None:
    """A bar for each line of a study, beside the first one's error; of SpanLift, also its base's."""
    subjects = list(dict.fromkeys(r["subject"] for r in rows))
    most = max(sum(r["subject"] == s for r in rows) for s in subjects)
    size = (6 * len(subjects), 1.4 + 0.3 * most)
    figure, axes = pyplot.subplots(1, len(subjects), figsize=size, layout="constrained", squeeze=False)
    for subject, axis in zip(subjects, axes[0]):
        own = [r for r in rows if r["subject"] == subject][::-1]
        names = [r["line"] for r in own]
        if any("base_rmse" in r for r in own):
            axis.barh(names, [r.get("base_rmse", 0) for r in own], color="#c9c9c9", label="base alone")
            axis.legend(fontsize=8)
        axis.barh(names, [r["latent_rmse"] for r in own], color="#1558b0", height=0.5)
        axis.axvline(own[-1]["latent_rmse"], color="black", ls=":", lw=1)
        axis.set(
            xlabel="root mean square error of the latent", title=f"{subject}, {own[0]['num_inference_steps']} steps"
        )
        axis.tick_params(labelsize=8)
    save(figure, path, title)
