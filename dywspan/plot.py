"""Pictures: the numbers of a solver, and what it samples beside others."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import IO, Any

from matplotlib import pyplot
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patheffects import withStroke
from PIL import Image, ImageDraw, ImageFont

from .artifact import shown_tables, table_of
from .core.grid import make_grid

# One colour a solver, in every picture: the first that its name begins with.
GREY = "#6e6e6e"  # of all others
COLORS = {
    "SpanLift + TimeLift": "#8e24aa",
    "DyWeight + TimeLift": "#00796b",
    "SpanLift": "#c1121f",
    "DyWeight": "#1558b0",
    "DPM-Solver++(2M)": "#e07a00",
    "UniPC": "#8d6e00",
    "iPNDM": "#a0522d",
    "Euler": "#b09a8a",
    "DDIM": "#b09a8a",
}


def color(solver: str, again: int = 0) -> str:
    """Of a solver by its name.

    Args:
        again: how many of the same kind are in the picture already; each is paler.
    """
    own = next((own for name, own in COLORS.items() if solver.startswith(name)), GREY)
    r, g, b = (c + (1 - c) * min(0.35 * again, 0.7) for c in to_rgb(own))
    return to_hex((r, g, b))


def label_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]], is_low: bool, size: float = 9.5) -> None:
    """Names of lines at the right of a plot, in the order of their ends, none over another.

    Those of lines that end before the others are at their ends.

    Args:
        ends: of each line x and y of its last point, its name and its colour.
        is_low: whether there is more room below a line that ends early, or else above.
        size: of the letters, in points.
    """
    axes.figure.canvas.draw()  # where things are is known afterwards
    point, last = axes.figure.dpi / 72, max(end[0] for end in ends)
    for x, y, name, own in (end for end in ends if end[0] < last):
        where: dict[str, Any] = {"textcoords": "offset points", "ha": "left", "va": "top" if is_low else "bottom"}
        told = axes.annotate(name, (x, y), (2, -9 if is_low else 7), color=own, fontsize=size, zorder=9, **where)
        told.set_path_effects([withStroke(linewidth=3, foreground="white")])
    order = sorted((end for end in ends if end[0] == last), key=lambda end: axes.transData.transform(end[:2])[1])
    heights = [1.35 * size * point * (1 + name.count("\n")) for _, _, name, _ in order]
    wanted = [float(axes.transData.transform(end[:2])[1]) for end in order]
    shown = [*wanted]
    for _ in range(100):  # push neighbours apart until none overlap
        for i in range(len(shown) - 1):
            overlap = (heights[i] + heights[i + 1]) / 2 - (shown[i + 1] - shown[i])
            if overlap > 0:
                shown[i], shown[i + 1] = shown[i] - overlap / 2, shown[i + 1] + overlap / 2
    bottom, height = axes.bbox.y0, axes.bbox.height
    for (x, y, name, own), at in zip(order, shown):
        to = 1.03, (at - bottom) / height
        line: dict[str, Any] = {
            "arrowstyle": "-",
            "color": own,
            "lw": 0.7,
            "ls": ":",
            "alpha": 0.6,
            "shrinkA": 0,
            "shrinkB": 3,
        }
        place: dict[str, Any] = {"xycoords": "data", "textcoords": "axes fraction", "va": "center", "ha": "left"}
        axes.annotate(name, (x, y), to, color=own, fontsize=size, arrowprops=line, annotation_clip=False, **place)


def plot_tables(scheduler: Any, path: str | os.PathLike[str] | IO[bytes], steps: int | None = None) -> None:
    """One row of three panels for each number of steps: weights, row sums with the time scale, and noise levels.

    Of a continuous table without tables of its own, some numbers of steps are shown.

    Args:
        scheduler: a DyWeight or SpanLift scheduler with tables.
        path: of the picture, PNG, SVG or PDF; an open file gets a PNG.
        steps: show this number of steps only.

    Raises:
        ValueError: it has no table for ``steps``.
    """
    tables = sorted((shown_tables(scheduler) if steps is None else {steps: table_of(scheduler, steps)}).items())
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
        lift = scheduler.lift(n, schedule) if hasattr(scheduler, "lift") else None
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


def picture(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    columns: Sequence[str],
    size: int = 96,
    heads: Mapping[int, str] | None = None,
) -> Image.Image:
    """A labelled grid: one solver a row, one prompt (same noise) a column.

    Args:
        rows: (label, images).
        columns: prompts, wrapped above the images.
        size: of one image, in pixels.
        heads: headings above the columns, by the number of the first that they are of, wrapped to these; a gap sets
            them apart.
    """
    heads = heads or {}
    font = ImageFont.load_default(15)
    small = ImageFont.load_default(11)
    left = 16 + math.ceil(max(font.getlength(label) for label, _ in rows))
    x = [left + j * (size + 2) + 12 * sum(0 < k <= j for k in heads) for j in range(len(columns))]
    ends = {j: x[k] - 12 for j, k in pairwise(sorted(heads))}
    told = {j: _wrapped(head, font, ends.get(j, x[-1] + size) - x[j]) for j, head in heads.items()}
    top = 44 + max((4 + 18 * text.count("\n") + 18 for text in told.values()), default=0)
    sheet = Image.new("RGB", (x[-1] + size + 2, top + len(rows) * (size + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, text in told.items():
        draw.multiline_text((x[j] + 2, 3), text, "black", font, spacing=2)
    for j, prompt in enumerate(columns):
        draw.multiline_text((x[j] + 2, top - 41), _wrapped(prompt, small, size), "black", small, spacing=1)
    y = top
    for label, images in rows:
        draw.text((8, y + size // 2 - 9), label, "black", font)
        for j, image in enumerate(images):
            sheet.paste(image.resize((size, size), Image.Resampling.BICUBIC), (x[j], y))
        y += size + 2
    return sheet


def _wrapped(text: str, font: Any, width: int, lines: int = 3) -> str:
    result = [""]
    for word in re.split(r"(?<=\s)|(?<=\S-)(?=\S)", text):  # a long word breaks at its hyphens
        longer = result[-1] + word
        if font.getlength(longer.rstrip()) > width - 4 and result[-1]:
            result.append(word)
        else:
            result[-1] = longer
    return "\n".join(line.rstrip() for line in result[:lines])
