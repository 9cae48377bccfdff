"""What a tuning is worth: solvers tuned on the spot beside the best classical solver, on samples of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..evaluate.metrics import latent_rmse
from ..evaluate.paired import difference
from ..pipelines.classical import Classical, asked_for, grids, of_diffusers, solvers_on
from ..pipelines.embeddings import remembered_prompts
from ..pipelines.pairs import Pairs, make_pairs
from ..pipelines.replay import Memo
from ..pipelines.rollout import Inputs
from ..pipelines.teacher import Teacher, find_teacher
from ..schedulers.apply import load
from ..schedulers.dyweight import DyWeightScheduler
from ..tuning.arena import Arena
from ..tuning.config import TuneConfig
from ..tuning.course import Outcome, tuning

SELECT = (8, 32)  # samples that all classical solvers are judged on, and those that the best ``FINALISTS`` of them are
FINALISTS = 8
SEED = 5 * 10**6  # of the first sample to select by; those to measure on follow


def tuned_rows(
    pipe: Any,
    subject: str,
    prompts: Sequence[Any] | str | None,
    fresh: Inputs,
    *,
    call: Mapping[str, Any],
    steps: Sequence[int],
    solvers: Sequence[str] = (),
    cache: str | Path | None = None,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """A row for each number of steps and solver: the best classical one, the tuned one, and artefacts.

    The classical solver is the best of all on all grids by the mean error of ``SELECT`` samples that are neither tuned
    nor measured on. Errors are latent rmse to 50 steps of iPNDM(2M).

    Args:
        prompts: to tune with, see :func:`dywspan.tune`.
        fresh: inputs to select by, then those to measure on.
        solvers: artefacts to measure as well.
        cache: directory of the reference's samples.

    Returns:
        ``subject``, ``nfe``, ``solver``, ``latent_rmse``, ``median``; of the tuned one ``paired``, to the classical
        solver, ``evaluations`` and ``seconds``; of all but it ``paired_tuned``, how the tuned one differs from it.
    """
    reference = find_teacher(pipe, "ipndm", 50)
    seeds = range(SEED, SEED + len(fresh))
    pairs = make_pairs(pipe, reference, fresh, seeds, call=call, cache=cache)
    artefacts = {Path(name).name: load(name) for name in solvers}
    for n in steps:
        with tuning(pipe, TuneConfig(steps=[n], prompts=_plain(prompts), call=dict(call), seed=seed)) as course:
            (outcome,), teacher = course.run(), course.teacher
        with arena_of(pipe, pairs, call) as arena:
            own, places = DyWeightScheduler.from_config(pipe.scheduler), range(SELECT[1], len(fresh))
            rival = best_classical(pipe, arena, n)
            measured = {f"{rival.name} (best classical)": own.with_tables([rival.table])}
            measured["tuned"] = own.with_tables([outcome.table])
            measured |= {name: scheduler for name, scheduler in artefacts.items() if n in scheduler.tables}
            errors = {name: arena.errors(scheduler, n, places) for name, scheduler in measured.items()}
        yield from _rows(subject, n, errors, outcome, teacher)


def best_classical(pipe: Any, arena: Arena, n: int) -> Classical:
    """By the mean error on the first samples."""
    own, among = DyWeightScheduler.from_config(pipe.scheduler), all_classical(pipe, arena, n)
    for count, kept in zip(SELECT, (FINALISTS, 1)):
        errors = {i: arena.errors(own.with_tables([c.table]), n, range(count)) for i, c in enumerate(among)}
        among = [among[i] for i in sorted(errors, key=lambda i: float(errors[i].mean()))[:kept]]
    return among[0]


def all_classical(pipe: Any, arena: Arena, n: int) -> list[Classical]:
    """All solvers on all grids that fit."""
    scheduler, request = asked_for(pipe, n, arena.inputs, arena.call)
    among = [c for name, grid in grids(pipe, scheduler, request).items() for c in solvers_on(grid, name, request)]
    return among + of_diffusers(pipe, scheduler, request)


def _plain(prompts: Any) -> Any:
    return list(prompts) if isinstance(prompts, tuple) else prompts


@contextmanager
def arena_of(pipe: Any, pairs: Pairs, call: Mapping[str, Any]) -> Iterator[Arena]:
    """Samples whose targets are known, each prompt encoded once."""
    memo = Memo(pipe)
    with TemporaryDirectory() as folder, remembered_prompts(pipe, Path(folder)), memo.installed(), torch.no_grad():
        arena = Arena(pipe, pairs.inputs, pairs.seeds, call, memo)
        arena.targets.update(enumerate(pairs.endpoints))
        yield arena


def _rows(
    subject: str, n: int, errors: Mapping[str, Tensor], outcome: Outcome, teacher: Teacher
) -> Iterator[dict[str, Any]]:
    tuned, rival = errors["tuned"], next(iter(errors))
    for name, own in errors.items():
        row = {"subject": subject, "nfe": n, "solver": name}
        row |= {"latent_rmse": float(own.mean()), "median": float(own.median()), "samples": len(own)}
        if name == "tuned":
            found = difference(latent_rmse(), own, errors[rival], float((own - errors[rival]).mean()))
            row |= {"paired": {"against": rival, **found}, "start": outcome.classical.name, "kept": outcome.learned}
            row |= {"evaluations": sum(outcome.evaluations.values()), **outcome.evaluations}
            row |= {"teacher_steps": teacher.num_inference_steps, "seconds": round(outcome.seconds, 1)}
        else:
            row["paired_tuned"] = difference(latent_rmse(), tuned, own, float((tuned - own).mean()))
        yield row
