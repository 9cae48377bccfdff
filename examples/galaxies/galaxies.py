"""Galaxies in 3, 5 and 7 evaluations: solvers learned for score networks that others trained and published.

    pip install --no-deps galaxygrad==0.2.1
    python examples/galaxies/galaxies.py build     # the networks as diffusers pipelines, into build/galaxies
    python examples/galaxies/galaxies.py learn     # tables for them, into build/galaxies
    python examples/galaxies/galaxies.py lift      # SpanLift on the tables that ship, into build/galaxies
    python examples/galaxies/galaxies.py measure   # those that ship, beside the best classical solver, on fresh noise

The pipelines are ordinary ones. Their network is of a class of its own, which every command is told:

    dywspan --import examples/galaxies/score_network.py tune build/galaxies/hsc64 --steps 5
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from score_network import pipeline, stretched
from torch import Tensor
from torch.nn.functional import pad

from dywspan import DyWeightScheduler, SpanLiftScheduler
from dywspan.distill.config import LearningConfig
from dywspan.distill.lift import LiftStudent
from dywspan.distill.losses import make_loss
from dywspan.distill.student import TableStudent
from dywspan.distill.task import Task, Term
from dywspan.distill.trainer import distill, learn
from dywspan.evaluate.metrics import latent_rmse
from dywspan.evaluate.paired import with_pairs
from dywspan.evaluate.report import write_results
from dywspan.evaluate.rivals import SELECT, best_classical, candidates, judging
from dywspan.evaluate.statistics import interval
from dywspan.pipelines.arena import Arena
from dywspan.pipelines.pairs import Pairs, make_pairs
from dywspan.pipelines.rollout import load_pipeline
from dywspan.pipelines.teacher import Teacher, find_teacher
from dywspan.plot import picture
from dywspan.schedulers.apply import load
from dywspan.text import markdown

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent.parent / "docs"
# Seeds of the first sample, far from each other.
TRAIN, HELD_OUT, FRESH = 2 * 10**6, 10**6, 5 * 10**6
SHOWN = (3, 5)  # numbers of evaluations that the picture shows
COLUMNS = 6  # samples that it shows


class Galaxies:
    """One network: its pipeline, and samples of the reference, 100 steps of iPNDM(4M)."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.pipe = load_pipeline(str(folder / name))
        self.own = DyWeightScheduler.from_config(self.pipe.scheduler)
        self.teacher: Teacher = find_teacher(self.pipe, "ipndm", 100, 4)
        self.loss = make_loss(self.pipe, "rmse")

    def pairs(self, first: int, count: int) -> Pairs:
        """Noise of these seeds, and where the reference ends."""
        seeds = range(first, first + count)
        return make_pairs(
            self.pipe, self.teacher, [{}] * count, seeds, call={}, batch_size=8, cache=self.folder / "cache"
        )

    def term(self, n: int, train: int, held_out: int) -> Term:
        """What n steps are learned from."""
        return Term(n, {}, self.pairs(TRAIN, train), self.pairs(HELD_OUT, held_out))

    # ------------------------------------------------------------------ learning

    def learn_table(self, term: Term, config: LearningConfig) -> DyWeightScheduler:
        """A table, by least squares from the best classical solver."""
        with judging(self.pipe, cast(Any, term.train)[: SELECT[1]], {}) as arena:
            best = best_classical(self.pipe, arena, term.steps)
        missing = max(0, min(config.order, term.steps) - best.table.weights.shape[1])
        student = TableStudent(self.own, replace(best.table, weights=pad(best.table.weights, (0, missing))))
        progress = learn(Task(self.pipe, self.teacher, [term], config, self.loss), student)
        return student.result(lambda name: {**progress.provenance(name), "start": best.name})

    def learn_lift(
        self, base: DyWeightScheduler, term: Term, config: LearningConfig, operator: Mapping[str, int]
    ) -> SpanLiftScheduler:
        """SpanLift on a table."""
        options: dict[str, Any] = {"solver": "spanlift", "base": base, "operator": operator, "name": str(term.steps)}
        return distill(Task(self.pipe, self.teacher, [term], config, self.loss, **options))

    # ------------------------------------------------------------------ measuring

    def solvers(self, arena: Arena, n: int, learned: Path) -> dict[str, Any]:
        """What is compared at n evaluations, by name: the best classical solver of those to learn from, and ours."""
        table = load(str(learned / f"{self.name}-solvers"))
        start = table.tables[n].provenance["start"]
        rival = next(own for own in candidates(self.pipe, arena, n) if own.name == start)
        found = {f"{start} (best classical)": self.own.with_tables([rival.table]), "DyWeight (learned)": table}
        if (folder := learned / f"{self.name}-spanlift").exists() and n in (lifted := load(str(folder))).lifts:
            found["SpanLift (learned)"] = lifted
        return found

    def measure(self, steps: Sequence[int], samples: int, learned: Path) -> tuple[list[dict[str, Any]], Any]:
        """A row for each number of evaluations that was learned and solver; and rows of a picture."""
        pairs, metric = self.pairs(FRESH, samples), latent_rmse()
        rows: list[dict[str, Any]] = []
        kept: list[dict[str, Tensor]] = []
        drawn = [(f"{self.name.upper()}, 100 evaluations", pairs.endpoints[:COLUMNS])]
        with judging(self.pipe, pairs, {}) as arena:
            for n in sorted({*steps} & load(str(learned / f"{self.name}-solvers")).tables.keys()):
                for name, scheduler in self.solvers(arena, n, learned).items():
                    errors = arena.errors(scheduler, n, range(samples))
                    row = {"network": self.name, "solver": name, "nfe": n, "latent_rmse": float(errors.mean())}
                    row |= {"median": float(errors.median()), "interval": [*interval(metric, errors[:, None])]}
                    rows.append(row | {"samples": samples, "learned": name.endswith("(learned)")})
                    kept.append({"latent_rmse": errors})
                    if n in SHOWN:
                        drawn.append(
                            (f"{name.rpartition(' (')[0]}, {n}", arena.endpoints(scheduler, n, range(COLUMNS)))
                        )
        return with_pairs(rows, kept, [metric]), drawn


# ------------------------------------------------------------------------------------------------------------ commands


def build(args: argparse.Namespace) -> None:
    """Save the networks of the installed galaxygrad as diffusers pipelines."""
    for name in args.networks:
        pipeline(name).save_pretrained(args.folder / name)
        print(f"{args.folder / name}: a DDPMPipeline")


def learn_tables(args: argparse.Namespace) -> None:
    """Learn a table for each number of steps."""
    config = LearningConfig(
        optimizer="least_squares",
        updates=args.updates,
        evaluate_every=args.evaluate_every,
        batch_size=args.batch_size,
        order=3,
        patience=3,
    )
    for own, n in _each(args):
        learned = own.learn_table(own.term(n, args.pairs, args.held_out), config)
        _save(args.folder / f"{own.name}-solvers", learned, TableStudent.merge)
        _say(own, n, learned.tables[n])


def learn_lifts(args: argparse.Namespace) -> None:
    """Learn SpanLift on each table."""
    config = LearningConfig(
        updates=args.updates,
        evaluate_every=args.evaluate_every,
        batch_size=args.batch_size,
        order=3,
        lr=args.lr,
        recompute=False,
    )
    for own, n in _each(args):
        base, term = load(str(args.base / f"{own.name}-solvers")), own.term(n, args.pairs, args.held_out)
        lifted = own.learn_lift(base.with_tables([base.tables[n]]), term, config, {"width": args.width})
        _save(args.folder / f"{own.name}-spanlift", lifted, LiftStudent.merge)
        _say(own, n, lifted.lifts[n])


def _each(args: argparse.Namespace) -> Iterator[tuple[Galaxies, int]]:
    for own in (Galaxies(name, args.folder) for name in args.networks):
        yield from ((own, n) for n in args.steps)


def _save(folder: Path, new: Any, merge: Callable[[Any, Any], Any]) -> None:
    """With what is there for other numbers of steps."""
    (merge(load(str(folder)), new) if folder.exists() else new).save_pretrained(folder)


def _say(own: Galaxies, n: int, part: Any) -> None:
    error = part.provenance["held_out_error"]
    print(f"{own.name}, {n} steps: held-out error {error['before']:.4f} -> {error['after']:.4f}", flush=True)


def measure(args: argparse.Namespace) -> None:
    """Compare the learned solvers with the best classical one on fresh noise: results, a table and a picture."""
    rows: list[dict[str, Any]] = []
    sheets: list[tuple[str, Any]] = []
    for name in args.networks:
        own, drawn = Galaxies(name, args.folder).measure(args.steps, args.samples, args.solvers)
        rows += own
        sheets += [(label, [stretched(x) for x in images]) for label, images in drawn] + [("", [])]
    command = shlex.join(["python", "examples/galaxies/galaxies.py", *sys.argv[1:]])
    reference = {"solver": "ipndm", "solver_order": 4, "steps": 100}
    write_results(args.output, rows, command=command, reference=reference)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    # As few levels of grey as the eye tells apart make a small file.
    picture(sheets[:-1], [""] * COLUMNS).quantize(24).save(args.picture, optimize=True)
    print(summary(rows))


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each network and number of evaluations."""
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault((row["network"], row["nfe"]), {"network": row["network"], "NFE": row["nfe"]})
        if row["learned"]:
            name, found = row["solver"].removesuffix(" (learned)"), row["paired_classical"]["latent_rmse"]
            line[name] = f"{row['latent_rmse']:.4f}"
            line[f"{name}, difference (95 %)"] = (
                f"{found['difference']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"
            )
        else:
            line["best classical solver of all"] = row["solver"].removesuffix(" (best classical)")
            line["its error"] = f"{row['latent_rmse']:.4f}"
    empty = {name: "" for line in lines.values() for name in line}
    return markdown([empty | line for line in lines.values()])


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=run.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run)
        sub.add_argument("--networks", nargs="+", default=["hsc64", "ztf64"], help="also hsc32 and ztf32")
        sub.add_argument("--folder", type=Path, default=Path("build/galaxies"), help="of the pipelines, and of results")
        if run is not build:
            sub.add_argument("--steps", type=int, nargs="+", default=[3, 5, 7])
        return sub

    command("build", build)
    for name, run, updates, every in (("learn", learn_tables, 20, 5), ("lift", learn_lifts, 150, 20)):
        sub = command(name, run)
        sub.add_argument("--pairs", type=int, default=64, help="to learn from")
        sub.add_argument("--held-out", type=int, default=32, help="pairs that say which solver was best on the way")
        sub.add_argument("--updates", type=int, default=updates, help="at most")
        sub.add_argument(
            "--evaluate-every", type=int, default=every, help="updates between looks at the held-out pairs"
        )
        sub.add_argument("--batch-size", type=int, default=8, help="pairs of an update")
    sub.add_argument("--base", type=Path, default=HERE, help="where the tables are")
    sub.add_argument("--lr", type=float, default=5e-4)
    sub.add_argument("--width", type=int, default=16, help="of the operator")
    sub = command("measure", measure)
    sub.add_argument("--solvers", type=Path, default=HERE, help="where the learned ones are")
    sub.add_argument("--samples", type=int, default=64, help="to measure on")
    sub.add_argument("--output", type=Path, default=DOCS / "results" / "galaxies.json")
    sub.add_argument("--picture", type=Path, default=DOCS / "images" / "galaxies.png")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
