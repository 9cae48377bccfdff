"""Results as people read them: one JSON file, and Markdown and pictures that are made from it."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..artifact import write_atomically
from ..text import markdown
from ..version import __version__
from .baselines import full_name
from .paired import is_separable, line_of, part_of


def write_results(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], **facts: Any) -> dict[str, Any]:
    """Write ``rows`` with the command, versions and device that made them, and return it all."""
    versions = {"dywspan": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({os.cpu_count()} cores)"
    command = shlex.join(["dywspan", *sys.argv[1:]])
    data = {
        "command": command,
        "versions": versions,
        "device": f"{device}, {platform.machine()}",
        **facts,
        "rows": [*rows],
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())
    return data


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What an evaluation or a bench wrote.

    Raises:
        ValueError: something else is in the file.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["rows"] and data["versions"]:
            return data
    except (KeyError, TypeError, json.JSONDecodeError):
        pass
    raise ValueError(f"{path} does not hold an evaluation: make one with `dywspan eval` or `dywspan bench`.")


def table(
    results: Mapping[str, Any],
    metrics: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    intervals: bool = True,
) -> str:
    """Markdown: for every metric, a line a solver and a column a number of evaluations (NFE).

    A cell is the number and its 95 % interval. The best of a column is bold where the paired interval of its difference
    to every other leaves 0 out; otherwise it and those that cannot be told from it are in italics. A bench without
    metrics is shown by its rows as they are, but for lists and mappings.

    Args:
        results: see :func:`read_results`.
        metrics: only these; of a bench without metrics, only these columns.
        steps: only these.
        intervals: whether to show them; without, numbers have the same digits.

    Raises:
        ValueError: none of them was measured.
    """
    if "metrics" not in results:
        return _plain(results["rows"], metrics, steps)
    if part_of(results["rows"][0]):
        alone = by_variant(results).items()
        return "\n\n".join(f"### {name}\n\n{table(part, metrics, steps, intervals)}" for name, part in alone)
    reference = [row for row in results["rows"] if row["solver"] == "reference"]
    rows = [row for row in results["rows"] if row not in reference and (steps is None or row.get("nfe") in steps)]
    wanted = [name for name in results["metrics"] if metrics is None or name in metrics]
    if not rows or not wanted:
        raise ValueError(f"Nothing was measured of metrics={metrics}, steps={steps}: there is {[*results['metrics']]}.")
    parts: list[str] = []
    for name in wanted:
        facts = dict(results["metrics"][name])
        better = min if facts.pop("lower_is_better") else max
        title = [f"**{name}**, {'lower' if better is min else 'higher'} is better"]
        title += [f"{key} {value}" for key, value in facts.items()]
        title += [f"reference ({row['nfe']} NFE) {number(row, name)}" for row in reference if name in row]

        def text(row: Mapping[str, Any], name: str = name) -> str:
            return number(row, name) if intervals else number(row, name).split(" ")[0]

        best = {nfe: better(row[name] for row in rows if row.get("nfe") == nfe) for nfe in {r.get("nfe") for r in rows}}
        cells = [_marked(text(row), row[name] == best[row.get("nfe")], is_separable(row, name)) for row in rows]
        parts += ["; ".join(title) + ":", _grid(rows, cells), *_chosen(rows)]
        if closing := [row for row in rows if name in row.get("gap_closed", {})]:
            parts.append(
                f"Share of the way from {full_name(results['settings']['gap_from'])} to the reference, {name}:"
            )
            parts.append(_grid(closing, [f"{row['gap_closed'][name]:.0%}" for row in closing]))
    return "\n\n".join(parts)


def changes(results: Mapping[str, Any], older: Mapping[str, Any], tolerance: float = 0.02) -> str:
    """Markdown: where another solver became the best, then the numbers that moved.

    So one sees which sentences about the older results have to be written anew. A number that only one of both has is
    shown too.

    Args:
        tolerance: relative; numbers that moved by less are not shown.

    Raises:
        ValueError: they have no metric in common.
    """
    new, old = results.get("metrics", {}), older.get("metrics", {})
    if not (metrics := [name for name in new if name in old]):
        raise ValueError(f"Nothing to compare: the files measure {[*new]} and {[*old]}.")
    best, moved = list[dict[str, Any]](), list[dict[str, Any]]()
    for name in metrics:
        better, both = min if new[name]["lower_is_better"] else max, [_numbers(r, name) for r in (older, results)]
        cells = dict.fromkeys(cell for part in both for cell in part)
        for cell in cells:
            where = {"metric": name, "variant": cell[0], "NFE": cell[1]}
            before, now = (part.get(cell, {}) for part in both)
            first = [better(part, key=part.__getitem__, default="") for part in (before, now)]
            if first[0] != first[1]:
                best.append({**where, "best before": first[0], "best now": first[1]})
            for solver in dict.fromkeys([*before, *now]):
                values = [part.get(solver, math.nan) for part in (before, now)]
                if not abs(values[1] - values[0]) <= tolerance * abs(values[0]):
                    shown = ["" if math.isnan(value) else f"{value:.4g}" for value in values]
                    moved.append({**where, "solver": solver, "before": shown[0], "now": shown[1]})
    told = [f"The best solver is another one at {len(best)} of these:", markdown(best)] if best else []
    told += [f"Numbers that moved by more than {tolerance:.0%}:", markdown(moved)] if moved else []
    return "\n\n".join(told or [f"The best solvers are the same, and no number moved by more than {tolerance:.0%}."])


def _numbers(results: Mapping[str, Any], metric: str) -> dict[tuple[str, int], dict[str, float]]:
    """By variant and number of evaluations, the solvers' numbers."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in results["rows"]:
        if metric in row and row["solver"] != "reference":
            found.setdefault((part_of(row), row.get("nfe", 0)), {})[line_of(row)] = row[metric]
    return found


def by_variant(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The results of each variant of the call, or of each pipeline, as if measured alone; of all, under "", if there
    are none.
    """
    parts: dict[str, dict[str, Any]] = {}
    for row in results["rows"]:
        part = parts.setdefault(part_of(row), {**results, "rows": []})
        part["rows"].append({k: v for k, v in row.items() if k not in ("variant", "pipeline")})
    return parts


def file_stem(name: str, variant: str) -> str:
    """``name-variant``, as a file may be called."""
    return "-".join(filter(None, [name, re.sub(r"\W+", "-", variant).strip("-")]))


def _marked(text: str, is_best: bool, separable: bool | None) -> str:
    """Bold: the best, by more than chance (or not known whether by more); italics: it, or not to be told from it."""
    if separable is False:
        return f"*{text}*"
    return f"**{text}**" if is_best else text


def _plain(rows: Sequence[Mapping[str, Any]], names: Sequence[str] | None, steps: Sequence[int] | None) -> str:
    columns = [k for k, v in rows[0].items() if not isinstance(v, (list, dict)) and (names is None or k in names)]
    shown = [row for row in rows if steps is None or row.get("num_inference_steps") in steps]
    if not shown or not columns:
        raise ValueError(f"Nothing was measured of metrics={names}, steps={steps}: there is {[*rows[0]]}.")
    return markdown([{k: "" if row[k] is None else row[k] for k in columns} for row in shown])


def number(row: Mapping[str, Any], metric: str) -> str:
    """A number and its interval, to the digits that the interval leaves certain: "0.0620 ±0.0021", half its width.

    One that is not symmetric, its halves further apart than a quarter, is written with its ends:
    "0.0093 (0.0041-0.0168)".
    """
    low, high = row["interval"][metric]
    half, value = (high - low) / 2, row[metric]
    digits = max(0, 1 - math.floor(math.log10(half))) if half > 0 else 4
    if half > 0 and abs(high + low - 2 * value) > half / 4:
        return f"{value:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
    return f"{value:.{digits}f} ±{half:.{digits}f}"


def _grid(rows: Sequence[Mapping[str, Any]], cells: Sequence[str]) -> str:
    columns = {row.get("nfe"): "" for row in rows}
    lines: dict[str, dict[str, str]] = {}
    for row, cell in zip(rows, cells):
        empty = {f"{nfe} NFE" if nfe else "": "" for nfe in columns}
        line = lines.setdefault(line_of(row), {"solver": line_of(row), **empty})
        line[f"{row['nfe']} NFE" if row.get("nfe") else ""] = cell
    return markdown([*lines.values()])


def _chosen(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which solvers the lines of a choice are, if there are any: "best classical: iPNDM(2M), rho 5 (3 NFE); ..."."""
    lines: dict[str, dict[str, list[str]]] = {}
    for row in (row for row in rows if "line" in row):
        own = lines.setdefault(row["line"], {})
        own.setdefault(row["solver"].removesuffix(f" ({row['line']})"), []).append(str(row["nfe"]))
    told = (
        (line, "; ".join(f"{name} ({', '.join(at)} NFE)" for name, at in own.items())) for line, own in lines.items()
    )
    return [f"{line}: {names}" for line, names in told]
