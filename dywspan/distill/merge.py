"""Solvers learned apart, in one folder: ``dywspan merge A B -o OUT``."""

from __future__ import annotations

import inspect
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..artifact import provenances
from ..pipelines.rollout import pipeline_class
from ..schedulers.apply import load
from ..schedulers.dyweight import DyWeightScheduler
from ..schedulers.merge import merge
from .card import write_card
from .output import SPARE, locked


def merge_artefacts(
    sources: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]
) -> tuple[DyWeightScheduler, list[str]]:
    """One artefact of several, see :func:`dywspan.schedulers.merge.merge`, with a card that names them.

    Args:
        sources: folders or Hub ids.
        output: a folder that is new, empty, or one of the sources, to which the others are added.

    Returns:
        The solver, and a line for each number of steps that a later source has replaced.

    Raises:
        ValueError: solvers that do not belong together, or an output that holds something else.
        OSError: files that cannot be read or written.
    """
    places = [Path(source).resolve() for source in sources]
    if twice := sorted({str(s) for s, place in zip(sources, places) if places.count(place) > 1}):
        raise ValueError(f"{twice} is named twice: name each solver once.")
    output = Path(output)
    within = output.resolve() in places
    if output.exists() and not within and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} is there already and none of the sources: choose a new or empty folder.")
    result, told = merge({str(source): load(source) for source in sources})
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=output.parent) as folder:
        made = Path(folder) / output.resolve().name
        result.save_pretrained(made)
        for source in filter(Path.is_dir, map(Path, sources)):
            for picture in source.glob("samples-*.png"):
                shutil.copyfile(picture, made / picture.name)
        write_card(result, made, settings_of(result), sources=[str(source) for source in sources])
        if not within:
            if output.exists():
                output.rmdir()
            made.rename(output)
            return result, told
        with locked(output):
            # As a run does: whenever this is killed, one of the folders is whole. The configuration comes last.
            result.save_pretrained(output / SPARE)
            for file in sorted(made.iterdir(), key=lambda file: file.name == DyWeightScheduler.config_name):
                os.replace(file, output / file.name)
    return result, told


def settings_of(scheduler: Any) -> dict[str, Any]:
    """Of the runs, as far as their provenances say: what a card shows of the use."""
    made: list[Any] = [*provenances(scheduler).values()]
    first = made[0] if made else {}
    call = first.get("call", {})
    call = {k: v for k, v in call.items() if all(other.get("call", {}).get(k) == v for other in made)}
    kind = pipeline_class(str(first.get("pipeline")))
    has_prompts = kind is None or "prompt" in inspect.signature(kind.__call__).parameters
    model = first.get("base_model") or "the model they were learned on"
    return {"model": model, "prompts": [] if has_prompts else None, "call": call, "variants": {}, "push_to_hub": None}
