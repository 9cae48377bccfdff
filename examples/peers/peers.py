"""Learned solvers under one roof: the same trainer, pairs, loss, teacher and cost meter, on the same pipelines.

    python examples/peers/peers.py --budget                              # what it will cost, and nothing else
    python examples/peers/peers.py --subjects emoji-sd emoji-flow --steps 3 5 7 --output docs/results/peers.json

Every method starts from the best classical solver that it can start from, and is learned at three rates or more and,
where it can be, by least squares; what is best on held-out pairs is kept and measured on fresh ones. Re-run the command
to resume: finished runs are found again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench import Bench, numbers
from cases import CASES, FRESH, TEACHER_STEPS, Opened, opened
from learning import Effort, Learning, Run, row
from methods import FREE, METHODS, Lift
from report import tables
from torch import Tensor

from dywspan.artifact import write_atomically
from dywspan.core.prediction import Flow
from dywspan.evaluate.metrics import latent_rmse
from dywspan.evaluate.paired import difference
from dywspan.evaluate.report import read_results, write_results
from dywspan.evaluate.rivals import judging
from dywspan.pipelines.hashes import digest
from dywspan.published import neuralsolver_tables
from dywspan.text import markdown

CLASSICAL, PUBLISHED = "best classical", "NeuralSolver (published)"
FLAGS = {
    "pairs": "to learn from",
    "held_out": "pairs to choose by",
    "updates": "of each run by gradients",
    "squares_updates": "of each run by least squares",
    "checks": "held-out evaluations of each run, on the way",
    "batch_size": "pairs in an update",
    "most": "rates to try at most",
    "samples": "to measure on",
}


def published(bench: Bench) -> dict[str, Any]:
    """NeuralSolver's tables where they are for such a network: of flow, or of linear betas."""
    own, linear = bench.opened.own, {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    is_linear = own.config["trained_betas"] is None and all(own.config[k] == v for k, v in linear.items())
    if not (is_flow := isinstance(bench.prediction, Flow)) and not is_linear:
        return {}
    tables = {t.num_inference_steps: t for t in neuralsolver_tables("flow_matching" if is_flow else "ddpm")}
    return {PUBLISHED: own.with_tables([tables[bench.n]])} if bench.n in tables else {}


class Measuring:
    """Errors of solvers on fresh samples, each measured once.

    Args:
        opened: the pipeline.
        samples: how many.
        folder: of the errors.
    """

    def __init__(self, opened: Opened, samples: int, folder: Path) -> None:
        self.opened, self.folder = opened, folder
        self.pairs = opened.pairs(FRESH, samples)

    def errors(self, name: str, scheduler: Any, n: int, key: Any) -> Tensor:
        """(samples,) root mean square of the difference to the teacher's latent."""
        known = [self.opened.model, self.opened.call, self.opened.teacher.describe(), n, key, list(self.pairs.seeds)]
        file = self.folder / f"errors-{digest(known)}.json"
        if not file.exists():
            with judging(self.opened.pipe, self.pairs, self.opened.call) as arena:
                arena.memo.active = not scheduler.time_lifts  # which change what a network answers to the same input
                found = arena.errors(scheduler, n, range(len(self.pairs)))
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps({"solver": name, "errors": found.tolist()}).encode())
        return torch.tensor(json.loads(file.read_text(encoding="utf-8"))["errors"])


def compared(bench: Bench, learning: Learning, measuring: Measuring, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each method at one number of evaluations, and for the best classical solver."""
    n, own = bench.n, bench.opened.own
    free, tries = learning.best(METHODS[FREE])
    rows: dict[str, dict[str, Any]] = {}
    solvers: dict[str, tuple[Any, Any]] = {}
    for name in names:
        method = METHODS[name]
        base: Run | None = free if isinstance(method, Lift) else None
        run, runs = (free, tries) if name == FREE else learning.best(method, base)
        rows[name], solvers[name] = row(method, run, runs, base, n), (run.solver(), run.folder.name)
    rival = bench.chosen.rival
    solvers[CLASSICAL] = own.with_tables([rival.table]), rival.name
    rows[CLASSICAL] = {"solver": rival.name, "evaluations": bench.chosen.evaluations}
    for name, scheduler in published(bench).items():
        solvers[name], rows[name] = (scheduler, name), {}
    errors = {name: measuring.errors(name, *solver[:1], n, solver[1]) for name, solver in solvers.items()}
    against = errors.get(FREE)
    found = []
    for name, own_errors in errors.items():
        shown = {"subject": bench.opened.case.name, "method": name, "nfe": n}
        shown |= {"latent_rmse": float(own_errors.mean()), "latent_mse": float(own_errors.square().mean())}
        if name != FREE and against is not None:
            change = float((own_errors - against).mean())
            shown["paired"] = {"against": FREE, **difference(latent_rmse(), own_errors, against, change)}
        empty = {"parameters": 0, "pairs": 0, "evaluations": 0, "seconds": 0.0, "lr": None, "updates": None}
        found.append({**shown, **empty, "sequential": n, "tried": [], **rows[name]})
    return found


def merged(output: Path, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows with those that the file has of other subjects and numbers of evaluations."""
    new = {(r["subject"], r["nfe"]) for r in rows}
    old = read_results(output)["rows"] if output.exists() else []
    every = [*(r for r in old if (r["subject"], r["nfe"]) not in new), *rows]
    order = [*CASES]
    return sorted(every, key=lambda r: (order.index(r["subject"]), r["nfe"]))


def budget(args: argparse.Namespace, effort: Effort) -> int:
    """Print about how many evaluations of the network are ahead, and return their number."""
    lines: dict[str, dict[str, Any]] = {}
    for name in args.methods:
        known = {f"{n} NFE": effort.evaluations(METHODS[name], n) for n in args.steps}
        count = {f"numbers at {n}": numbers(METHODS[name], n) or "its network's" for n in args.steps}
        lines[name] = {"method": name, **count, **{k: f"{v:,}" for k, v in known.items()}}
    learning = sum(effort.evaluations(METHODS[name], n) for name in args.methods for n in args.steps)
    pairs = (effort.pairs + effort.held_out + effort.samples) * TEACHER_STEPS
    measuring = len(args.methods) * effort.samples * sum(args.steps)
    print(markdown([*lines.values()]))
    print(
        f"For each of {len(args.subjects)} subjects about {learning:,} evaluations of the network to learn, a backward "
        f"pass counted as one, {pairs:,} for the teacher's samples and {measuring:,} to measure. If a best rate is an "
        f"outermost one, up to {effort.most} are tried: then up to {effort.most / 3:.1f} times as many to learn.",
        flush=True,
    )
    return len(args.subjects) * (learning + pairs + measuring)


class Told:
    """Prints a line for each run, and when all will be done at this rate."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.before, self.started = total, 0, "", time.monotonic()

    def __call__(self, line: str) -> None:
        self.done += 1
        left = (time.monotonic() - self.started) / self.done * max(0, self.total - self.done)
        print(f"{self.done} of at least {self.total}: {self.before}{line}; about {left / 60:.0f} min left", flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=CASES, default=["emoji-sd", "emoji-flow"])
    parser.add_argument("--steps", nargs="+", type=int, default=[3, 5, 7], help="numbers of evaluations")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS], help="and DyWeight")
    for name, text in FLAGS.items():
        default = getattr(Effort(), name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=default, help=f"{text}; default: {default}"
        )
    parser.add_argument("--folder", type=Path, default=Path("build/peers"), help="of the artefacts and samples")
    parser.add_argument("--output", type=Path, default=Path("build/peers/peers.json"))
    parser.add_argument("--budget", action="store_true", help="only print what it will cost")
    args = parser.parse_args()
    if min(args.steps) < 2:
        parser.error(f"--steps {args.steps}: each must be at least 2, as one evaluation leaves nothing to choose.")
    args.methods = [name for name in METHODS if name == FREE or name in args.methods]
    return args


def main() -> None:
    args = parsed()
    effort = Effort(**{name: getattr(args, name) for name in FLAGS})
    budget(args, effort)
    if args.budget:
        return
    tries = sum(len(METHODS[name].rates) + METHODS[name].squares for name in args.methods)
    told, rows = Told(len(args.subjects) * len(args.steps) * tries), list[dict[str, Any]]()
    for case in (CASES[name] for name in args.subjects):
        folder = args.folder / case.name
        with opened(case, args.folder / "samples") as own:
            measuring = Measuring(own, effort.samples, folder / "errors")
            for n in args.steps:
                told.before = f"{case.name}, {n} evaluations, "
                bench = Bench(own, n, effort.pairs, effort.held_out, folder / "chosen")
                learning = Learning(bench, effort, folder / str(n), told)
                rows += compared(bench, learning, measuring, args.methods)
                command = shlex.join(["python", "examples/peers/peers.py", *sys.argv[1:]])
                write_results(args.output, merged(args.output, rows), command=command, effort=vars(effort))
    for name in args.subjects:
        print(f"{name}:\n\n{tables(rows, name)}\n")


if __name__ == "__main__":
    main()
