"""One solver for every number of steps, learned on eight of them: the digits of ``digits.py`` again.

A table is learned for one number of steps. A continuous solver is a function of the grid that writes the tables of all:
a classical solver and corrections to it that fade as steps get small. Fitted by least squares on 96 pairs at 2, 3, 4,
5, 6, 8, 10 and 15 steps together, it is compared with the best of four classical solvers at every number from 2 to 20,
and with tables that were fitted to the same pairs for one number of steps alone.

    pip install scikit-learn matplotlib
    python examples/any_steps.py --plot any-steps.png

The picture shows the error of the endpoint against the number of steps: the classical solvers, and below them the
learned one, with dots where it was fitted. Between the dots and beyond the last it has never been fitted, and stays
below all of them: by 2 to 7 times from 2 to 12 steps, and 1.6 times at 20. Tables of one number alone are better at 3
and 7 (0.011 and 0.006; it 0.014 and 0.008), the same at 5, and worse at 9, which it has never seen (0.012; it 0.006).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any, cast

from diffusers import DDPMPipeline, EDMEulerScheduler
from digits import ExactDenoiser

from dywspan import DyWeightScheduler
from dywspan.distill.config import LearningConfig
from dywspan.distill.progress import endpoint_error
from dywspan.distill.task import Task, Term
from dywspan.distill.trainer import distill
from dywspan.pipelines.classical import default_grid
from dywspan.pipelines.pairs import make_pairs
from dywspan.pipelines.teacher import Teacher
from dywspan.text import markdown

CLASSICAL = {
    "Euler": ("euler", 1),
    "iPNDM(3M)": ("ipndm", 3),
    "DEIS(3M)": ("deis", 3),
    "DPM-Solver++(2M)": ("dpmpp", 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--fit", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8, 10, 15], help="numbers of steps")
    parser.add_argument("--show", type=int, nargs="+", default=[*range(2, 21)], help="numbers of steps")
    parser.add_argument("--tables", type=int, nargs="*", default=[3, 5, 7, 9], help="numbers of steps to fit one for")
    parser.add_argument("--base", default="deis", help="where the function starts, and what it becomes at many steps")
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--updates", type=int, default=25, help="of least squares, all pairs each")
    parser.add_argument("--held-out", type=int, default=512)
    parser.add_argument("--plot", help="draw the errors here (PNG, SVG or PDF)")
    args = parser.parse_args()

    network, scheduler = cast(Any, ExactDenoiser()), cast(Any, EDMEulerScheduler())
    pipe = DDPMPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    own = DyWeightScheduler.from_config(pipe.scheduler.config)
    teacher = Teacher(DyWeightScheduler.from_config(own.config, solver="heun"), 50)
    train, held_out = (
        make_pairs(pipe, teacher, [{}] * count, range(first, first + count), call={}, batch_size=256)
        for count, first in ((args.pairs, 10**6), (args.held_out, 0))
    )
    started = time.perf_counter()
    # An exact denoiser rounds less than a network: small differences. The ridge keeps 28 numbers from so few pairs.
    config = LearningConfig(
        optimizer="least_squares",
        init=args.base,
        order=3,
        updates=args.updates,
        batch_size=args.pairs,
        ridge=1e-3,
        difference=1e-3,
    )
    terms = [Term(n, {}, train, held_out) for n in args.fit]
    learned = distill(Task(pipe, teacher, terms, config, continuous=True)).continuous
    print(f"Fitted at {args.fit} steps in {time.perf_counter() - started:.0f} s")

    solvers = {
        name: DyWeightScheduler.from_config(own.config, solver=solver, solver_order=order, grid=default_grid(own))
        for name, (solver, order) in CLASSICAL.items()
    }
    solvers["continuous"] = own.with_continuous(learned)
    errors = {
        name: {n: endpoint_error(pipe, solver, n, held_out, {}, batch_size=256) for n in args.show}
        for name, solver in solvers.items()
    }
    alone = {}
    for n in args.tables:
        own_config = replace(config, init="ipndm", ridge=0)
        found = distill(Task(pipe, teacher, [Term(n, {}, train, held_out)], own_config))
        alone[n] = found.tables[n].provenance["held_out_error"]["after"]
    rows = []
    for n in args.show:
        best = min(CLASSICAL, key=lambda name: errors[name][n])
        row = {"steps": n, "best classical": best, "its error": errors[best][n], "continuous": errors["continuous"][n]}
        row |= {"table for it alone": alone.get(n, "")}
        rows.append({**row, "ratio": row["continuous"] / row["its error"], "fitted": "yes" if n in args.fit else ""})
    print(markdown(rows))
    if args.plot:
        plot(errors, args.fit, args.plot)


def plot(errors: dict[str, dict[int, float]], fitted: list[int], path: str) -> None:
    """Errors against steps, on logarithmic axes."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, of in errors.items():
        axes.plot(list(of), list(of.values()), label=name, lw=2.2 if name == "continuous" else 1, color=COLOURS[name])
    dots = {n: error for n, error in errors["continuous"].items() if n in fitted}
    axes.plot(list(dots), list(dots.values()), "o", color=COLOURS["continuous"], label="fitted here")
    axes.set(xlabel="steps", ylabel="mean squared error of the endpoint", xscale="log", yscale="log")
    ticks = [n for n in errors["continuous"] if n <= 6 or (n % 2 == 0 and n <= 10) or n % 5 == 0]
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.set_xticks([], minor=True)
    axes.legend()
    figure.savefig(path, dpi=110)


COLOURS = dict(zip([*CLASSICAL, "continuous"], ["#9a9a9a", "#4c8bb8", "#59a14f", "#b07aa1", "#d1472f"]))


if __name__ == "__main__":
    main()
