"""Solvers that differ in a few settings of ``dywspan distill``, learned one after the other and measured together."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from subjects import ROOT, SUBJECTS, Subject

from dywspan import DyWeightScheduler, SpanLiftScheduler
from dywspan.distill.config import DistillConfig
from dywspan.distill.trainer import run
from dywspan.evaluate.metrics import latent_rmse
from dywspan.evaluate.paired import difference
from dywspan.evaluate.rivals import judging
from dywspan.pipelines.inputs import read_inputs
from dywspan.pipelines.pairs import make_pairs
from dywspan.pipelines.rollout import load_pipeline
from dywspan.pipelines.teacher import find_teacher
from dywspan.settings import make_config

Lines = Mapping[str, Mapping[str, Any]]  # by name: the settings in which a run differs from its file
SEED = 9 * 10**6  # of the first sample that is measured, far from all that are learned from
TEACHER = ("ipndm", 100)  # that all are measured by, whatever they learned from


def arguments(doc: str | None, name: str, steps: int) -> argparse.ArgumentParser:
    """A parser of the options that these studies share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=[*SUBJECTS])
    parser.add_argument("--steps", type=int, default=steps, help="of all solvers")
    parser.add_argument("--lines", nargs="+", help="only these; default: all")
    parser.add_argument("--updates", type=int, help="of each run; default: its file's")
    parser.add_argument("--pairs", type=int, help="to learn from; default: the file's")
    parser.add_argument("--samples", type=int, default=128, help="to measure on")
    parser.add_argument("--folder", type=Path, default=Path("build/studies") / name, help="of the artefacts")
    parser.add_argument("--output", default=f"build/studies/{name}.json")
    parser.add_argument("--plot", type=Path, help="draw the errors here (PNG, SVG or PDF)")
    return parser


def study(args: argparse.Namespace, kind: str, lines: Callable[[Subject, int], Lines]) -> list[dict[str, Any]]:
    """Learn every line, resume it, or find it finished; then measure all. Re-run the command to resume.

    Args:
        kind: "dyweight" or "spanlift", whose configuration the lines differ from.

    Returns:
        A row for each subject and line: ``latent_rmse`` and its ``median``, ``paired`` to the first line, ``seconds``
        of this run's learning; of SpanLift ``base_rmse`` and ``paired_base``, how it differs from its base.

    Raises:
        ValueError: a line that there is not.
    """
    rows: list[dict[str, Any]] = []
    for subject in (SUBJECTS[name] for name in args.subjects):
        known = lines(subject, args.steps)
        if unknown := {*(args.lines or ())} - {*known}:
            raise ValueError(f"--lines {sorted(unknown)} are not among {[*known]}.")
        solvers: dict[str, DyWeightScheduler] = {}
        seconds: dict[str, float] = {}
        for name in args.lines or known:
            config = settings(args, kind, subject, name, known[name])
            print(f"{subject.name}, {name}: {dict(known[name])}")
            started = time.perf_counter()
            solvers[name] = run(config)
            seconds[name] = round(time.perf_counter() - started, 1)
        for row in measured(subject, solvers, args.steps, args.samples):
            rows.append({"subject": subject.name, "seconds": seconds[row["line"]], **row})
    return rows


def settings(
    args: argparse.Namespace, kind: str, subject: Subject, name: str, line: Mapping[str, Any]
) -> DistillConfig:
    """Those of the file, of the command line, and of the line, each before those of the one before."""
    own: dict[str, Any] = {"config": ROOT / "training/configs" / f"{subject.name.replace('-', '_')}_{kind}.yaml"}
    own |= {"model": subject.model, "steps": [args.steps], "cache": "build/pairs", "pictures": 0}
    own |= {key: getattr(args, key) for key in ("updates", "pairs") if getattr(args, key)}
    return make_config(
        {**own, **line, "output": str(args.folder / subject.name / f"{name}-{args.steps}")}, DistillConfig
    )


def measured(
    subject: Subject, solvers: Mapping[str, DyWeightScheduler], steps: int, samples: int
) -> list[dict[str, Any]]:
    """A row for each solver, see :func:`study`."""
    pipe, seeds = load_pipeline(subject.model), range(SEED, SEED + samples)
    inputs = read_inputs(subject.held_out, limit=samples) or []
    pairs = make_pairs(
        pipe, find_teacher(pipe, *TEACHER), inputs, seeds, call=subject.call, cache="build/studies/pairs"
    )
    with judging(pipe, pairs, subject.call) as arena:
        errors = {name: arena.errors(solver, steps, range(samples)) for name, solver in solvers.items()}
        bases = {name: DyWeightScheduler.from_config(s.config) for name, s in solvers.items() if _lifts(s)}
        before = {name: arena.errors(base, steps, range(samples)) for name, base in bases.items()}
    first, metric, rows = next(iter(errors)), latent_rmse(), list[dict[str, Any]]()

    def compared(a: Any, b: Any) -> dict[str, Any]:
        return difference(metric, a, b, float((a - b).mean()))

    for name, own in errors.items():
        row: dict[str, Any] = {"line": name, "num_inference_steps": steps, "samples": samples}
        row |= {"latent_rmse": float(own.mean()), "median": float(own.median())}
        if name != first:
            row["paired"] = {"against": first, **compared(own, errors[first])}
        if name in before:
            row |= {"base_rmse": float(before[name].mean()), "paired_base": compared(own, before[name])}
        rows.append(row)
    return rows


def _lifts(solver: Any) -> bool:
    return isinstance(solver, SpanLiftScheduler)


def better(rows: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[str, str]]) -> list[tuple[str, float, float]]:
    """Comparisons of lines for a claim: of each subject the error of the one that should be better, and the other's."""
    errors = {(row["subject"], row["line"]): row["latent_rmse"] for row in rows}
    found = [(s, a, b) for s in dict.fromkeys(r["subject"] for r in rows) for a, b in pairs]
    kept = [(s, a, b) for s, a, b in found if (s, a) in errors and (s, b) in errors]
    return [(f"{s}: {a} and {b}", errors[s, a], errors[s, b]) for s, a, b in kept]
