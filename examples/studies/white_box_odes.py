"""Classical and optimised Adams-Bashforth weights on ODEs whose solution is known (DyWeight 3.2 and D.1).

    y' = y*'(t) + A (y - y*(t)),   y*(t) = C [1, t, ..., t^K]   (eqs. (A.16)-(A.17)),   0 <= t <= 1,   50 dimensions

C ~ N(0, 4), A ~ N(0, (0.1 / sqrt(50))^2) - 0.5 I. A solver of order O starts from O exact states and takes S - O + 1
steps. An optimised solver learns a row of weights for each step and problem: Adam, 2,000 updates at 1e-3, error of the
last state. All 400 problems of a solver are one batch in float64.

    python examples/studies/white_box_odes.py --plot build/studies/white-box.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from claims import claim, report
from figures import white_box
from polynomial_odes import Problems
from torch import Tensor
from tqdm import tqdm

from dywspan.core.bases import ipndm

ORDERS, TEACHER = (1, 2, 3, 4), ("teacher", 4, 100)


class Run:
    """Solvers of one order and number of steps on some problems."""

    def __init__(self, problems: Problems, steps: int, order: int) -> None:
        self.steps, self.order, self.leave = steps, order, problems.leave
        exact, rates = problems.solution(steps)
        self.size = exact[-1].norm(dim=1)
        self.moves, self.rates = problems.enter @ exact.diff(dim=0), problems.enter @ rates / steps
        self.growth, self.turn = problems.growth / steps, problems.turn / steps
        grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        rows = ipndm(grid, torch.ones_like(grid), order)[order - 1 :, :, None, None, None]
        self.classical = rows.expand(-1, -1, len(problems.leave), 1, exact.shape[-1])

    def error(self, weights: Tensor) -> Tensor:
        """(P, D, G) y(1) - y*(1) by (S - O + 1, O, P, 1, G) weights. The error alone is integrated."""
        history, error = [*self.rates[: self.order - 1].flip(0)], torch.zeros_like(self.moves[0])
        for n, row in enumerate(weights, self.order - 1):
            slope = torch.addcmul(self.rates[n], self.growth, error)
            slope = torch.addcmul(slope, self.turn, error.roll(error.shape[1] // 2, 1))
            history, error = [slope, *history][: self.order], error - self.moves[n]
            for weight, past in zip(row, history):
                error = torch.addcmul(error, weight, past)
        return self.leave @ error

    def optimised(self, updates: int) -> Tensor:
        """Weights that Adam finds from the classical ones."""
        weights = self.classical.clone().requires_grad_()
        adam = torch.optim.Adam([weights], lr=1e-3)
        for _ in range(updates):
            adam.zero_grad()
            self.error(weights).square().mean(1).sum().backward()
            adam.step()
        return weights.detach()

    def relative(self, weights: Tensor) -> list[float]:
        """Of each degree, the mean over problems of |y(1) - y*(1)| / |y*(1)|."""
        return (self.error(weights).norm(dim=1) / self.size).mean(0).tolist()


def study(degrees: Sequence[int], steps: Sequence[int], problems: Problems, updates: int) -> list[dict[str, Any]]:
    """A row for each solver and degree."""
    solvers = [TEACHER, *((kind, o, s) for s in steps for o in ORDERS for kind in ("standard", "optimised"))]
    rows: list[dict[str, Any]] = []
    for kind, order, s in tqdm(solvers, desc="solvers", leave=False):
        run = Run(problems, s, order)
        errors = run.relative(run.optimised(updates) if kind == "optimised" else run.classical)
        rows += [{"solver": kind, "order": order, "steps": s, "degree": k, "error": e} for k, e in zip(degrees, errors)]
    return rows


def observations(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The paper's four, as comparisons of cells (solver, order, steps, degree)."""
    e = {(r["solver"], r["order"], r["steps"], r["degree"]): r["error"] for r in rows}
    found = []
    for kind in ("standard", "optimised"):
        cells = sorted(cell for cell in e if cell[0] == kind)
        for text, axis, better in (
            ("1. {}: the next higher order has a lower error", 1, 1),
            ("2. {}: the next lower degree has a lower error", 3, 0),
            ("2. {}: the next more steps have a lower error", 2, 1),
        ):
            values = pairwise(sorted({cell[axis] for cell in cells}))
            pairs = [
                [(*c[:axis], v, *c[axis + 1 :]) for v in pair] for pair in values for c in cells if c[axis] == pair[0]
            ]
            compared = [(f"{p[better]} and {p[1 - better]}", e[p[better]], e[p[1 - better]]) for p in pairs]
            found.append(claim(text.format(kind), compared))
    better = [(cell, e[("optimised", *cell[1:])], e[cell]) for cell in e if cell[0] == "standard"]
    teacher = [(cell, e[cell], 0.01) for cell in e if cell[0] == "teacher"]
    found.append(claim("3. optimised has a lower error than standard", better))
    return [*found, claim("4. AB-4 with 100 steps has an error below 0.01", teacher)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--degrees", type=int, nargs="+", default=[*range(5, 41, 5)])
    parser.add_argument("--steps", type=int, nargs="+", default=[*range(6, 21, 2)])
    parser.add_argument("--problems", type=int, default=50)
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="build/studies/white-box.json")
    parser.add_argument("--plot", type=Path, help="figure 3 here, and figure A.2 beside it (PNG, SVG or PDF)")
    args = parser.parse_args()
    rows = study(args.degrees, args.steps, Problems.random(args.degrees, args.problems, args.seed), args.updates)
    report(args.output, rows, observations(rows), problems=args.problems, updates=args.updates, seed=args.seed)
    if args.plot:
        white_box(rows, args.plot)


if __name__ == "__main__":
    main()
