"""Numbers of steps, and tables, as texts; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of rows with the same keys."""
    table = [list(rows[0]), *([f"{v:.4f}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows)]
    widths = [max(len(line[j]) for line in table) for j in range(len(table[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in table]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def counts(steps: Iterable[int], function: bool = False) -> str:
    """Numbers of steps, and all others where a function has them: "3, 5 and any other number of"; "" for none."""
    text = ", ".join(map(str, sorted(steps)))
    return text if not function else f"{text} and any other number of" if text else "any number of"
