"""What a person sees of a tuning: a line for each number of steps, a card, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..distill.card import write_card
from ..distill.pictures import draw_samples, sample_images
from ..text import markdown
from .config import TuneConfig
from .course import Course, Outcome


def line(outcome: Outcome) -> dict[str, Any]:
    """One row: errors are latent rmse to the teacher's endpoints, on the held-out samples."""
    paired, errors = outcome.paired, outcome.errors
    return {
        "steps": outcome.steps,
        "best classical solver": outcome.classical.name,
        "its error": f"{float(errors['classical'].mean()):.4f}",
        "tuned": f"{float(errors['tuned'].mean()):.4f}",
        "difference (95 %)": f"{paired['difference']:+.4f} ({paired['low']:+.4f} to {paired['high']:+.4f})",
        "better on": f"{paired['wins']:.0%}",
        "evaluations": sum(outcome.evaluations.values()),
        "seconds": f"{outcome.seconds:.0f}",
        "kept": "tuned" if outcome.learned else "classical",
    }


def said(outcomes: Sequence[Outcome]) -> str:
    """All rows, and what they mean."""
    text = [markdown([line(own) for own in outcomes])]
    for own in outcomes:
        if not own.learned:
            text.append(
                f"{own.steps} steps: learning did not beat {own.classical.name} on samples held out, so that solver is "
                f"kept. More evaluations than {sum(own.evaluations.values())}, or more pairs, may."
            )
    return "\n".join(text)


def save(scheduler: Any, course: Course, outcomes: Sequence[Outcome], model: str) -> None:
    """The solver, its card, and a picture for each number of steps, into the configured directory."""
    config = course.config
    assert config.output is not None
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    scheduler.save_pretrained(output)
    for own in outcomes:
        _draw(course, own, output / f"samples-{own.steps}.png")
    write_card(scheduler, output, _settings(config, model), course.arena.inputs[0])


def _settings(config: TuneConfig, model: str) -> Mapping[str, Any]:
    """As a card names them."""
    return asdict(config) | {"model": model, "variants": {}, "push_to_hub": None}


def _draw(course: Course, outcome: Outcome, path: Path) -> None:
    """The teacher's samples, the classical solver's and the kept one's, of held-out inputs."""
    places = course.held_out[: course.config.pictures]
    inputs, seeds = [course.arena.inputs[i] for i in places], [course.arena.seeds[i] for i in places]
    n, teacher = outcome.steps, course.teacher
    solvers: dict[str, tuple[Any, int]] = {
        f"teacher, {teacher.num_inference_steps} steps": (teacher.scheduler, teacher.num_inference_steps),
        f"{outcome.classical.name}, {n}": (course.own.with_tables([outcome.classical.table]), n),
    }
    if outcome.learned:
        solvers[f"tuned, {n}"] = course.own.with_tables([outcome.table]), n
    call = course.config.call
    rows = {k: sample_images(course.pipe, own, steps, inputs, seeds, call) for k, (own, steps) in solvers.items()}
    if inputs and all(images is not None for images in rows.values()):
        draw_samples(rows, inputs, path)
