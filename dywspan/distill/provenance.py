"""Where a solver comes from: what its artefact records of the task, the errors and the cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..pipelines.pairs import Pairs, common_path
from ..version import __version__
from .config import OPTIMIZERS
from .task import Call, Task

Cost = Mapping[str, int | float]


def provenance(task: Task, peak_rate: float, errors: Mapping[str, Any], cost: Cost) -> dict[str, Any]:
    """What a reader wants to know of a solver, and what its numbers can be made again from.

    Args:
        peak_rate: the learning rate.
        errors: losses before and after learning, "held_out_error" and perhaps "test_error".
        cost: denoiser evaluations by purpose, those a step of one sample takes, and seconds.
    """
    pipe, config, teacher, terms = task.pipe, task.config, task.teacher, task.terms
    by_variant = {term.variant: term for term in terms if term.whole is None}
    kept = sum(len(term.train) for term in by_variant.values() if isinstance(term.train, Pairs))
    held_out = sum(len(term.held_out) for term in by_variant.values())
    drawn = (config.number("updates") + (config.optimizer not in OPTIMIZERS)) * config.batch_size  # and one to try on
    shared, *calls = [_plain(term.call) for term in by_variant.values()]
    call = {k: v for k, v in shared.items() if all(k in other and other[k] == v for other in calls)}
    variants = {
        name: {k: v for k, v in _plain(term.call).items() if k not in call} for name, term in by_variant.items() if name
    }
    return {
        "base_model": str(getattr(pipe, "name_or_path", "")),
        "pipeline": type(pipe).__name__,
        "call": call,
        **({"variants": variants} if variants else {}),
        "latent_shape": list(terms[0].held_out.endpoints.shape[1:]),
        "teacher": teacher.summary(),
        "loss": getattr(task.loss, "__name__", type(task.loss).__name__),
        "learning": {**config.learning, "lr": peak_rate},
        "pairs": {"train": kept or drawn, "held_out": held_out},
        **{kind: dict(own) for kind, own in errors.items()},
        "evaluations": _evaluations(task, kept + held_out, cost),
        "dywspan_version": __version__,
    }


def _evaluations(task: Task, pairs: int, cost: Cost) -> dict[str, int | float]:
    """Of the denoiser, by purpose; the teacher's are its steps times what a step of the student takes."""
    steps, per_step, found = pairs * task.teacher.num_inference_steps, cost["per_step"], dict(cost)
    del found["per_step"]
    if late := [term for term in task.terms if term.whole is not None]:  # all from the same paths
        common, substeps = common_path((t.whole for t in late if t.whole is not None), task.teacher.num_inference_steps)
        samples = sum(len(pairs) for pairs in (late[0].train, late[0].held_out) if isinstance(pairs, Pairs))
        steps += samples * common * substeps
    spent: dict[str, int | float] = {"teacher": round(steps * per_step), **found}
    for n, own in task.paths.items():  # teachers at least as fine as the other one, and N samplings of 1 to N steps
        spent["teacher"] += round(per_step * len(own) * n * -(-task.teacher.num_inference_steps // n))
        spent["regression"] = spent.get("regression", 0) + round(per_step * len(own) * n * (n + 1) / 2)
    return spent


def _plain(call: Call) -> dict[str, Any]:
    """What a provenance can hold of it."""
    return {k: v for k, v in call.items() if isinstance(v, (int, float, str, bool))}
