"""Results as pictures: quality over the number of evaluations, and samples beside each other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact import write_atomically
from .baselines import BEST, full_name
from .paired import line_of, part_of
from .report import by_variant, file_stem

Row = Mapping[str, Any]
NAMED = ("DPM-Solver++(2M)", "UniPC", "Euler", "DDIM")  # classical solvers that people know, drawn if there is room
LINES = 5
UNITS = {
    "latent_mse": "mean squared error of the latent",
    "latent_rmse": "root mean square error of the latent",
    "feature_distance": "distance in features of the image",
    "psnr": "PSNR of the image, dB",
    "lpips": "LPIPS of the image",
    "fid": "FID",
}
SHORT = {"mse": "error", "distance": "distance", "psnr": "PSNR"}  # by what a metric's name has in it
LARGEST = 200_000  # bytes of a sheet of samples


# ------------------------------------------------------------------------------------------------------------- plots


def plots(results: Mapping[str, Any], path: Path) -> list[Path]:
    """One picture a metric, ``NAME-METRIC.png`` for a path ``NAME.png``, and of variants one each.

    The classical solvers are a grey band, its best edge named; learned ones have their 95 % interval.
    """
    if part_of(results["rows"][0]):
        parts = by_variant(results).items()
        return [drawn for name, part in parts for drawn in plots(part, path.with_stem(file_stem(path.stem, name)))]
    path.parent.mkdir(parents=True, exist_ok=True)
    known = [name for name in results["metrics"] if any(name in row for row in results["rows"])]
    return [_plot(results, name, path.with_stem(f"{path.stem}-{name}")) for name in known]


def _plot(results: Mapping[str, Any], metric: str, path: Path) -> Path:
    from matplotlib import pyplot, ticker

    from ..plot import GREY, color, label_ends

    rows = [row for row in results["rows"] if row["solver"] != "reference" and metric in row]
    lower = results["metrics"][metric]["lower_is_better"]
    counts = sorted({row["nfe"] for row in rows})
    figure, axes = pyplot.subplots(figsize=(9, 5.2), layout="constrained")
    ends: list[tuple[float, float, str, str]] = []
    classical = [[row for row in rows if not row["learned"] and row["nfe"] == n] for n in counts]
    if found := [own for own in classical if own]:
        x, values = [own[0]["nfe"] for own in found], [[row[metric] for row in own] for own in found]
        edge = [best_of(own, metric, lower) for own in found]
        axes.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=GREY, alpha=0.18, lw=0)
        axes.plot(x, [row[metric] for row in edge], color=GREY, lw=2)
        last = edge[-1]["solver"].removesuffix(f" ({BEST})")
        ends.append((x[-1], edge[-1][metric], f"best classical,\nhere {last}", GREY))
    shown = _shown(rows, results.get("settings", {}).get("gap_from"))
    for i, name in enumerate(shown):
        again = sum(color(other) == color(name) for other in shown[:i])
        own = color(name, again)
        curve = sorted((row for row in rows if line_of(row) == name), key=lambda row: row["nfe"])
        learned, x, y = curve[0]["learned"], [row["nfe"] for row in curve], [row[metric] for row in curve]
        if learned:
            low, high = zip(*(row["interval"][metric] for row in curve))
            axes.fill_between(x, low, high, color=own, alpha=0.2, lw=0, zorder=3)
        axes.plot(x, y, "o-", color=own, lw=2.6 if learned else 1.1, ms=5 if learned else 2.5, zorder=3 + learned)
        ends.append((x[-1], y[-1], name.removesuffix(" (learned)"), own))
    for row in (row for row in results["rows"] if row["solver"] == "reference" and metric in row):
        axes.axhline(row[metric], color="black", ls=":", lw=1)
        ends.append((counts[-1], row[metric], f"reference, {row['nfe']}", "black"))
    positive = all(row[metric] > 0 for row in rows)
    axes.set(xscale="log", yscale="log" if lower and positive else "linear", xticks=counts)
    axes.set_xlabel("evaluations of the network, guided (NFE)")
    axes.set_ylabel(f"{UNITS.get(metric, metric)} ({'lower' if lower else 'higher'} is better)")
    axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(alpha=0.25, which="both", lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(finding(rows, metric, lower), loc="left", fontsize="medium", fontweight="bold")
    label_ends(axes, ends, is_low=lower)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def best_of(rows: Sequence[Row], metric: str, lower: bool) -> Row:
    """The row of the best number."""
    return (min if lower else max)(rows, key=lambda row: row[metric])


def _shown(rows: Sequence[Row], origin: str | None) -> list[str]:
    """The lines that are drawn: all learned ones, then the pipeline's own and known ones while there is room."""
    there = list(dict.fromkeys(line_of(row) for row in rows))
    learned = [name for name in there if any(row["learned"] for row in rows if line_of(row) == name)]
    known = [name for name in dict.fromkeys((full_name(origin or ""), *NAMED)) if name in there and name not in learned]
    return [*known[: max(1, LINES - 1 - len(learned))], *learned]


def finding(rows: Sequence[Row], metric: str, lower: bool) -> str:
    """What the numbers say of the best learned solver against the best classical one, at each number of evaluations.

    "Learned solvers: 21 to 54 % less error than the best classical one at 2 to 9 evaluations, not at 10"
    """
    what = UNITS.get(metric, metric)
    short = next((own for key, own in SHORT.items() if key in metric), metric)
    gains: dict[int, float] = {}
    relative = lower and all(row[metric] > 0 for row in rows)
    for n in sorted({row["nfe"] for row in rows}):
        there = [row for row in rows if row["nfe"] == n]
        parts = [[row for row in there if bool(row["learned"]) is ours] for ours in (True, False)]
        if all(parts):
            own, other = (best_of(part, metric, lower)[metric] for part in parts)
            gains[n] = 1 - own / other if relative else (other - own) * (1 if lower else -1)
    better = {n: gain for n, gain in gains.items() if gain > 0}
    if not better:
        nobody = f"Learned solvers: no better {short} than the best classical one at {_spans(gains, gains)} evaluations"
        return nobody if gains else f"{what[0].upper()}{what[1:]} over the number of evaluations"
    least, most = min(better.values()), max(better.values())
    shown = [f"{100 * v:.0f}" if relative else f"{v:.2g}" for v in (least, most)]
    unit = "%" if relative else "dB" if metric == "psnr" else ""
    amount = " ".join(filter(None, [" to ".join(dict.fromkeys(shown)), unit, "less" if lower else "more", short]))
    missed = f", not at {_spans(set(gains) - set(better), gains)}" if len(better) < len(gains) else ""
    return f"Learned solvers: {amount} than the best classical one at {_spans(better, gains)} evaluations{missed}"


def _spans(counts: Collection[int], among: Collection[int]) -> str:
    """ "2 to 9, 12": those that follow each other in ``among`` are written as one."""
    order, spans = sorted(among), list[list[int]]()
    for i, n in enumerate(order):
        if n in counts and i and order[i - 1] in counts:
            spans[-1].append(n)
        elif n in counts:
            spans.append([n])
    return ", ".join(f"{span[0]} to {span[-1]}" if len(span) > 2 else ", ".join(map(str, span)) for span in spans)


# ------------------------------------------------------------------------------------------------------------ sheets


def places(errors: Tensor | None, count: int) -> tuple[list[int], list[int]]:
    """The samples that a sheet shows: half of them the worst of the errors, the others those about their median.

    Args:
        errors: (N,), of the solver that others are compared with; None: the first samples, all of them typical.
    """
    if errors is None:
        return [], list(range(count))
    order, count = errors.argsort(descending=True).tolist(), min(count, len(errors))
    worst = order[: count // 2]
    left, many = order[len(worst) :], count - len(worst)
    start = max(0, min(len(order) // 2 - len(worst) - many // 2, len(left) - many))
    return worst, left[start : start + many]


def error_maps(images: Tensor, reference: Tensor) -> Tensor:
    """(B, 3, H, W): five times the mean absolute difference over the channels, black where there is none."""
    return (5 * (images - reference).abs().mean(1, keepdim=True)).clamp(max=1).expand(-1, 3, -1, -1)


def draw_samples(
    rows: Sequence[tuple[str, Tensor]], columns: Sequence[str], path: Path, heads: Mapping[int, str]
) -> None:
    """A sheet, one solver a row, one sample a column; below every solver its error maps. Of at most ``LARGEST`` bytes.

    Args:
        rows: label and images, (B, 3, H, W) in [0, 1], the reference's first.
        columns: prompts.
        heads: what the columns from one on show, by its number.
    """
    from ..plot import picture

    (name, reference), *solvers = rows
    sheet = [(name, [*to_pil(reference)])]
    for label, images in solvers:
        sheet += [(label, [*to_pil(images)]), ("error x 5", [*to_pil(error_maps(images, reference))])]
    path.parent.mkdir(parents=True, exist_ok=True)
    for size in (128, 96, 80, 64, 48):
        file = BytesIO()
        picture(sheet, columns, size, heads).quantize(256).save(file, "PNG", optimize=True)
        if file.tell() <= LARGEST:
            break
    write_atomically(path, file.getvalue())


def to_pil(images: Tensor) -> Iterator[Any]:
    """Pictures of (B, 3, H, W) in [0, 1]."""
    from PIL import Image

    levels = (images.clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    return map(Image.fromarray, levels)
