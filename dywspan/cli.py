"""Command line: ``dywspan demo | distill | convert | inspect | bench``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .artifact import write_atomically
from .core.layout import LAYOUTS
from .schedulers.dyweight import DyWeightScheduler
from .schedulers.spanlift import SpanLiftScheduler
from .version import __version__

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors a user can mend end in one line, not in a traceback."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except ModuleNotFoundError as error:
        print(f"dywspan: {error}. This command needs more packages: pip install 'dywspan[train]'", file=sys.stderr)
        return 2
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"dywspan: {error}", file=sys.stderr)
        return 2
    return 0


def demo(args: argparse.Namespace) -> None:
    """Learned and classical solvers beside a 50-step reference: a picture and a table."""
    import torch

    from .distill.pairs import Teacher, make_pairs
    from .distill.rollout import load_pipeline, sample
    from .evaluate.compare import BASELINES, compare, picture, summary

    for path in (args.model, args.solvers):
        if not Path(path).exists():
            raise FileNotFoundError(f"{path} is not here: run in a clone of the repository, or name it by an option.")
    pipe = load_pipeline(str(args.model))
    call = {"guidance_scale": args.guidance_scale}
    prompts = _lines(args.prompts, args.samples)
    seeds = range(len(prompts))
    teacher = Teacher(BASELINES["iPNDM(2M)"](pipe.scheduler.config), 50)
    reference = make_pairs(pipe, teacher, prompts, seeds, call=call)
    solvers = {name: make(pipe.scheduler.config) for name, make in BASELINES.items()}
    solvers["DyWeight (learned)"] = DyWeightScheduler.from_pretrained(args.solvers)
    if Path(args.spanlift).exists():
        solvers["SpanLift (learned)"] = SpanLiftScheduler.from_pretrained(args.spanlift)
    results = compare(pipe, solvers, args.steps, reference, call=call)

    shown = slice(0, args.columns)
    with torch.no_grad():
        _, output = sample(pipe, teacher.scheduler, 50, prompts[shown], seeds[shown], call, decode=True)
    sheet = [("reference, 50 steps", output.images)]
    for n in args.steps:
        sheet.append(("", []))
        sheet += [(f"{r.solver}, {n}", r.images[shown]) for r in results if r.num_inference_steps == n]
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    picture(sheet, prompts[shown]).save(args.output)

    rows = [r.row() for r in results]
    print(f"\nDistance to the 50-step reference (iPNDM), {len(prompts)} prompts, every solver on the same noise:")
    print("latent MSE / 1000 x feature distance / seconds per image\n")
    print(markdown(summary(rows)))
    print(f"\nPicture: {args.output}")
    if args.json:
        _write_results(args.json, rows)


def distill(args: argparse.Namespace) -> None:
    """Learn a solver: a DyWeight table for each number of steps, or a SpanLift operator on top of a base."""
    from .distill.losses import FEATURES, latent_and_features, latent_mse
    from .distill.pairs import Teacher, make_pairs
    from .distill.rollout import load_pipeline
    from .distill.train import AdamConfig, distill, distill_lift

    needed = args.pairs if args.held_out_prompts else args.pairs + args.held_out
    prompts = _lines(args.prompts, needed)
    held_out_prompts = _lines(args.held_out_prompts, args.held_out) if args.held_out_prompts else prompts[args.pairs :]
    pipe = load_pipeline(args.model)
    base = _base(args.base, pipe) if args.solver == "spanlift" else None
    lifted = _extended(args.output, base, args.steps) if base is not None else None
    call = {**args.call, **({} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale})}
    given = {f.name: getattr(args, f.name) for f in fields(AdamConfig) if hasattr(args, f.name)}
    config = replace(AdamConfig(lr=1e-3) if args.solver == "spanlift" else AdamConfig(), **given)
    classical = {"solver": args.teacher, "order": args.teacher_order}
    teacher = Teacher(DyWeightScheduler.from_config(pipe.scheduler.config, **classical), args.teacher_steps)
    made = {"call": call, "cache": args.cache or Path(args.output) / "cache"}
    # Three ranges of seeds that never meet: the demo's and a user's small ones, held-out pairs, training pairs.
    held_out = make_pairs(pipe, teacher, held_out_prompts, range(10**6, 10**6 + args.held_out), **made)
    train = make_pairs(pipe, teacher, prompts[: args.pairs], range(2 * 10**6, 2 * 10**6 + args.pairs), **made)

    loss = latent_and_features(FEATURES[args.features](pipe), args.layout) if args.features else latent_mse
    learning: dict[str, Any] = {"call": call, "config": config, "loss": loss}
    if base is not None:
        lift: dict[str, Any] = {"layout": args.layout, "operator": args.operator}
        for steps in [args.steps] if args.shared else [[n] for n in args.steps]:
            name = "shared" if args.shared else str(steps[0])
            new = distill_lift(pipe, teacher, train, held_out, base, steps, name=name, **learning, **lift)
            lifted = lifted.with_lifts(new) if lifted else new
            lifted.save_pretrained(args.output)
            for n in steps:
                _report(n, new.lifts[n].provenance["held_out_error"], args.output)
        if args.push_to_hub and lifted:
            lifted.push_to_hub(args.push_to_hub)
        return
    has_artefact = (Path(args.output) / DyWeightScheduler.config_name).exists()
    scheduler: Any = DyWeightScheduler.from_config(pipe.scheduler.config)
    if has_artefact:
        scheduler = DyWeightScheduler.from_pretrained(args.output)
    for n in args.steps:
        table = distill(pipe, teacher, train, held_out, n, grid=args.grid, **learning)
        scheduler = scheduler.with_tables([table])
        scheduler.save_pretrained(args.output)
        _report(n, table.provenance["held_out_error"], args.output)
    if args.push_to_hub:
        scheduler.push_to_hub(args.push_to_hub)


def _base(name: str, pipe: Any) -> Any:
    """A DyWeight artefact, or a classical solver for every number of steps."""
    from .core.bases import BASES
    from .core.step import TWO_STAGE

    if name in BASES or name in TWO_STAGE:
        return DyWeightScheduler.from_config(pipe.scheduler.config, solver=name)
    return DyWeightScheduler.from_pretrained(name)


def _extended(output: str, base: DyWeightScheduler, steps: Sequence[int]) -> SpanLiftScheduler | None:
    """The artefact a SpanLift run adds to, if there is one; mistakes are found before anything is computed."""
    for n in steps:
        base.set_timesteps(n)
    if not (Path(output) / SpanLiftScheduler.config_name).exists():
        return None
    existing = SpanLiftScheduler.from_pretrained(output)
    if existing.config["tables"] != base.config["tables"] or existing.config["solver"] != base.config["solver"]:
        raise ValueError(f"{output} holds operators for another base: choose another --output.")
    return existing


def _report(steps: int, error: dict[str, float], output: str) -> None:
    print(f"{steps} steps: held-out error {error['before']:.4f} -> {error['after']:.4f}, saved to {output}")


def convert(args: argparse.Namespace) -> None:
    """Turn published solvers into an artefact, without executing anything they hold."""
    from .published import convert

    ends = {"sigma_min": args.sigma_min, "sigma_max": args.sigma_max}
    scheduler = convert(args.source, args.destination, grid=args.grid, **ends)
    print(f"{args.destination}: solvers for {sorted(scheduler.tables)} steps")


def inspect(args: argparse.Namespace) -> None:
    """Print an artefact: weights, row sums, time scale, calibrated levels, timesteps; SpanLift's scalars and size."""
    config = DyWeightScheduler.load_config(args.artefact)
    lifted = config.get("_class_name") == SpanLiftScheduler.__name__
    scheduler: Any = (SpanLiftScheduler if lifted else DyWeightScheduler).from_pretrained(args.artefact)
    for n, table in sorted(scheduler.tables.items()):
        schedule = table.schedule(scheduler.host.prediction)
        timesteps = scheduler.host.prediction.timestep(schedule.queries)
        lift = scheduler.lifts.get(n) if lifted else None
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
        for part in (table, lift):
            if part is not None and (error := part.provenance.get("held_out_error")):
                print(f"{type(part).__name__}: held-out error {error['before']:.5f} -> {error['after']:.5f}")
        print()
    for name, operator in (scheduler.operators if lifted else {}).items():
        count = sum(p.numel() for p in operator.parameters())
        print(f"operator {name!r}: {count:,} parameters, {operator.flops(64, 64) / 1e9:.3f} GFLOPs a step at 64 x 64")
    if args.plot:
        from .evaluate.plot import plot_tables

        plot_tables(scheduler, args.plot)


def bench(args: argparse.Namespace) -> None:
    """Time one step of each solver beside the network's (SD1.5's UNet, random weights), as ratios."""
    from .evaluate.overhead import overhead

    rows = overhead()
    print(markdown(rows))
    if args.json:
        _write_results(args.json, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("dywspan", description="Learned few-step solvers for diffusers pipelines.")
    parser.add_argument("--version", action="version", version=f"dywspan {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=run.__doc__, description=run.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(run=run)
        return sub

    sub = command("demo", demo)
    sub.add_argument("--model", default=EXAMPLES / "emoji-sd")
    sub.add_argument("--solvers", default=EXAMPLES / "emoji-sd-solvers")
    sub.add_argument("--spanlift", default=EXAMPLES / "emoji-sd-spanlift")
    sub.add_argument("--prompts", default=EXAMPLES / "prompts" / "emoji-held-out.txt")
    sub.add_argument("--steps", type=int, nargs="+", default=[3, 5, 7])
    sub.add_argument("--samples", type=int, default=48, help="prompts the table is measured on")
    sub.add_argument("--columns", type=int, default=10, help="prompts the picture shows")
    sub.add_argument("--guidance-scale", type=float, default=4.0)
    sub.add_argument("--output", default="demo.png")
    sub.add_argument("--json", help="also write the table here")

    sub = command("distill", distill)
    sub.add_argument("--model", required=True, help="pipeline: a directory or a Hub id")
    sub.add_argument("--prompts", required=True, help="text file, one prompt a line")
    sub.add_argument("--held-out-prompts", help="another one for the held-out pairs; else the lines after --pairs")
    sub.add_argument("--output", required=True, help="directory of the artefact")
    sub.add_argument("--solver", choices=["dyweight", "spanlift"], default="dyweight")
    sub.add_argument("--base", default="euler", help="of SpanLift: a DyWeight artefact or a classical solver")
    sub.add_argument("--layout", choices=sorted(LAYOUTS), default="image", help="of the latents, for SpanLift")
    sub.add_argument("--operator", type=json.loads, default={}, help='SpanLift operator, e.g. {"width": 32}')
    sub.add_argument("--shared", action="store_true", help="one SpanLift operator for all --steps, not one for each")
    sub.add_argument(
        "--features",
        choices=["dinov2", "encoder"],
        help="add a loss on features of the decoded images: dinov2 or encoder",
    )
    sub.add_argument("--steps", type=int, nargs="+", default=[5], help="numbers of steps to learn for")
    sub.add_argument("--guidance-scale", type=float)
    sub.add_argument("--call", type=json.loads, default={}, help="further arguments of the pipeline's call, as JSON")
    sub.add_argument("--grid", type=json.loads, help='nominal grid as JSON, e.g. {"name": "flow", "shift": 3}')
    sub.add_argument("--teacher", default="ipndm", help="classical solver")
    sub.add_argument("--teacher-steps", type=int, default=50)
    sub.add_argument("--teacher-order", type=int, default=2)
    sub.add_argument("--pairs", type=int, default=256, help="teacher pairs to learn from")
    sub.add_argument("--held-out", type=int, default=64, help="teacher pairs to choose the best table by")
    sub.add_argument("--cache", help="directory of teacher pairs, to share between runs; by default in --output")
    sub.add_argument("--push-to-hub", metavar="REPO", help="upload the artefact to this Hub repository")
    _add_config(sub)

    sub = command("convert", convert)
    sub.add_argument("source", help="DyWeight .pt or .pkl file, or a directory of them")
    sub.add_argument("destination", help="directory of the artefact")
    sub.add_argument("--grid", type=json.loads, help="overrides the file's grid, as JSON")
    sub.add_argument("--sigma-min", type=float, help="overrides the file's range")
    sub.add_argument("--sigma-max", type=float)

    sub = command("bench", bench)
    sub.add_argument("what", choices=["overhead"])
    sub.add_argument("--json", help="also write the table here")

    sub = command("inspect", inspect)
    sub.add_argument("artefact", help="a directory or a Hub id")
    sub.add_argument("--plot", help="also draw it here (PNG, SVG or PDF)")
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    """One option for each field of the optimiser's configuration; those not given keep the solver's own default."""
    from .distill.train import AdamConfig

    for field in fields(AdamConfig):
        kind: dict[str, Any] = (
            {"action": argparse.BooleanOptionalAction} if field.type == "bool" else {"type": type(field.default)}
        )
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, default=argparse.SUPPRESS, help=f"default: {field.default}", **kind)


def _lines(path: str | os.PathLike[str], count: int) -> list[str]:
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < count:
        raise ValueError(f"{path} has {len(lines)} prompts, {count} are needed: add some, or lower --pairs.")
    return lines[:count]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of rows with the same keys."""
    table = [list(rows[0]), *([f"{v:.4f}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows)]
    widths = [max(len(line[j]) for line in table) for j in range(len(table[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in table]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _write_results(path: str | os.PathLike[str], rows: Sequence[dict[str, Any]]) -> None:
    import platform

    import diffusers
    import torch

    versions = {"dywspan": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({os.cpu_count()} cores)"
    command = "dywspan " + " ".join(sys.argv[1:])
    data = {"command": command, "versions": versions, "device": f"{device}, {platform.machine()}", "rows": list(rows)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
