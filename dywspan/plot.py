"""Pictures: the numbers of a solver, and what it samples beside others."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot
from PIL import Image, ImageDraw, ImageFont

from .artifact import shown_tables
from .core.grid import make_grid


def plot_tables(scheduler: Any, path: str | os.PathLike[str]) -> None:
    """One row of three panels for each number of steps: weights, row sums with the time scale, and noise levels.

    Of a continuous table without tables of its own, some numbers of steps are shown.

    Args:
        scheduler: a DyWeight or SpanLift scheduler with tables.
        path: of the picture, PNG, SVG or PDF.
    """
    tables = sorted(shown_tables(scheduler).items())
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


def picture(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str], size: int = 96) -> Image.Image:
    """A labelled grid: one solver a row, one prompt (same noise) a column.

    Args:
        rows: (label, images); a label that is empty leaves a gap.
        columns: prompts, wrapped above the images.
        size: of one image, in pixels.
    """
    font = ImageFont.load_default(15)
    small = ImageFont.load_default(11)
    left = max(190, *(16 + math.ceil(font.getlength(label)) for label, _ in rows))
    top, gap = 44, 10
    height = top + sum(size + 2 if images else gap for _, images in rows)
    sheet = Image.new("RGB", (left + len(columns) * (size + 2), height), "white")
    draw = ImageDraw.Draw(sheet)
    for j, prompt in enumerate(columns):
        draw.multiline_text((left + j * (size + 2) + 2, 3), _wrapped(prompt, small, size), "black", small, spacing=1)
    y = top
    for label, images in rows:
        draw.text((8, y + size // 2 - 9), label, "black", font)
        for j, image in enumerate(images):
            sheet.paste(image.resize((size, size), Image.Resampling.BICUBIC), (left + j * (size + 2), y))
        y += size + 2 if images else gap
    return sheet


def _wrapped(text: str, font: Any, width: int, lines: int = 3) -> str:
    result = [""]
    for word in text.split():
        longer = f"{result[-1]} {word}".strip()
        if font.getlength(longer) > width - 4 and result[-1]:
            result.append(word)
        else:
            result[-1] = longer
    return "\n".join(result[:lines])
