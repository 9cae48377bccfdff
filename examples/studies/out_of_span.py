"""Where SpanLift's correction goes, step by step (SpanLift table 6 and figure 4), on the embedded pipelines.

``dywspan analyze`` of the solvers that ship, and of those that ``operators.py`` learned on other bases, if any. V is
the span of the last three derivatives.

    python examples/studies/out_of_span.py --plot build/studies/out-of-span.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from claims import claim, report
from figures import out_of_span
from subjects import SUBJECTS, Subject

from dywspan.evaluate.analyze import analyze
from dywspan.schedulers.apply import load

CLASSICAL = ("ipndm-2m",)
LEAST, MOST = 0.84, 0.23  # the paper's share of the lift out of the span, and its size on DyWeight
ORDER = 3  # of the span, the paper's


def solvers(subject: Subject, learned: Path, steps: int) -> list[str]:
    """Classical solvers, and artefacts that have this number of steps."""
    artefacts = [Path(f"{subject.model}-solvers"), Path(f"{subject.model}-spanlift"), *sorted(learned.glob("*"))]
    names = [str(path) for path in artefacts if (path / "scheduler_config.json").exists()]
    known = {name: load(name) for name in names}
    return [*CLASSICAL, *(name for name, s in known.items() if steps in (getattr(s, "lifts", None) or s.tables))]


def study(subject: Subject, steps: Sequence[int], learned: Path, **options: Any) -> list[dict[str, Any]]:
    """The rows of ``dywspan analyze``, and in each the subject."""
    rows: list[dict[str, Any]] = []
    for n in steps:
        given = {"prompts": subject.held_out, "call": subject.call, "order": ORDER, **options}
        rows += analyze(subject.model, solvers(subject, learned, n), [n], **given)
    return [{"subject": subject.name, **row} for row in rows]


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What section 5.3 says, and what eqs. (7) and (8) let one expect."""
    cell = lambda r: f"{r['subject']}, {r['num_inference_steps']} steps, {r['solver']}, step {r['step']}"  # noqa: E731
    lifted = [row for row in rows if "lift_size" in row]
    shipped = [row for row in lifted if row["solver"].startswith("emoji")]
    found = [
        claim(
            "table 6: more than 84 % of the lift is out of the span",
            [(cell(r), LEAST, r["lift_out_of_span"]) for r in lifted],
        ),
        claim(
            "figure 4: on DyWeight the lift is below 23 % of the step",
            [(cell(r), r["lift_size"], MOST) for r in shipped],
        ),
    ]
    sums: dict[tuple[Any, ...], float] = {}
    ends: dict[tuple[Any, ...], float] = {}
    for row in rows:
        key = row["subject"], row["num_inference_steps"], row["solver"].removeprefix(f"{row['subject']}-")
        sums[key] = sums.get(key, 0) + row["in_span"]
        ends[key] = row["end_rmse"]

    def compared(values: dict[tuple[Any, ...], float], name: str, other: str) -> list[tuple[Any, float, float]]:
        return [(key, value, values[(*key[:2], other)]) for key, value in values.items() if key[2] == name]

    found += [
        claim(
            "eq. (7): DyWeight's in-span mismatch, summed over steps, is below iPNDM's",
            compared(sums, "solvers", "iPNDM(2M)"),
        ),
        claim("DyWeight's endpoint is better than iPNDM's", compared(ends, "solvers", "iPNDM(2M)")),
        claim("SpanLift's endpoint is better than DyWeight's", compared(ends, "spanlift", "solvers")),
    ]
    last = [r for r in lifted if r["step"] == r["num_inference_steps"] - 1]
    below = [(cell(r), r["error"], r["out_of_span"]) for r in last]
    found.append(claim("eq. (8): SpanLift's last step is better than any weights", below))
    gained = [(cell(r), 0, r["gap_closed"]) for r in last]
    return [*found, claim("SpanLift's last step is better than its base's", gained)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=[*SUBJECTS])
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--substeps", type=int, default=6, help="of the exact solution in each step")
    parser.add_argument("--learned", type=Path, default=Path("build/studies/operators"), help="what operators.py wrote")
    parser.add_argument("--output", default="build/studies/out-of-span.json")
    parser.add_argument("--plot", type=Path, help="draw table 6 and figure 4 here (PNG, SVG or PDF)")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.subjects:
        options = {"samples": args.samples, "substeps": args.substeps}
        rows += study(SUBJECTS[name], args.steps, args.learned / name, **options)
    report(args.output, rows, claims(rows), samples=args.samples, substeps=args.substeps, order=ORDER)
    if args.plot:
        out_of_span(rows, args.plot)


if __name__ == "__main__":
    main()
