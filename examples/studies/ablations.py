"""DyWeight's ablations on the embedded pipelines (figure 6, tables 5 and A.2 to A.4).

Each line is a run of ``dywspan distill`` that differs in the settings below. Re-run the command to resume. Whatever a
line learned from, all are measured by 100 steps of iPNDM(2M). The loss is that of latents, where the paper has FID.

    python examples/studies/ablations.py --plot build/studies/ablations.png
"""

from __future__ import annotations

from typing import Any

from claims import claim, report
from figures import errors_of_lines
from runs import Lines, arguments, better, study
from subjects import Subject

WHOLE = "DyWeight"
FIXED: dict[str, dict[str, Any]] = {
    WHOLE: {},
    "without shifting": {"time_shifting": False},  # figure 6 (a, b)
    "without scaling": {"time_scaling": False},
    "without both": {"time_shifting": False, "time_scaling": False},
    "64 pairs": {"pairs": 64},  # figure 5 and table A.4
    "256 pairs": {"pairs": 256},
    "from Euler": {"init": "euler"},  # table A.3
    "from uniform weights": {"init": "uniform"},
    "path supervision": {"path_substeps": 5},  # table A.2
    "teacher of 20 steps": {"teacher_steps": 20},  # table 5
    "teacher of 100 steps": {"teacher_steps": 100},
    "teacher Heun, 25 steps": {"teacher": "heun", "teacher_steps": 25},
    "teacher DPM-Solver-2, 25 steps": {"teacher": "dpm2", "teacher_steps": 25},
}
GRIDS: dict[str, dict[str, dict[str, Any]]] = {  # table A.3, beside each pipeline's own
    "emoji-sd": {
        "polynomial grid": {"name": "polynomial", "sigma_min": 0.0292, "sigma_max": 14.6146},
        "log-SNR grid": {"name": "logsnr", "sigma_min": 0.0292, "sigma_max": 14.6146},
    },
    "emoji-flow": {
        "grid of shift 1": {"name": "flow", "shift": 1.0},
        "grid of shift 3": {"name": "flow", "shift": 3.0},
    },
}


def lines(subject: Subject, steps: int) -> Lines:
    """By name, what differs from the DyWeight configuration: K = 2, from iPNDM, a teacher of 50 steps."""
    orders = {f"K = {k}": {"order": k} for k in range(1, steps + 1) if k != 2}  # figure 6 (c)
    grids = {name: {"grid": grid} for name, grid in GRIDS[subject.name].items()}
    return {**FIXED, **orders, **grids}


def main() -> None:
    parser = arguments(__doc__, "ablations", 5)
    args = parser.parse_args()
    rows = study(args, "dyweight", lines)
    expected = {
        "figure 6: shifting and scaling are better than neither": [(WHOLE, "without both")],
        "figure 6: each is better than neither": [(f"without {v}", "without both") for v in ("shifting", "scaling")],
        "figure 6: both are better than one": [(WHOLE, f"without {v}") for v in ("shifting", "scaling")],
        "figure 6: K = 2 and 3 are better than K = 1": [(WHOLE, "K = 1"), ("K = 3", "K = 1")],
        "figure 6: K = 3 is better than K = N": [("K = 3", f"K = {args.steps}")],
        "table A.2: endpoint supervision is better than path supervision": [(WHOLE, "path supervision")],
        "table A.3: iPNDM's weights are a better start": [(WHOLE, "from Euler"), (WHOLE, "from uniform weights")],
        "table A.4: more pairs are better": [(WHOLE, "256 pairs"), ("256 pairs", "64 pairs")],
    }
    claims = [claim(text, found) for text, pairs in expected.items() if (found := better(rows, pairs))]
    base = {row["subject"]: row["latent_rmse"] for row in rows if row["line"] == WHOLE}
    near = [(f"{r['subject']}: {r['line']}", abs(r["latent_rmse"] / base[r["subject"]] - 1), 0.05)
            for r in rows if r["line"].startswith("teacher") and r["subject"] in base]  # fmt: skip
    if near:
        claims.append(claim("table 5: another teacher changes the error by less than 5 %", near))
    report(args.output, rows, claims, updates=args.updates)
    if args.plot:
        errors_of_lines(rows, args.plot, "DyWeight's ablations")


if __name__ == "__main__":
    main()
