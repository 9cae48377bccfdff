"""``dywspan analyze``: what each step of a solver misses, and how much of it no weights reach."""

from __future__ import annotations

import argparse
import json


def options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan analyze``."""
    parser.set_defaults(run=analyze)
    parser.add_argument("model", help="pipeline: a directory or a Hub id")
    parser.add_argument("solvers", nargs="+", help="artefacts, or classical solvers such as ipndm-2m")
    parser.add_argument("--steps", type=int, nargs="+", default=[5], help="numbers of steps")
    parser.add_argument("--prompts", help="a file or a dataset; default: a list in this package")
    parser.add_argument("--call", type=json.loads, default={}, help="arguments of the pipeline's call, as JSON")
    parser.add_argument("--samples", type=int, default=16, help="samples to average over")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first sample")
    parser.add_argument("--order", type=int, help="derivatives that span a step; default: as many as the solver's")
    parser.add_argument("--substeps", type=int, default=8, help="steps of the exact solution in each step")
    parser.add_argument("--output", default="analysis.json", help="file of the results (JSON)")
    parser.add_argument("--plot", help="also draw the results (PNG, SVG or PDF)")


def analyze(args: argparse.Namespace) -> None:
    """Write, print and draw the shares of every step; see :mod:`dywspan.evaluate.analyze`."""
    from ..evaluate.analyze import analyze, plot
    from ..evaluate.report import write_results
    from ..text import markdown

    given = {k: v for k, v in vars(args).items() if k not in ("run", "output", "plot")}
    rows = analyze(**given)
    write_results(args.output, rows, settings={k: v for k, v in given.items() if v is not None})
    columns = dict.fromkeys(name for row in rows for name in row)
    print(markdown([{name: row.get(name, "") for name in columns} for row in rows]))
    print(f"\nWritten to {args.output}")
    if args.plot:
        plot(rows, args.plot)
        print(f"Picture: {args.plot}")
