"""Commands about artefacts: what is in one, several in one, one of what others published."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any


def inspect_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan inspect``."""
    parser.set_defaults(run=inspect)
    parser.add_argument("artefact", help="a directory or a Hub id")
    parser.add_argument("--plot", help="also draw it here (PNG, SVG or PDF)")


def inspect(args: argparse.Namespace) -> None:
    """Print an artefact: weights, row sums, time scale, calibrated levels, timesteps; lifts and their sizes."""
    from ..artifact import shown_tables
    from ..schedulers.apply import load
    from ..schedulers.spanlift import SpanLiftScheduler
    from ..text import markdown

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
        from ..plot import plot_tables

        plot_tables(scheduler, args.plot)


def merge_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan merge``."""
    parser.set_defaults(run=merge)
    parser.add_argument("sources", nargs="+", help="artefacts of one class for one model: directories or Hub ids")
    parser.add_argument(
        "-o", "--output", required=True, help="directory: a new one, an empty one, or one of the sources"
    )


def merge(args: argparse.Namespace) -> None:
    """Put solvers that were learned apart into one artefact; for the same number of steps the later one counts."""
    from ..distill.merge import merge_artefacts
    from ..schedulers.merge import learned

    scheduler, told = merge_artefacts(args.sources, args.output)
    for line in told:
        print(line)
    print(f"{args.output}: {type(scheduler).__name__} for {learned(scheduler)} steps")


def convert_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan convert``."""
    parser.set_defaults(run=convert)
    parser.add_argument("source", help="DyWeight .pt or .pkl file, or a directory of them")
    parser.add_argument("destination", help="directory of the artefact")
    parser.add_argument("--grid", type=json.loads, help="overrides the file's grid, as JSON")
    parser.add_argument("--sigma-min", type=float, help="overrides the file's range")
    parser.add_argument("--sigma-max", type=float, help="overrides the file's range")


def convert(args: argparse.Namespace) -> None:
    """Turn published solvers into an artefact, without executing anything they hold."""
    from ..published import convert

    ends = {"sigma_min": args.sigma_min, "sigma_max": args.sigma_max}
    scheduler = convert(args.source, args.destination, grid=args.grid, **ends)
    print(f"{args.destination}: solvers for {sorted(scheduler.tables)} steps")


def _show_continuous(form: str, names: Sequence[str], function: Any) -> None:
    from ..core.continuous import FEATURES, GUIDED
    from ..text import markdown

    print(form)
    around, coefficients = function.guidance_scale, function.coefficients
    for columns, part in zip((FEATURES, GUIDED), coefficients.split(len(FEATURES), dim=1)):
        print(markdown([{"to": name, **dict(zip(columns, row))} for name, row in zip(names, part.tolist())]))
    if around is not None:
        print(f"g is the guidance scale, and g0 = {around:g}")
    for n, error in function.provenance.get("held_out_error", {}).items():
        print(f"{n} steps: held-out error {error['before']:.5f} -> {error['after']:.5f}")
    print()
