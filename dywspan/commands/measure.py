"""``dywspan demo`` and ``dywspan eval``, which is ``dywspan bench quality`` too."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

from .shipped import EXAMPLES, check_here

# What `dywspan eval --help` shows, and then what --help-advanced adds.
EVALUATE = {
    "what is measured": ("model solvers steps metrics images", "metric_options base revision"),
    "samples": (
        "prompts guidance_scale call samples",
        "variants prompt_column prompt_split repeat_prompts seed",
    ),
    "reference": ("teacher teacher_steps", "teacher_order teacher_grid"),
    "time and memory": ("dtype mixed_precision batch_size cache", "layout latent_size"),
    "results": ("output pictures", "picture_steps columns"),
}


def demo_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan demo``."""
    parser.set_defaults(run=demo)
    parser.add_argument("--model", default=EXAMPLES / "emoji-sd", help="pipeline: a directory or a Hub id")
    parser.add_argument("--solvers", help="DyWeight artefact; default: the model's name and -solvers")
    parser.add_argument("--spanlift", help="SpanLift artefact; default: the model's name and -spanlift, if it exists")
    parser.add_argument("--prompts", default=EXAMPLES / "prompts" / "emoji-held-out.txt", help="file, a prompt a line")
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 5, 7], help="numbers of steps to compare at")
    parser.add_argument("--samples", type=int, default=48, help="prompts the table is measured on")
    parser.add_argument("--columns", type=int, default=10, help="prompts the picture shows")
    parser.add_argument("--guidance-scale", type=float, help="default: what the solvers were learned for")
    parser.add_argument("--output", default="demo.png", help="the picture")
    parser.add_argument("--json", help="also write the table here")


def demo(args: argparse.Namespace) -> None:
    """Learned and classical solvers beside a 50-step reference: a picture and a table."""
    import torch

    from ..artifact import shown_tables
    from ..evaluate.baselines import BASELINES, find_solvers, make_cell
    from ..evaluate.compare import compare, summary
    from ..evaluate.report import write_results
    from ..pipelines.pairs import make_pairs
    from ..pipelines.rollout import load_pipeline, sample
    from ..pipelines.teacher import Teacher
    from ..plot import picture
    from ..schedulers.apply import load
    from ..schedulers.bind import bind
    from ..text import markdown

    learned, lifted = args.solvers or f"{args.model}-solvers", args.spanlift or f"{args.model}-spanlift"
    check_here(args.model, learned)
    pipe, tables = bind(load_pipeline(str(args.model))), shown_tables(load(learned))
    call = dict(next(iter(tables.values())).provenance.get("call", {}))  # what it was learned for
    if args.guidance_scale is not None:
        call["guidance_scale"] = args.guidance_scale
    prompts = _lines(args.prompts, args.samples)
    inputs, seeds = [{"prompt": prompt} for prompt in prompts], range(len(prompts))
    teacher = Teacher(BASELINES["iPNDM(2M)"][0](pipe, 50), 50)
    reference = make_pairs(pipe, teacher, inputs, seeds, call=call)
    artefacts = [str(path) for path in (learned, lifted) if Path(path).exists()]
    solvers = find_solvers(["DDIM", "Euler", "DPM-Solver++(2M)", "UniPC", "iPNDM(2M)", *artefacts])
    results = []
    for n in args.steps:
        fitting = {}
        for solver in solvers:
            with contextlib.suppress(ValueError):  # not for this kind of pipeline, or not learned for n steps
                fitting[solver.name] = make_cell(pipe, solver, n, inputs[0], call).scheduler
        results += compare(pipe, fitting, [n], reference, call=call)

    hard = next(r for r in results if r.solver == "iPNDM(2M)")
    shown = sorted(range(len(prompts)), key=lambda i: -hard.errors[i])[: args.columns]
    with torch.no_grad():
        _, output = sample(pipe, teacher.scheduler, 50, [inputs[i] for i in shown], shown, call, decode=True)
    sheet = [("reference, 50 steps", output.images)]
    for n in args.steps:
        sheet.append(("", []))
        at_n = [r for r in results if r.num_inference_steps == n]
        sheet += [(f"{r.solver}, {n}", [r.images[i] for i in shown]) for r in at_n]
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    picture(sheet, [prompts[i] for i in shown]).save(args.output)

    rows = [r.row() for r in results]
    print(f"\nDistance to the 50-step reference (iPNDM), {len(prompts)} prompts, every solver on the same noise:")
    print("latent MSE / 1000 x feature distance / seconds per image\n")
    print(markdown(summary(rows)))
    print(f"\nPicture: {args.output}, of the prompts on which {hard.solver} errs most at {args.steps[0]} steps")
    if args.json:
        write_results(args.json, rows)


def evaluate_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan eval``."""
    from ..evaluate.config import QualityConfig
    from ..settings import add_arguments

    parser.set_defaults(run=evaluate)
    parser.usage = "%(prog)s --model MODEL --solvers SOLVER ... [options]"
    add_arguments(parser, QualityConfig, EVALUATE)


def evaluate(args: argparse.Namespace) -> None:
    """Measure solvers, or images already there, by any metrics: a table and a JSON file. Stopped, it goes on."""
    from ..evaluate.config import QualityConfig
    from ..evaluate.quality import run
    from ..settings import make_config

    run(make_config({k: v for k, v in vars(args).items() if k != "run"}, QualityConfig))


def _lines(path: str | os.PathLike[str], count: int) -> list[str]:
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < count:
        raise ValueError(f"{path} has {len(lines)} prompts, {count} are needed: add some, or lower --samples.")
    return lines[:count]
