"""The comparison as people read it; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dywspan.text import markdown

Row = Mapping[str, Any]


def tables(rows: Sequence[Row], subject: str) -> str:
    """Markdown of one subject: errors by method and number of evaluations, and what they cost.

    An error is bold where it is below DyWeight's by more than chance, and in italics where the interval of their
    difference holds 0.

    Raises:
        ValueError: a subject that was not measured.
    """
    own = [row for row in rows if row["subject"] == subject]
    if not own:
        raise ValueError(f"{subject!r} was not measured: there is {sorted({row['subject'] for row in rows})}.")
    errors: dict[str, dict[str, Any]] = {}
    costs: dict[str, dict[str, Any]] = {}
    counts = sorted({row["nfe"] for row in own})
    for name in dict.fromkeys(row["method"] for row in own):
        by_count = {row["nfe"]: row for row in own if row["method"] == name}
        errors[name] = {"method": name, **{f"{n} NFE": _error(by_count.get(n)) for n in counts}}
        if any(row["parameters"] for row in by_count.values()):
            costs[name] = {"method": name, **_cost([*by_count.values()])}
    return f"{markdown([*errors.values()])}\n\n{markdown([*costs.values()])}"


def _error(row: Row | None) -> str:
    """ "**0.0507** (-0.0066, -0.0129 to -0.0015)"."""
    if row is None:
        return ""
    shown, found = f"{row['latent_rmse']:.4f}", row.get("paired")
    if found is None:
        return shown
    low, high = found["low"], found["high"]
    mark = "**" if high < 0 else "*" if low <= 0 else ""
    return f"{mark}{shown}{mark} ({found['difference']:+.4f}, {low:+.4f} to {high:+.4f})"


def _cost(rows: Sequence[Row]) -> dict[str, str]:
    """A value for each number of evaluations, or one where they are the same."""
    values = {
        "numbers": [f"{row['parameters']:,}" for row in rows],
        "pairs": [str(row["pairs"]) for row in rows],
        "calls in a row": [str(row["sequential"]) for row in rows],
        "evaluations to learn": [f"{row['evaluations']:,}" for row in rows],
        "seconds": [f"{row['seconds']:.0f}" for row in rows],
        "kept: rate (updates), of tries": [f"{row['lr']} ({row['updates']}), {len(row['tried'])}" for row in rows],
    }
    return {name: "; ".join(own if len({*own}) > 1 else own[:1]) for name, own in values.items()}
