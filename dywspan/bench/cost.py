"""What learning a solver costs: the denoiser evaluations it took and the error they reached, by optimizer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artifact import provenances
from ..distill.config import DistillConfig
from ..distill.split import split_inputs
from ..distill.trainer import run
from ..pipelines.hashes import digest
from ..settings import make_config

# What one is spent on, and the counts of a provenance that it is made of.
PARTS = {
    "teacher": ("teacher", "fresh"),
    "learning": ("regression", "student", "jacobian", "backward"),
    "held_out": ("held_out",),
}
# Errors are only compared where these agree: the same pipeline, the same held-out pairs, the same loss.
_SAME = (
    *("model", "revision", "dtype", "call", "teacher", "teacher_steps", "teacher_order", "teacher_grid"),
    *("held_out", "test", "path_substeps", "loss", "features", "latent_weight"),
)


def learning_cost(paths: Sequence[str | os.PathLike[str]], **overrides: Any) -> list[dict[str, Any]]:
    """Run each configuration, resume it, or find it finished, and say what it cost.

        evaluations = teacher + learning + held_out,        learning = forward + backward passes

    One evaluation is one sample in one call of the denoiser, guidance's second sample being another. Every row has the
    cost it would have alone: teacher pairs that several numbers of steps share are counted in each of their rows; what
    numbers of steps that are learned together take, they take together. A base that SpanLift lifts is not counted. What
    a killed run repeats is not counted again, and pairs from a cache are, as in a run from nothing.

    Two counts are no measurements: the teacher's, its steps times what a step of the student takes (too few where it
    takes two evaluations a step), and backward passes, one for each forward pass (SpanLift's first one needs none).

    Args:
        paths: YAML files of settings for ``dywspan distill``, each with an output of its own.
        overrides: settings of all of them.

    Returns:
        A row for every configuration and number of steps: ``optimizer``, ``num_inference_steps``, ``pairs``,
        ``evaluations`` and its three parts, ``held_out_error``, ``test_error`` (None without ``test``; that is
        not counted), ``evaluations_to_match`` (the least after which it had reached what the best of the other
        optimizers ended at; None if it never had, or there is none), ``seconds``, ``config`` (the file's name) and
        ``curve``: ``[[evaluations, held_out_error], ...]``, teacher pairs included, whenever the solver was the best so
        far. The curve's first and last errors are in the pipeline's own precision, those between in that of learning.

    Raises:
        ValueError, OSError: settings that cannot work, or whose errors cannot be compared.
    """
    configs = {Path(path).name: make_config({**overrides, "config": path}, DistillConfig) for path in paths}
    _check(configs, len(paths))
    rows = [row for name, config in configs.items() for row in _rows(name, config)]
    for row in rows:
        others = [
            other["held_out_error"]
            for other in rows
            if other["num_inference_steps"] == row["num_inference_steps"] and other["optimizer"] != row["optimizer"]
        ]
        reached = (spent for spent, error in row["curve"] if others and error <= min(others))
        row["evaluations_to_match"] = next(reached, None)
    return rows


def plot(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Held-out error over evaluations, both logarithmic: a panel a number of steps, a line a configuration."""
    from matplotlib import pyplot, ticker

    counts = sorted({row["num_inference_steps"] for row in rows})
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["config"] for row in rows))}
    size = 1 + 3.2 * len(counts), 3.8
    figure, axes = pyplot.subplots(1, len(counts), figsize=size, squeeze=False, layout="constrained")
    lines: dict[str, Any] = {}
    for n, panel in zip(counts, axes[0]):
        for row in (row for row in rows if row["num_inference_steps"] == n):
            x, y = zip(*row["curve"])
            label = f"{row['optimizer']}, {row['pairs']} pairs ({row['config']})"
            style: dict[str, Any] = {"color": colors[row["config"]], "drawstyle": "steps-post", "ms": 4}
            (lines[label],) = panel.plot(x, y, "o-", **style)
        panel.set(title=f"{n} steps", xscale="log", yscale="log")
        panel.grid(alpha=0.25, which="both", lw=0.5)
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())  # they would overlap
        panel.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("held-out error")
    figure.supxlabel("evaluations of the network until then, the teacher's included", fontsize="medium")
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _check(configs: Mapping[str, DistillConfig], count: int) -> None:
    outputs = {Path(config.output).resolve() for config in configs.values()}
    if len(configs) < count or len(outputs) < count:
        raise ValueError(f"{[*configs]} must be {count} files with names of their own, and each its own output.")
    if any(config.dry_run for config in configs.values()):
        raise ValueError("dry_run=True learns nothing that could be measured: leave it out.")
    if any(config.variants for config in configs.values()):
        raise ValueError("Costs are compared for one call: leave out variants.")
    facts = {
        name: {key: getattr(config, key) for key in _SAME} | {"held_out_prompts": digest(split_inputs(config)[1])}
        for name, config in configs.items()
    }
    first, *others = facts
    for name in others:
        if wrong := [key for key, value in facts[name].items() if value != facts[first][key]]:
            raise ValueError(
                f"{name} differs from {first} in {wrong}, so that their errors cannot be compared: set them alike. "
                "Without held_out_prompts, held-out inputs are those after the first `pairs` ones."
            )


def _rows(name: str, config: DistillConfig) -> list[dict[str, Any]]:
    made, rows = provenances(run(config)), []
    for n in config.steps:
        spent, error = made[n]["evaluations"], made[n]["held_out_error"]
        parts = {p: sum(spent.get(key, 0) for key in keys) for p, keys in PARTS.items()}
        evaluations = sum(parts.values())
        before = spent["teacher"] + spent.get("regression", 0)
        curve = [[before + at, value] for at, value in zip(*error["curve"]) if before + at < evaluations]
        row = {"optimizer": config.optimizer, "num_inference_steps": n, "pairs": made[n]["pairs"]["train"]}
        row |= {"evaluations": evaluations, **parts, "held_out_error": error["after"], "evaluations_to_match": None}
        row["test_error"] = made[n].get("test_error", {}).get("after")
        row |= {"seconds": spent["seconds"], "config": name, "curve": [*curve, [evaluations, error["after"]]]}
        rows.append(row)
    return rows
