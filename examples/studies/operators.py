"""SpanLift on several bases (table 5) and with operators of several sizes (table 1), on the embedded pipelines.

Each line is a run of ``dywspan distill`` that differs in the settings below. Re-run the command to resume. Heun, which
table 5 has too, has two evaluations a step, and SpanLift here lifts solvers of one.

    python examples/studies/operators.py --plot build/studies/operators.png
"""

from __future__ import annotations

from claims import claim, report
from figures import errors_of_lines
from runs import Lines, arguments, better, study
from subjects import Subject

KERNELS = (1, 3, 5, 9)
BASES = ("euler", "ipndm", "dpmpp")


def lines(subject: Subject, steps: int) -> Lines:
    """By name, what differs from the pipeline's SpanLift configuration."""
    tables = f"{subject.model}-solvers"
    found = {f"on {base}": {"base": base} for base in BASES}
    return found | {f"{k}x{k} on DyWeight": {"base": tables, "operator": {"kernel": k}} for k in KERNELS}


def main() -> None:
    parser = arguments(__doc__, "operators", 5)
    args = parser.parse_args()
    rows = study(args, "spanlift", lines)
    lifted = [(f"{r['subject']}: {r['line']}", r["latent_rmse"], r["base_rmse"]) for r in rows]
    claims = [claim("table 5: SpanLift is better than its base", lifted)]
    name = "{0}x{0} on DyWeight".format
    expected = {
        "table 1: 3x3 is better than 1x1": [(name(3), name(1))],
        "table 1: 5x5 and 9x9 are better than 1x1": [(name(5), name(1)), (name(9), name(1))],
        "table 5: on DyWeight it is better than on classical bases": [(name(3), f"on {base}") for base in BASES],
    }
    claims += [claim(text, found) for text, pairs in expected.items() if (found := better(rows, pairs))]
    report(args.output, rows, claims, updates=args.updates)
    if args.plot:
        errors_of_lines(rows, args.plot, "SpanLift on several bases and with several operators")


if __name__ == "__main__":
    main()
