"""Command line: ``dywspan demo | tune | distill | merge | convert | inspect | eval | bench``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .artifact import markdown, shown_tables
from .core.continuous import FEATURES, GUIDED
from .schedulers.apply import load
from .schedulers.spanlift import SpanLiftScheduler
from .version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors a user can mend end in one line, not in a traceback."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except ModuleNotFoundError as error:
        print(f"dywspan: {error}. This command needs more packages: pip install 'dywspan[train,eval]'", file=sys.stderr)
        return 2
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(f"dywspan: {error}", file=sys.stderr)
        return 2
    return 0


def demo(args: argparse.Namespace) -> None:
    """An evaluation of solvers that ship with an embedded pipeline, beside classical ones: a table and pictures."""
    from .bench.commands import EXAMPLES, check_here
    from .evaluate.config import QualityConfig
    from .evaluate.quality import run
    from .settings import read_config

    given = {k: v for k, v in vars(args).items() if k not in ("run", "config")}
    given = (read_config(args.config, QualityConfig) if "config" in args else {}) | given
    model = Path(given.pop("model", EXAMPLES / "emoji-sd"))
    learned = [f"{model}-solvers", f"{model}-spanlift"]
    check_here(model, *(learned if "solvers" not in given else ()))
    own: dict[str, Any] = {"solvers": ["euler", "dpmpp-2m", "unipc", "ipndm-2m", *learned], "samples": 48}
    own |= {"prompts": str(EXAMPLES / "prompts" / "emoji-held-out.txt"), "steps": given.get("steps", [3, 5, 7])}
    own |= {"metrics": ["latent_mse", "feature_distance"], "output": "demo/demo.json", "picture_steps": own["steps"]}
    learned = [name for name in given.get("solvers", learned) if Path(name).exists()]
    tables = [*shown_tables(load(learned[0])).values()] if learned else []
    own["call"] = dict(tables[0].provenance.get("call", {})) if tables else {}  # what it was learned for
    run(QualityConfig(**{"model": str(model), **own, **given}))


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
    scheduler = convert(args.source, args.output, grid=args.grid, **ends)
    print(f"{args.output}: solvers for {sorted(scheduler.tables)} steps")


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
    from .bench.commands import add_benches
    from .distill.config import DistillConfig
    from .evaluate.config import QualityConfig
    from .settings import add_arguments
    from .tuning.config import TuneConfig

    parser = argparse.ArgumentParser("dywspan", description="Learned few-step solvers for diffusers pipelines.")
    parser.add_argument("--version", action="version", version=f"dywspan {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Any, among: Any = None, **options: Any) -> argparse.ArgumentParser:
        options |= {"help": run.__doc__, "description": run.__doc__}
        sub = (among or commands).add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options)
        sub.set_defaults(run=run)
        return sub

    add_arguments(command("demo", demo), QualityConfig)

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
    sub.add_argument("-o", "--output", required=True, help="directory of the artefact")
    sub.add_argument("--grid", type=json.loads, help="overrides the file's grid, as JSON")
    sub.add_argument("--sigma-min", type=float, help="overrides the file's range")
    sub.add_argument("--sigma-max", type=float)

    sub = command("inspect", inspect)
    sub.add_argument("artefact", help="a directory or a Hub id")
    sub.add_argument("--plot", help="also draw it here (PNG, SVG or PDF)")

    add_arguments(command("eval", evaluate), QualityConfig)

    sub = commands.add_parser("bench", help="Measure overhead, memory and learning; show what was measured.")
    add_benches(sub, command)
    return parser


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


if __name__ == "__main__":
    sys.exit(main())
