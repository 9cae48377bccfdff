"""Pipelines and artefacts on this machine: in a clone's examples, in the Hub's cache, in directories. No torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .text import counts

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"  # ships with the repository, not with the package
CONFIG = "scheduler_config.json"


def check_here(*paths: str | Path) -> None:
    """What ships with the repository is here.

    Raises:
        FileNotFoundError: it is not.
    """
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(f"{path} does not exist: run in a clone of the repository, or name another model.")


def pipelines() -> list[str]:
    """The directories of the pipelines in a clone's examples."""
    return [shown(file.parent) for file in sorted(EXAMPLES.glob("*/model_index.json"))]


def artefacts(directories: Sequence[str] = (), cached: bool = True) -> list[dict[str, str]]:
    """A row for each artefact in a clone's examples, in directories and below, and in the Hub's cache.

    Configurations are read as they are. Those that cannot be read are named on stderr.

    Returns:
        Rows of ``artefact``, ``class``, ``model`` and ``for``.

    Raises:
        NotADirectoryError: there is no such directory.
    """
    for directory in directories:
        if not Path(directory).is_dir():
            raise NotADirectoryError(f"{directory} is not a directory: name one that holds artefacts.")
    found: dict[Path, str] = {}  # what each configuration is called
    for folder in (EXAMPLES, *map(Path, directories)):
        for file in sorted(folder.rglob(CONFIG)):
            if not any(part.startswith(".") for part in file.relative_to(folder).parts):  # a run's spare copies
                found.setdefault(file.resolve(), shown(file.parent))
    found |= dict(_cached()) if cached else {}
    return [{"artefact": name, **row} for file, name in found.items() if (row := _row(file))]


def shown(folder: Path) -> str:
    """A folder as a user would type it here."""
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def _cached() -> Iterator[tuple[Path, str]]:
    """Configurations in the Hub's cache: of each repository those of the newest revision there."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda r: r.repo_id):
        newest = max(repository.revisions, key=lambda r: r.last_modified, default=None)
        for file in sorted(newest.files, key=lambda f: f.file_path) if newest else ():
            if file.file_name == CONFIG:
                inner = file.file_path.parent.relative_to(newest.snapshot_path).as_posix()  # type: ignore[union-attr]
                yield file.file_path, repository.repo_id + ("" if inner == "." else f", subfolder {inner}")


# By class, where its numbers of steps are, and its function of every number of them.
_PARTS = {"DyWeightScheduler": ("tables", "continuous"), "SpanLiftScheduler": ("lifts", "continuous_lift")}


def _row(file: Path) -> dict[str, str] | None:
    """Class, model and numbers of steps of a configuration; None if it is not of a solver of ours."""
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
        kind = config.get("_class_name")
        if kind not in _PARTS:
            return None
        own, function, late = (config.get(part) or {} for part in (*_PARTS[kind], "time_lifts"))
        provenances = [part.get("provenance") or {} for part in (*own.values(), *late.values(), function)]
        models = {str(provenance["base_model"]) for provenance in provenances if provenance.get("base_model")}
        steps = counts(map(int, own), bool(function)) or "any number of"
        use = f"{steps} steps" + (f", TimeLift for {counts(map(int, late))}" if late else "")
    except (AttributeError, OSError, TypeError, ValueError) as error:
        print(f"dywspan: {file} cannot be read: {error}", file=sys.stderr)
        return None
    return {"class": kind, "model": ", ".join(sorted(models)) or "not said", "for": use}
