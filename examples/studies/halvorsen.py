"""What scalar weights cannot reach, on one step of the Halvorsen system from t = 1.8 to 2.0 (SpanLift figure 3).

    x' = -a x - 4 y - 4 z - y^2, and the same with x, y, z exchanged in turn;  a = 1.89

With K = 2 derivatives u_i = u(x(1.8)) and u_{i-1} = u(x(1.6)), weights reach a plane V of the three dimensions. Three
solvers take the step: Adams-Bashforth; DyWeight, two weights learned for all starts; SpanLift, the same and a small
network of (x_i, u_i, u_{i-1}). Both learn from the exact step of 512 starts near one, and are measured on 256 others.

    python examples/studies/halvorsen.py --plot build/studies/halvorsen.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from claims import claim, report
from figures import halvorsen as draw
from torch import Tensor, nn

from dywspan.core.span import norm, project

START = -1.48, -1.51, 2.04  # the mean state at t = 0
TIMES, SIZE = (1.6, 1.8, 2.0), 0.2
PARTS = "mismatch", "in_span", "out_of_span", "floor"


class Steps(NamedTuple):
    """The step of many starts: (B, 3) each.

    Attributes:
        state: x_i.
        derivatives: u_i, u_{i-1}.
        exact: Delta* = (x(2.0) - x_i) / h, eq. (6).
    """

    state: Tensor
    derivatives: tuple[Tensor, Tensor]
    exact: Tensor


def velocity(x: Tensor, a: float = 1.89) -> Tensor:
    """The system's right side."""
    y, z = x.roll(-1, 1), x.roll(-2, 1)
    return -a * x - 4 * y - 4 * z - y**2


def integrate(x: Tensor, time: float, size: float = 2e-3) -> Tensor:
    """Runge-Kutta of order 4 in steps of ``size``."""
    for _ in range(round(time / size)):
        k1 = velocity(x)
        k2 = velocity(x + size / 2 * k1)
        k3 = velocity(x + size / 2 * k2)
        x = x + size / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(x + size * k3))
    return x


def steps(count: int, seed: int, spread: float) -> Steps:
    """The exact step of ``count`` random starts, the first of which is the mean one."""
    noise = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise[0] = 0
    before = integrate(torch.tensor(START, dtype=torch.float64) + spread * noise, TIMES[0])
    state = integrate(before, TIMES[1] - TIMES[0])
    after = integrate(state, TIMES[2] - TIMES[1])
    return Steps(state, (velocity(state), velocity(before)), (after - state) / SIZE)


def weighted(own: Steps, weights: Tensor) -> Tensor:
    """sum_j w_j u_{i-j}, eq. (5)."""
    return sum((w * u for w, u in zip(weights, own.derivatives)), torch.zeros_like(own.state))


def learned_operator(own: Steps, base: Tensor, updates: int) -> Callable[[Steps], Tensor]:
    """R_phi of three numbers without neighbours, by Adam on the error of the step; zero before it learns."""
    torch.manual_seed(0)
    joined = lambda steps: torch.cat([steps.state, *steps.derivatives], 1)  # noqa: E731
    mean, deviation, size = joined(own).mean(0), joined(own).std(0), own.exact.std()
    last = nn.Linear(64, 3)
    layers = nn.Sequential(nn.Linear(9, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), last).double()
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    adam = torch.optim.Adam(layers.parameters(), lr=3e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, updates)
    operator = lambda steps: size * layers((joined(steps) - mean) / deviation)  # noqa: E731
    for _ in range(updates):
        adam.zero_grad()
        (own.exact - base - operator(own)).square().mean().backward()
        adam.step()
        rate.step()
    return operator


def measure(spread: float, updates: int, count: int = 256) -> tuple[Steps, dict[str, Tensor], list[dict[str, Any]]]:
    """The measured starts, each solver's step of them, and a row for each solver and start: squares, as in eq. (7)."""
    train, test = steps(2 * count, 1, spread), steps(count, 0, spread)
    basis = torch.stack([u.flatten() for u in train.derivatives], 1)
    weights = torch.linalg.lstsq(basis, train.exact.flatten()[:, None]).solution[:, 0]
    moves = {"Adams-Bashforth": weighted(test, torch.tensor([1.5, -0.5])), "DyWeight": weighted(test, weights)}
    operator = learned_operator(train, weighted(train, weights), updates)
    moves["SpanLift"] = moves["DyWeight"] + operator(test).detach()
    inside = project(test.exact, test.derivatives)
    rows: list[dict[str, Any]] = []
    for name, move in moves.items():
        missed, within = test.exact - move, inside - project(move, test.derivatives)
        parts = zip(PARTS, (missed, within, missed - within, test.exact - inside))
        squares = {key: norm(v).square().tolist() for key, v in parts}
        rows += [{"solver": name, "start": k, **{key: v[k] for key, v in squares.items()}} for k in range(count)]
    return test, moves, rows


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What figure 3 says."""
    by = {(row["solver"], row["start"]): row for row in rows}
    weights = [row for row in rows if row["solver"] != "SpanLift"]
    split = [(r["start"], abs(r["mismatch"] - r["in_span"] - r["floor"]), 1e-9 * r["mismatch"]) for r in weights]
    above = [(r["start"], r["floor"], r["mismatch"] * (1 + 1e-12)) for r in weights]
    below = [(r["start"], r["mismatch"], r["floor"]) for r in rows if r["solver"] == "SpanLift"]
    pairs = [
        (k, r["in_span"], by["Adams-Bashforth", k]["in_span"]) for (name, k), r in by.items() if name == "DyWeight"
    ]
    return [
        claim("eq. (7): mismatch^2 = in-span^2 + out-of-span^2, by weights", split),
        claim("eq. (8): no weights have a mismatch below the floor", above),
        claim("learned weights have a smaller in-span mismatch", pairs),
        claim("SpanLift's mismatch is below the floor", below),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spread", type=float, default=0.03, help="deviation of the starts")
    parser.add_argument("--updates", type=int, default=1000, help="of the operator, all starts each")
    parser.add_argument("--output", default="build/studies/halvorsen.json")
    parser.add_argument("--plot", type=Path, help="draw the mean start's step here (PNG, SVG or PDF)")
    args = parser.parse_args()
    test, moves, rows = measure(args.spread, args.updates)
    means: list[dict[str, Any]] = []
    for name in moves:
        own = [r for r in rows if r["solver"] == name]
        means.append({"solver": name, **{key: sum(r[key] for r in own) / len(own) for key in PARTS}})
    report(args.output, means, claims(rows), first=[r for r in rows if r["start"] == 0], spread=args.spread)
    if args.plot:
        draw(test, moves, means, args.plot)


if __name__ == "__main__":
    main()
