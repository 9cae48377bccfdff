"""``dywspan inspect``: what an artefact is for, how it was learned, and its numbers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any


def inspect_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dywspan inspect``."""
    parser.set_defaults(run=inspect)
    parser.add_argument("artefact", help="a directory or a Hub id")
    parser.add_argument("--full", action="store_true", help="also print all weights, noise levels and timesteps")
    parser.add_argument("--plot", metavar="FILE", help="also draw the numbers to this file (PNG, SVG or PDF)")


def inspect(args: argparse.Namespace) -> None:
    """Print a summary of an artefact, and with ``--full`` all of its numbers."""
    from ..schedulers.apply import load

    scheduler = load(args.artefact)
    try:
        print(summary(scheduler))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{args.artefact}: the record of how it was learned is damaged: {error!r}.") from error
    if args.full:
        _show_functions(scheduler)
        _show_tables(scheduler)
        _show_sizes(scheduler)
    if args.plot:
        from ..plot import plot_tables

        plot_tables(scheduler, args.plot)


def summary(scheduler: Any) -> str:
    """Class, numbers of steps, model, how each was learned, and a table of errors."""
    from ..artifact import provenances
    from ..distill.card import errors
    from ..schedulers.apply import models
    from ..schedulers.merge import learned
    from ..text import markdown

    made = provenances(scheduler)
    runs: dict[str, list[str]] = {}
    for n, provenance in made.items():
        runs.setdefault(_how(provenance), []).append(str(n))
    ways = [f"{', '.join(steps)} steps: {how}" if len(runs) > 1 else how for how, steps in runs.items()]
    calls = [{**p.get("call", {}), **own} for p in made.values() for own in (p.get("variants") or {"": {}}).values()]
    told = dict.fromkeys(", ".join(f"{k}={v!r}" for k, v in call.items()) or "its defaults" for call in calls)
    pipelines = dict.fromkeys(p["pipeline"] for p in made.values() if "pipeline" in p)
    time_lifts = [f"TimeLift for {', '.join(map(str, sorted(own)))} steps"] if (own := scheduler.time_lifts) else []
    facts = {
        "for": [f"{learned(scheduler)} steps" if learned(scheduler) else "any number of steps", *time_lifts],
        "model": [*sorted(models(scheduler)), *pipelines] or ["not said"],
        "called with": [*told] or ["not said"],
        "network": [f"{scheduler.config['prediction_type']}; replaces a {type(scheduler.host.scheduler).__name__}"],
        "learned by": ways or ["nothing: it is a classical solver"],
    }
    lines = [type(scheduler).__name__]
    for name, values in facts.items():
        lines += [f"  {name if i == 0 else '':<12}{value}" for i, value in enumerate(values)]
    if rows := errors(scheduler):
        lines += ["", markdown(rows)]
    return "\n".join(lines)


def _how(provenance: Mapping[str, Any]) -> str:
    """One line of how a solver was learned."""
    learning, teacher = provenance.get("learning") or {}, provenance.get("teacher") or {}
    if not learning:
        origin = provenance.get("solver") or provenance.get("source")
        return f"nothing: taken from {origin}" if origin else "not said"
    updates, batch, pairs = (
        learning.get("updates"),
        learning.get("batch_size"),
        provenance.get("pairs", {}).get("train"),
    )
    parts = [
        learning.get("optimizer"),
        updates and f"{updates} updates of {batch} pairs",
        pairs and f"{pairs} pairs in all",
        "loss" in provenance and f"loss {provenance['loss']}",
        teacher and f"teacher {teacher.get('solver') or teacher['scheduler']} with {teacher['steps']} steps",
    ]
    return ", ".join(part for part in parts if part)


def _show_functions(scheduler: Any) -> None:
    """The coefficients of what is learned for every number of steps."""
    if (table := scheduler.continuous) is not None:
        form = f"{table.base}({table.order}M) and corrections that halve at {table.horizon:g} steps"
        names = ["levels", *(f"w, difference {m}" for m in range(1, table.order)), "log s"]
        _show_function(f"any number of steps, grid {dict(table.grid)}: {form}", names, table)
    if (lift := getattr(scheduler, "continuous_lift", None)) is not None:
        form = f"of order {lift.order} that halve at {lift.horizon:g} steps, operator {lift.operator!r}"
        _show_function(f"lifts for any number of steps, {form}", ["alpha - 1", "beta"], lift)


def _show_function(form: str, names: Sequence[str], function: Any) -> None:
    from ..core.continuous import FEATURES, GUIDED
    from ..text import markdown

    print(f"\n{form}")
    around, coefficients = function.guidance_scale, function.coefficients
    for columns, part in zip((FEATURES, GUIDED), coefficients.split(len(FEATURES), dim=1)):
        print(markdown([{"to": name, **dict(zip(columns, row))} for name, row in zip(names, part.tolist())]))
    if around is not None:
        print(f"g is the guidance scale, and g0 = {around:g}")


def _show_tables(scheduler: Any) -> None:
    """A row for each step of each table: weights, their sum, time scale, calibrated levels, timestep, lift."""
    from ..artifact import shown_tables
    from ..text import markdown

    prediction = scheduler.host.prediction
    for n, table in sorted(shown_tables(scheduler).items()):
        schedule = table.schedule(prediction)
        timesteps = prediction.timestep(schedule.queries)
        lift = scheduler.lift(n, schedule) if hasattr(scheduler, "lift") else None
        columns = [f"w[i-{j}]" if j else "w[i]" for j in range(table.weights.shape[1])]
        rows: list[dict[str, Any]] = []
        for i, (weights, s) in enumerate(zip(table.weights, table.time_scale)):
            row = {"i": i, **dict(zip(columns, weights.tolist())), "sum": float(weights.sum()), "s": float(s)}
            row |= {"sigma~": float(schedule.levels[i]), "tau": float(schedule.queries[i])}
            row["timestep"] = float(timesteps[i]) if i >= table.afs else float("nan")
            if lift is not None:
                row |= {"alpha": float(lift.alpha[i]), "beta": float(lift.beta[i])}
            rows.append(row)
        print(f"\n{n} steps, grid {dict(table.grid)}{', AFS' if table.afs else ''}\n{markdown(rows)}")


def _show_sizes(scheduler: Any) -> None:
    """How large time lifts and operators are."""
    print()
    for n, lift in sorted(scheduler.time_lifts.items()):
        total = sum(offset.numel() for offset in lift.offsets.values())
        print(f"TimeLift, {n} steps: {total:,} numbers, of {len(lift.offsets)} parameters of the network")
    for name, operator in getattr(scheduler, "operators", {}).items():
        count = sum(p.numel() for p in operator.parameters())
        print(f"operator {name!r}: {count:,} parameters, {operator.flops(64, 64) / 1e9:.3f} GFLOPs a step at 64 x 64")
