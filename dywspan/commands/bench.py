"""The commands of ``dywspan bench``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..shipped import EXAMPLES, check_here


def overhead_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan bench overhead``."""
    from ..bench.overhead import SIZES

    parser.set_defaults(run=overhead)
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=[*SIZES], help="pipelines whose latent sizes are measured"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 10, 50], help="numbers of steps to measure")
    parser.add_argument("--repeats", type=int, default=30, help="runs of each solver, in turns")
    parser.add_argument("--output", help="also write the table here, as JSON")


def overhead(args: argparse.Namespace) -> None:
    """Time and memory of a solver's step beside diffusers' own, and its time beside the network's."""
    import torch

    from ..bench.overhead import overhead

    _show(overhead(args.sizes, args.steps, args.repeats), args.output, threads=torch.get_num_threads())


def memory_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan bench memory``."""
    parser.set_defaults(run=memory)
    parser.add_argument("--model", default=EXAMPLES / "emoji-sd", help="pipeline whose training memory is measured")
    parser.add_argument(
        "--full",
        action="store_true",
        help="also measure Stable Diffusion 1.5's UNet, up to an hour on a CPU",
    )
    parser.add_argument("--output", help="also write the table here, as JSON")


def memory(args: argparse.Namespace) -> None:
    """The memory that learning a solver takes."""
    from ..bench.memory import memory

    if isinstance(args.model, Path):  # none was named
        check_here(args.model)
    _show(memory(str(args.model), args.full), args.output)


def train_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan bench train``."""
    from ..bench.networks import NETWORKS

    parser.set_defaults(run=train)
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=NETWORKS,
        help="default: those of real size; on a CPU emoji-*",
    )
    parser.add_argument("--batch-size", type=int, default=4, help="pairs in an update")
    parser.add_argument("--steps", type=int, help="default: 3, or 5 for a table learned by gradients")
    parser.add_argument(
        "--updates", type=int, default=2, help="timed updates of each way of learning, after one to warm up"
    )
    parser.add_argument("--device", help="device to run on; default: cuda if there is one")
    parser.add_argument("--output", help="also write the table here, as JSON")


def train(args: argparse.Namespace) -> None:
    """Time and memory of learning a solver on networks of real size with random weights, on the device at hand."""
    from ..bench.train import RECIPE, train
    from ..evaluate.report import table, write_results

    rows = train(args.networks, args.batch_size, args.steps, args.updates, args.device)
    print(table({"rows": rows}))
    print(f"\nA recipe is `dywspan distill` by default: {RECIPE}. Its minutes are estimated from the measured updates.")
    if args.output:
        write_results(args.output, rows, batch_size=args.batch_size, timed_updates=args.updates, recipe=RECIPE)


def learning_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan bench distill``."""
    from ..distill.config import DistillConfig
    from ..settings import add_arguments
    from .learn import DISTILL

    parser.set_defaults(run=learning)
    parser.usage = "%(prog)s --config FILE [--config FILE ...] [options]"
    add_arguments(parser, DistillConfig, DISTILL, but=("config", "output"))
    parser.add_argument("--config", action="append", required=True, help="file of a distillation; repeat for several")
    parser.add_argument(
        "--output", default="distill-cost.json", help="results (JSON); solvers go where their files say"
    )
    parser.add_argument("--plot", help="also draw the error against the evaluations (PNG, SVG or PDF)")


def learning(args: argparse.Namespace) -> None:
    """What learning a solver costs, by optimizer: evaluations and error of runs, which go on or are found finished."""
    from ..bench.cost import learning_cost, plot
    from ..evaluate.report import table, write_results
    from ..pipelines.processes import is_main

    own = ("run", "config", "output", "plot")
    rows = learning_cost(args.config, **{k: v for k, v in vars(args).items() if k not in own})
    if is_main():
        print(table(write_results(args.output, rows)))
        if args.plot:
            plot(rows, args.plot)


def tune_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan bench tune``."""
    parser.set_defaults(run=tune_bench)
    parser.add_argument("--model", default=EXAMPLES / "emoji-sd", help="pipeline: a directory or a Hub id")
    parser.add_argument("--subject", help="name of the subject in the results; default: that of the model")
    parser.add_argument("--call", type=json.loads, default={}, help="arguments of the pipeline's call, as JSON")
    parser.add_argument(
        "--prompts",
        default=str(EXAMPLES / "prompts" / "emoji-train.txt"),
        help="prompts to tune with, if the pipeline takes prompts",
    )
    parser.add_argument(
        "--fresh-prompts", default=str(EXAMPLES / "prompts" / "emoji-held-out.txt"), help="prompts to measure on"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=256,
        help="samples to measure on, besides those to choose by",
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 4, 5, 7], help="numbers of steps to tune for")
    parser.add_argument("--solvers", nargs="*", default=[], help="artefacts to measure as well")
    parser.add_argument("--cache", help="directory of the samples of the reference")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples to tune with")
    parser.add_argument("--output", default="tune.json", help="results (JSON); those of other subjects are kept")


def tune_bench(args: argparse.Namespace) -> None:
    """What tuning is worth: error of the tuned solver beside the best classical one's, on samples of their own."""
    import torch

    from ..bench.tune import SELECT, tuned_rows
    from ..evaluate.report import read_results, table, write_results
    from ..pipelines.inputs import read_inputs
    from ..pipelines.networks import place
    from ..pipelines.rollout import load_pipeline
    from ..schedulers.bind import call_arguments

    check_here(args.model)
    needed, call = SELECT[1] + args.samples, dict(args.call)
    subject = args.subject or Path(args.model).name
    old = read_results(args.output)["rows"] if Path(args.output).exists() else []
    pipe, options = load_pipeline(str(args.model)), {"solvers": args.solvers, "cache": args.cache, "seed": args.seed}
    own, held_out = (args.prompts, args.fresh_prompts) if "prompt" in call_arguments(pipe) else (None, None)
    fresh = read_inputs(held_out, limit=needed) or [{}] * needed
    if len(fresh) < needed:
        raise ValueError(f"{held_out} has {len(fresh)} prompts, {needed} are needed: lower --samples.")
    for row in tuned_rows(pipe, subject, own, fresh, call=call, steps=args.steps, **options):
        key = [row[name] for name in ("subject", "nfe", "solver")]
        old = [other for other in old if [other[name] for name in ("subject", "nfe", "solver")] != key]
        if row["solver"].endswith("(best classical)"):  # there is one of each
            old = [o for o in old if [o["subject"], o["nfe"]] != key[:2] or not o["solver"].endswith(key[2][-16:])]
        old.append({**row, "device": place(pipe).type, "threads": torch.get_num_threads()})
        write_results(args.output, old)
    print(table({"rows": [row for row in old if row["subject"] == subject]}))


def table_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan bench table``."""
    parser.set_defaults(run=table)
    parser.add_argument("results", help="JSON file of an evaluation or a bench")
    parser.add_argument("--metrics", nargs="+", help="show only these metrics or columns")
    parser.add_argument("--steps", type=int, nargs="+", help="show only these numbers of evaluations")
    parser.add_argument("--plot", help="also draw plots (PNG, SVG or PDF), one file for each metric: NAME-METRIC")
    parser.add_argument("--against", help="an older JSON file: print only what changed since")
    parser.add_argument("--no-intervals", action="store_true", help="print the numbers without their 95 %% intervals")


def table(args: argparse.Namespace) -> None:
    """The Markdown of an evaluation's or a bench's JSON file; its plots; what changed since an older file."""
    from ..evaluate.pictures import plots
    from ..evaluate.report import changes, read_results, table

    results = read_results(args.results)
    if args.against:
        print(changes(results, read_results(args.against)))
        return
    print(table(results, args.metrics, args.steps, not args.no_intervals))
    if args.plot:
        for drawn in plots(results, Path(args.plot)):
            print(f"Picture: {drawn}")


def _show(rows: Sequence[dict[str, Any]], path: str | None, **facts: Any) -> None:
    from ..evaluate.report import write_results
    from ..text import markdown

    print(markdown(rows))
    if path:
        write_results(path, rows, **facts)
