"""Table, SpanLift, TimeLift and all three together on both embedded pipelines, beside TimeLift's small form.

``dywspan eval --config examples/quality/NAME-timelift.yaml`` for each pipeline, with SpanLift on TimeLift, which
``make solvers`` learns and which does not ship; then the small form, learned here on the table. Re-run the command to
resume.

    python examples/studies/three_levers.py --output docs/results/timelift.json
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from small_form import learn, told
from subjects import ROOT, SUBJECTS, Subject
from torch import Tensor

from dywspan.distill.setup import TRAIN_SEED
from dywspan.evaluate.config import QualityConfig
from dywspan.evaluate.paired import kept_of, read_samples, with_pairs, write_samples
from dywspan.evaluate.quality import evaluate, run
from dywspan.evaluate.report import write_results
from dywspan.evaluate.statistics import numbers
from dywspan.evaluate.task import Task, prepare
from dywspan.pipelines.inputs import read_inputs
from dywspan.pipelines.pairs import make_pairs
from dywspan.pipelines.processes import device
from dywspan.schedulers.apply import load
from dywspan.settings import make_config

Kept = Mapping[str, Tensor]
NAME = "DyWeight + TimeLift, small form (learned)"
TRAIN = str(ROOT / "examples" / "prompts" / "emoji-train.txt")


def small_form(task: Task, subject: Subject, steps: int, updates: int) -> tuple[dict[str, Any], Kept]:
    """Learn TimeLift's small form on the shipped table and measure it as the others: its row and samples."""
    pipe, call, config = task.pipe, dict(subject.call), task.config
    inputs = read_inputs(TRAIN, limit=256) or []
    seeds = range(TRAIN_SEED, TRAIN_SEED + len(inputs))
    made = make_pairs(pipe, task.teacher, inputs, seeds, call=call, cache="build/pairs", model=task.model)
    scheduler = load(f"{subject.model}-solvers")
    paths, theta = learn(pipe, scheduler, steps, made, call, updates=updates)
    options: dict[str, Any] = {"cache": task.cache / "pairs", "model": task.model, "setting": "batch_size"}
    reference = make_pairs(pipe, task.teacher, task.inputs, task.seeds, call=call, **options)
    options = {"call": call, "batch_size": config.batch_size, "reference": reference}
    options |= {"layout": config.layout or "image", "title": f"{subject.name}, {NAME}, {steps}"}
    with told(pipe, paths, theta), torch.no_grad():
        values = evaluate(pipe, scheduler, steps, task.inputs, task.seeds, task.metrics, **options)
    row = {"solver": NAME, "learned": True, "scheduler": "DyWeightScheduler", "num_inference_steps": steps}
    row |= {"nfe": steps, "guidance_scale": 1.0, "numbers": theta.numel()}
    return row | numbers(task.metrics, values), kept_of(task.metrics, values)


def study(subject: Subject, small: Sequence[int], updates: int) -> tuple[list[dict[str, Any]], list[Kept], Any]:
    """All rows of a pipeline, what each sample adds to them, and what else the evaluation says.

    Raises:
        FileNotFoundError: SpanLift on TimeLift was not learned.
    """
    config = make_config({"config": ROOT / f"examples/quality/{subject.name}-timelift.yaml"}, QualityConfig)
    if not (together := Path("build") / f"{subject.name}-spanlift-timelift").exists():
        raise FileNotFoundError(f"{together} is missing: learn it with `make solvers-{subject.name}`.")
    config = replace(config, solvers=[*config.solvers, str(together)])
    results = run(config)
    rows: list[dict[str, Any]] = [*results["rows"]]
    kept: list[Kept] = [*read_samples(config.output, results["rows"], config.metrics)]
    if not small:
        return [{"pipeline": subject.name, **row} for row in rows], kept, results
    task = prepare(config, device())
    for steps in small:
        row, own = small_form(task, subject, steps, updates)
        rows.append(row)
        kept.append(own)
    order = sorted(range(len(rows)), key=lambda i: rows[i]["nfe"])  # stable
    rows, kept = [rows[i] for i in order], [kept[i] for i in order]
    paired = with_pairs(rows, kept, task.metrics)
    return [{"pipeline": subject.name, **row} for row in paired], kept, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=[*SUBJECTS])
    parser.add_argument("--small", nargs="*", type=int, default=[3], help="numbers of steps of the small form")
    parser.add_argument("--updates", type=int, default=120, help="of the small form")
    parser.add_argument("--output", default="build/studies/timelift.json")
    args = parser.parse_args()
    rows, kept, results = list[dict[str, Any]](), list[Kept](), dict[str, Any]()
    for name in args.subjects:
        own, samples, results[name] = study(SUBJECTS[name], args.small, args.updates)
        rows += own
        kept += samples
    first = results[args.subjects[0]]
    facts = {"metrics": first["metrics"], "reference": {n: r["reference"] for n, r in results.items()}}
    facts["settings"] = {n: r["settings"] for n, r in results.items()}
    write_results(args.output, rows, command=shlex.join(["python", *sys.argv]), **facts)
    write_samples(args.output, rows, kept)


if __name__ == "__main__":
    main()
