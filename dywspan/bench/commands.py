"""The commands of ``dywspan bench``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..artifact import markdown
from ..distill.config import DistillConfig
from ..evaluate.config import QualityConfig
from ..evaluate.report import write_results
from ..settings import add_arguments
from .networks import NETWORKS
from .overhead import SIZES

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"


def check_here(*paths: str | Path) -> None:
    """What ships with the repository, not with the package."""
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(f"{path} is not here: run in a clone of the repository, or name it by an option.")


def overhead(args: argparse.Namespace) -> None:
    """Time and memory of a solver's step beside diffusers' own, and its time beside the network's."""
    from .overhead import overhead

    _show(overhead(args.sizes, args.steps, args.repeats), args.json, threads=torch.get_num_threads())


def memory(args: argparse.Namespace) -> None:
    """The memory that learning a solver takes."""
    from .memory import memory

    if isinstance(args.model, Path):  # none was named
        check_here(args.model)
    _show(memory(str(args.model), args.full), args.json)


def train(args: argparse.Namespace) -> None:
    """Time and memory of learning a solver on networks of real size with random weights, on the device at hand."""
    from ..evaluate.report import table
    from .train import RECIPE, train

    rows = train(args.networks, args.batch_size, args.steps, args.updates, args.device)
    print(table({"rows": rows}))
    print(f"\nA recipe is `dywspan distill` by default: {RECIPE}. Its minutes are reckoned, not measured.")
    if args.json:
        write_results(args.json, rows, batch_size=args.batch_size, timed_updates=args.updates, recipe=RECIPE)


def learning(args: argparse.Namespace) -> None:
    """What learning a solver costs, by optimizer: evaluations and error of runs, which go on or are found finished."""
    from ..evaluate.report import table
    from ..pipelines.processes import is_main
    from .cost import learning_cost, plot

    own = ("run", "config", "output", "plot")
    rows = learning_cost(args.config, **{k: v for k, v in vars(args).items() if k not in own})
    if is_main():
        print(table(write_results(args.output, rows)))
        if args.plot:
            plot(rows, Path(args.output).with_suffix(".png"))


def tune_bench(args: argparse.Namespace) -> None:
    """What tuning is worth: error of the tuned solver beside the best classical one's, on samples of their own."""
    from ..evaluate.report import read_results, table
    from ..pipelines.inputs import read_inputs
    from ..pipelines.networks import place
    from ..pipelines.rollout import load_pipeline
    from ..schedulers.bind import call_arguments
    from .tune import SELECT, tuned_rows

    check_here(args.model)
    needed, call = SELECT[1] + args.samples, dict(args.call)
    subject = args.subject or Path(args.model).name
    old = read_results(args.json)["rows"] if Path(args.json).exists() else []
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
        write_results(args.json, old)
    print(table({"rows": [row for row in old if row["subject"] == subject]}))


def table(args: argparse.Namespace) -> None:
    """The Markdown of an evaluation's or a bench's JSON file."""
    from ..evaluate.report import read_results, table

    print(table(read_results(args.results), args.metrics, args.steps, not args.no_intervals))


def add_benches(parser: argparse.ArgumentParser, command: Callable[..., Any], evaluate: Callable[..., Any]) -> None:
    """All of them, as commands of a parser's own.

    Args:
        command: makes one of a name, a function and the commands that it is among.
        evaluate: what ``quality`` runs.
    """
    what = parser.add_subparsers(required=True, metavar="what")
    add_arguments(command("quality", evaluate, what), QualityConfig)
    sub = command("overhead", overhead, what)
    sub.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES], help="pipelines whose latents are stepped")
    sub.add_argument("--steps", type=int, nargs="+", default=[3, 10, 50])
    sub.add_argument("--repeats", type=int, default=30, help="runs by each solver, in turns")
    sub.add_argument("--json", help="also write the table here")
    sub = command("memory", memory, what)
    sub.add_argument("--model", default=EXAMPLES / "emoji-sd", help="pipeline whose training memory is measured")
    sub.add_argument("--full", action="store_true", help="also Stable Diffusion 1.5's UNet, up to an hour on a CPU")
    sub.add_argument("--json", help="also write the table here")
    sub = command("train", train, what)
    sub.add_argument("--networks", nargs="+", choices=NETWORKS, help="default: those of real size; on CPUs emoji-*")
    sub.add_argument("--batch-size", type=int, default=4, help="pairs of an update")
    sub.add_argument("--steps", type=int, help="of all solvers; default: 3, and 5 of a table by gradients")
    sub.add_argument("--updates", type=int, default=2, help="timed ones of each way of learning, after one to warm up")
    sub.add_argument("--device", help="default: cuda, if there is one")
    sub.add_argument("--json", help="also write the table here")
    sub = command("distill", learning, what, conflict_handler="resolve")
    add_arguments(sub, DistillConfig)
    sub.add_argument("--config", action="append", required=True, help="YAML file of a distillation; repeat for each")
    sub.add_argument("--output", default="distill-cost.json", help="results; what is learned is where its file says")
    sub.add_argument("--plot", action="store_true", help="also draw error over evaluations, beside output as .png")
    sub = command("tune", tune_bench, what)
    sub.add_argument("--model", default=EXAMPLES / "emoji-sd", help="pipeline: a directory or a Hub id")
    sub.add_argument("--subject", help="name of its rows; default: the model's")
    sub.add_argument("--call", type=json.loads, default={}, help="arguments of the pipeline's call, as JSON")
    sub.add_argument(
        "--prompts",
        default=str(EXAMPLES / "prompts" / "emoji-train.txt"),
        help="to tune with, if the pipeline takes some",
    )
    sub.add_argument("--fresh-prompts", default=str(EXAMPLES / "prompts" / "emoji-held-out.txt"), help="to measure on")
    sub.add_argument("--samples", type=int, default=256, help="to measure on, after those to select by")
    sub.add_argument("--steps", type=int, nargs="+", default=[3, 4, 5, 7])
    sub.add_argument("--solvers", nargs="*", default=[], help="artefacts to measure as well")
    sub.add_argument("--cache", help="directory of the reference's samples")
    sub.add_argument("--seed", type=int, default=0, help="of the samples to tune with")
    sub.add_argument("--json", default="tune.json", help="results; rows of other subjects stay")
    sub = command("table", table, what)
    sub.add_argument("results", help="JSON file of an evaluation or a bench")
    sub.add_argument("--metrics", nargs="+", help="only these, or only these columns")
    sub.add_argument("--steps", type=int, nargs="+", help="only these numbers of evaluations")
    sub.add_argument("--no-intervals", action="store_true", help="numbers alone, without half their 95 %% interval")


def _show(rows: Sequence[dict[str, Any]], path: str | None, **facts: Any) -> None:
    print(markdown(rows))
    if path:
        write_results(path, rows, **facts)
