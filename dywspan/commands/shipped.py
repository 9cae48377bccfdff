"""What ships with the repository, not with the package."""

from __future__ import annotations

from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def check_here(*paths: str | Path) -> None:
    """What ships with the repository is here.

    Raises:
        FileNotFoundError: it is not.
    """
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(f"{path} is not here: run in a clone of the repository, or name it by an option.")
