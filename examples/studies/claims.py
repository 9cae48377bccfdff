"""What the studies share: a paper's claim as comparisons that hold or do not, and the file they are written to."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dywspan.evaluate.report import write_results
from dywspan.text import markdown


def claim(text: str, comparisons: Iterable[tuple[Any, float, float]]) -> dict[str, Any]:
    """How many comparisons hold.

    Args:
        comparisons: of each what it is of, the value that is claimed to be lower, and the other.

    Raises:
        ValueError: there is nothing to compare.
    """
    compared = [*comparisons]
    if not compared:
        raise ValueError(f"Nothing to compare for {text!r}: measure at least two of what it compares.")
    wrong = [f"{of}: {low:.3g} and {high:.3g}" for of, low, high in compared if not low < high]
    return {"claim": text, "holds": len(compared) - len(wrong), "of": len(compared), "exceptions": wrong}


def report(output: str | Path, rows: Sequence[Mapping[str, Any]], claims: Sequence[Mapping[str, Any]], **facts: Any):
    """Write the rows and the claims as JSON, and print the claims."""
    command = shlex.join(["python", *sys.argv])
    write_results(output, rows, command=command, claims=claims, **facts)
    shown = [
        {
            "claim": c["claim"],
            "holds": f"{c['holds']} of {c['of']}",
            "first exception": next(iter(c["exceptions"]), ""),
        }
        for c in claims
    ]
    print(markdown(shown))
