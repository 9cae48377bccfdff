"""Solvers compared sample by sample, on the same prompts and noise: what that leaves of a difference of two numbers.

    difference = v(own) - v(other),   its interval from the samples' differences d_i = own_i - other_i

The noise that both share cancels: two solvers whose own intervals overlap can be apart on every single sample.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..artifact import write_atomically
from .statistics import Metric

Kept = Mapping[str, Tensor]  # by metric: what each sample adds to the number
Row = Mapping[str, Any]


def kept_of(metrics: Sequence[Metric], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By metric (N,) float32: each sample's own value where the number is their mean, else its influence.

    Args:
        values: by metric (N, D), the rows of all samples.
    """
    return {
        m.name: (values[m.name][:, 0] if m.influence is None else m.influence(values[m.name])).float() for m in metrics
    }


def difference(
    metric: Metric, own: Tensor, other: Tensor, value: float, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """How two solvers' numbers differ, with the interval that their samples leave.

    Quantiles of mean(d) over samples drawn again with replacement; by influences, ``value`` +- z sd(d) / sqrt(N).

    Args:
        own, other: (N,), see :func:`kept_of`, of the same prompts and noise.
        value: of the difference.
        level, resamples, seed: see :func:`.statistics.interval`.

    Returns:
        ``difference``, ``low`` and ``high``; where samples have values of their own also ``wins``, the share of samples
        on which the own one is better, ties counted by half, and ``median``, of the differences.

    Raises:
        ValueError: fewer than two samples, or not as many of one as of the other.
    """
    if own.shape != other.shape or len(own) < 2:
        raise ValueError(f"{metric.name} has {len(own)} and {len(other)} samples: compare the same ones, at least 2.")
    d, n = own.double() - other.double(), len(own)
    if metric.influence is not None:
        spread = NormalDist().inv_cdf((1 + level) / 2) * float(d.std()) / n**0.5
        return {"difference": value, "low": value - spread, "high": value + spread}
    draws = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    low, high = d[draws].mean(1).quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=d.dtype)).tolist()
    better = -d if metric.lower_is_better else d
    wins = float((better > 0).double().mean() + (better == 0).double().mean() / 2)
    return {"difference": value, "low": low, "high": high, "wins": wins, "median": float(d.median())}


def with_pairs(rows: Sequence[Row], kept: Sequence[Kept], metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """Rows with ``paired`` by metric: :func:`difference` to the best other solver at the same NFE, and ``against``, its
    name; learned solvers also with ``paired_classical``, the same to the best that was not learned.

    Args:
        kept: of each row, see :func:`kept_of`.
    """
    result = [dict(row) for row in rows]
    for m in metrics:
        better = min if m.lower_is_better else max
        for i, row in enumerate(rows):
            others = [
                j
                for j, other in enumerate(rows)
                if j != i
                and m.name in other
                and "reference" not in (other["solver"], row["solver"])
                and (part_of(other), other.get("nfe")) == (part_of(row), row.get("nfe"))
            ]
            rivals = {"paired": others}
            if row.get("learned"):
                rivals["paired_classical"] = [j for j in others if not rows[j].get("learned")]
            for name, among in rivals.items():
                if among:
                    j = better(among, key=lambda j: rows[j][m.name])
                    found = difference(m, kept[i][m.name], kept[j][m.name], row[m.name] - rows[j][m.name])
                    result[i].setdefault(name, {})[m.name] = {"against": rows[j]["solver"], **found}
    return result


def part_of(row: Row) -> str:
    """What rows are compared within: their variant of the call, or their pipeline where several are in one file."""
    return row.get("variant", row.get("pipeline", ""))


def line_of(row: Row) -> str:
    """The line of tables and plots that a row is in: its solver, or the choice that this solver was taken by."""
    return row.get("line", row["solver"])


def is_separable(row: Row, metric: str) -> bool | None:
    """Whether the interval of its difference to the best other solver leaves 0 out; None: it was not compared."""
    found = row.get("paired", {}).get(metric)
    return None if found is None else not found["low"] <= 0 <= found["high"]


def samples_file(path: str | os.PathLike[str]) -> Path:
    """Of results: where the samples' values lie."""
    return Path(path).with_suffix(".samples.safetensors")


def write_samples(path: str | os.PathLike[str], rows: Sequence[Row], kept: Sequence[Kept]) -> None:
    """Write what each sample adds to each number, beside the results, for statistics to be made again."""
    tensors = {_key(row, metric): values.contiguous() for row, own in zip(rows, kept) for metric, values in own.items()}
    write_atomically(samples_file(path), save(tensors))


def read_samples(path: str | os.PathLike[str], rows: Sequence[Row], metrics: Sequence[str]) -> list[dict[str, Tensor]]:
    """What :func:`write_samples` wrote of rows.

    Raises:
        OSError, KeyError: there is none, or not of these.
    """
    tensors = load(samples_file(path).read_bytes())
    return [{metric: tensors[_key(row, metric)] for metric in metrics if metric in row} for row in rows]


def _key(row: Row, metric: str) -> str:
    return "|".join(map(str, (part_of(row), row["solver"], row.get("nfe", ""), metric)))
