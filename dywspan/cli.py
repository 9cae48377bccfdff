"""Command line: ``dywspan demo | tune | distill | merge | convert | inspect | eval | bench``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .artifact import markdown, shown_tables
from .core.continuous import FEATURES, GUIDED
from .evaluate.report import write_results
from .schedulers.apply import load
from .schedulers.bind import bind
from .schedulers.spanlift import SpanLiftScheduler
from .version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors a user can mend end in one line, not in a traceback."""
    args = _parser().parse_args(argv)
    try:
        for name in vars(args).pop("modules"):
            _import(name)
        args.run(args)
    except ModuleNotFoundError as error:
        print(f"dywspan: {error}. This command needs more packages: pip install 'dywspan[train,eval]'", file=sys.stderr)
        return 2
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(f"dywspan: {error}", file=sys.stderr)
        return 2
    return 0


def demo(args: argparse.Namespace) -> None:
    """Learned and classical solvers beside a 50-step reference: a picture and a table."""
    from .bench.commands import check_here
    from .evaluate.baselines import BASELINES, find_solvers, make_cell
    from .evaluate.compare import compare, summary
    from .pipelines.pairs import make_pairs
    from .pipelines.rollout import load_pipeline, sample
    from .pipelines.teacher import Teacher
    from .plot import picture

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


def tune(args: argparse.Namespace) -> None:
    """Learn a solver for a pipeline in a minute or a few: from the best classical solver, without gradients."""
    from .pipelines.rollout import load_pipeline
    from .settings import make_config
    from .tuning import tune
    from .tuning.config import TuneConfig

    own = {"run", "model", "dtype", "device", "revision"}
    config = make_config({k: v for k, v in vars(args).items() if k not in own}, TuneConfig)
    dtype = getattr(torch, args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32"))
    tune(load_pipeline(args.model, dtype=dtype, device=args.device, revision=args.revision), **vars(config))


def distill(args: argparse.Namespace) -> None:
    """Learn a solver: a DyWeight table for each number of steps, or a SpanLift operator or a TimeLift on top of one."""
    from .distill.config import DistillConfig
    from .distill.trainer import run
    from .settings import make_config

    run(make_config({k: v for k, v in vars(args).items() if k != "run"}, DistillConfig))


def convert(args: argparse.Namespace) -> None:
    """Turn published solvers into an artefact, without executing anything they hold."""
    from .published import convert

    ends = {"sigma_min": args.sigma_min, "sigma_max": args.sigma_max}
    scheduler = convert(args.source, args.destination, grid=args.grid, **ends)
    print(f"{args.destination}: solvers for {sorted(scheduler.tables)} steps")


def merge(args: argparse.Namespace) -> None:
    """Put solvers that were learned apart into one artefact; for the same number of steps the later one counts."""
    from .distill.merge import merge_artefacts
    from .schedulers.merge import learned

    scheduler, told = merge_artefacts(args.sources, args.output)
    for line in told:
        print(line)
    print(f"{args.output}: {type(scheduler).__name__} for {learned(scheduler)} steps")


def inspect(args: argparse.Namespace) -> None:
    """Print an artefact: weights, row sums, time scale, calibrated levels, timesteps; lifts and their sizes."""
    scheduler: Any = load(args.artefact)
    lifted = isinstance(scheduler, SpanLiftScheduler)
    if (continuous := scheduler.continuous) is not None:
        form = f"{continuous.base}({continuous.order}M) and corrections that halve at {continuous.horizon:g} steps"
        names = ["levels", *(f"w, difference {m}" for m in range(1, continuous.order)), "log s"]
        _show_continuous(f"any number of steps, grid {dict(continuous.grid)}: {form}", names, continuous)
    if lifted and (function := scheduler.continuous_lift) is not None:
        form = f"of order {function.order} that halve at {function.horizon:g} steps, operator {function.operator!r}"
        _show_continuous(f"lifts for any number of steps, {form}", ["alpha - 1", "beta"], function)
    for n, table in sorted(shown_tables(scheduler).items()):
        schedule = table.schedule(scheduler.host.prediction)
        timesteps = scheduler.host.prediction.timestep(schedule.queries)
        lift = scheduler.lift(n, schedule) if lifted else None
        print(f"{n} steps, grid {dict(table.grid)}{', AFS' if table.afs else ''}")
        columns = [f"w[i-{j}]" if j else "w[i]" for j in range(table.weights.shape[1])]
        rows = []
        for i, (weights, s) in enumerate(zip(table.weights, table.time_scale)):
            row: dict[str, Any] = {
                "i": i,
                **{c: float(w) for c, w in zip(columns, weights)},
                "sum": float(weights.sum()),
            }
            row |= {"s": float(s), "sigma~": float(schedule.levels[i]), "tau": float(schedule.queries[i])}
            row["timestep"] = float(timesteps[i]) if i >= table.afs else float("nan")
            if lift is not None:
                row |= {"alpha": float(lift.alpha[i]), "beta": float(lift.beta[i])}
            rows.append(row)
        print(markdown(rows))
        for part in (scheduler.tables.get(n), scheduler.lifts.get(n) if lifted else None):
            if part is not None and (error := part.provenance.get("held_out_error")):
                print(f"{type(part).__name__}: held-out error {error['before']:.5f} -> {error['after']:.5f}")
        print()
    for n, time_lift in sorted(scheduler.time_lifts.items()):
        offsets, error = time_lift.offsets, time_lift.provenance.get("held_out_error")
        found = f": held-out error {error['before']:.5f} -> {error['after']:.5f}" if error else ""
        total = sum(offset.numel() for offset in offsets.values())
        print(f"TimeLift, {n} steps: {total:,} numbers, of {len(offsets)} parameters of the network{found}")
    for name, operator in (scheduler.operators if lifted else {}).items():
        count = sum(p.numel() for p in operator.parameters())
        print(f"operator {name!r}: {count:,} parameters, {operator.flops(64, 64) / 1e9:.3f} GFLOPs a step at 64 x 64")
    if args.plot:
        from .plot import plot_tables

        plot_tables(scheduler, args.plot)


def evaluate(args: argparse.Namespace) -> None:
    """Measure solvers, or images already there, by any metrics: a table and a JSON file. Stopped, it goes on."""
    from .evaluate.config import QualityConfig
    from .evaluate.quality import run
    from .settings import make_config

    run(make_config({k: v for k, v in vars(args).items() if k != "run"}, QualityConfig))


def _parser() -> argparse.ArgumentParser:
    from .bench.commands import EXAMPLES, add_benches
    from .distill.config import DistillConfig
    from .evaluate.config import QualityConfig
    from .settings import add_arguments
    from .tuning.config import TuneConfig

    parser = argparse.ArgumentParser("dywspan", description="Learned few-step solvers for diffusers pipelines.")
    parser.add_argument("--version", action="version", version=f"dywspan {__version__}")
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="a Python file or module with classes of the model's own, which is run first; repeat for several",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Any, among: Any = None, **options: Any) -> argparse.ArgumentParser:
        options |= {"help": run.__doc__, "description": run.__doc__}
        sub = (among or commands).add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options)
        sub.set_defaults(run=run)
        return sub

    sub = command("demo", demo)
    sub.add_argument("--model", default=EXAMPLES / "emoji-sd")
    sub.add_argument("--solvers", help="DyWeight artefact; default: the model's name and -solvers")
    sub.add_argument("--spanlift", help="SpanLift artefact; default: the model's name and -spanlift, if there is one")
    sub.add_argument("--prompts", default=EXAMPLES / "prompts" / "emoji-held-out.txt")
    sub.add_argument("--steps", type=int, nargs="+", default=[3, 5, 7])
    sub.add_argument("--samples", type=int, default=48, help="prompts the table is measured on")
    sub.add_argument("--columns", type=int, default=10, help="prompts the picture shows")
    sub.add_argument("--guidance-scale", type=float, help="default: what the solvers were learned for")
    sub.add_argument("--output", default="demo.png")
    sub.add_argument("--json", help="also write the table here")

    sub = command("tune", tune)
    sub.add_argument("model", help="pipeline: a directory or a Hub id")
    sub.add_argument("--revision", help="of the model on the Hub")
    sub.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of its weights; default: bfloat16 on CUDA, else float32",
    )
    sub.add_argument("--device", help="default: cuda, if there is one")
    add_arguments(sub, TuneConfig)
    sub.set_defaults(output="tuned")

    add_arguments(command("distill", distill), DistillConfig)

    sub = command("merge", merge)
    sub.add_argument("sources", nargs="+", help="artefacts of one class for one model: directories or Hub ids")
    sub.add_argument("-o", "--output", required=True, help="directory: a new one, an empty one, or one of the sources")

    sub = command("convert", convert)
    sub.add_argument("source", help="DyWeight .pt or .pkl file, or a directory of them")
    sub.add_argument("destination", help="directory of the artefact")
    sub.add_argument("--grid", type=json.loads, help="overrides the file's grid, as JSON")
    sub.add_argument("--sigma-min", type=float, help="overrides the file's range")
    sub.add_argument("--sigma-max", type=float)

    sub = command("inspect", inspect)
    sub.add_argument("artefact", help="a directory or a Hub id")
    sub.add_argument("--plot", help="also draw it here (PNG, SVG or PDF)")

    add_arguments(command("eval", evaluate), QualityConfig)

    sub = commands.add_parser("bench", help="Measure quality, overhead, memory and learning; show what was measured.")
    add_benches(sub, command, evaluate)
    return parser


def _import(name: str) -> None:
    """A module, by its name or its file: diffusers loads a saved pipeline's own classes only where they are imported.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(name)
    if path.suffix == ".py":
        sys.path.insert(0, str(path.resolve().parent))
        name = path.stem
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise FileNotFoundError(f"--import {path}: there is no such module. Name a .py file, or install it.") from None


def _show_continuous(form: str, names: Sequence[str], function: Any) -> None:
    print(form)
    around, coefficients = function.guidance_scale, function.coefficients
    for columns, part in zip((FEATURES, GUIDED), coefficients.split(len(FEATURES), dim=1)):
        print(markdown([{"to": name, **dict(zip(columns, row))} for name, row in zip(names, part.tolist())]))
    if around is not None:
        print(f"g is the guidance scale, and g0 = {around:g}")
    for n, error in function.provenance.get("held_out_error", {}).items():
        print(f"{n} steps: held-out error {error['before']:.5f} -> {error['after']:.5f}")
    print()


def _lines(path: str | os.PathLike[str], count: int) -> list[str]:
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < count:
        raise ValueError(f"{path} has {len(lines)} prompts, {count} are needed: add some, or lower --samples.")
    return lines[:count]


if __name__ == "__main__":
    sys.exit(main())
