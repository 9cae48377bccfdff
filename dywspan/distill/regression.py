"""Where a table's learning can start from: each row alone, by linear least squares on a teacher's path.

w_i = argmin sum over pairs |x_i + h_i sum_j w_ij d_{i-j} - x*_{i+1}|^2,    sum_j w_ij = 1 but in the last row

x* is the teacher's state at the next level; x_i and d are those of the rows found before, on the solver's own path, so
that a row also mends what those before it left. Rows that sum to 1 keep the levels nominal, where the teacher's states
are. N samplings of a few pairs, each a step longer than the last, forward passes only. A continuous table is fitted to
the rows of several numbers of steps, each as far as its own equations care.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.continuous import FEATURES, ContinuousTable, differences, features
from ..core.table import SolverTable
from ..pipelines.pairs import Pairs
from ..pipelines.precision import autocast
from ..pipelines.processes import in_turn, total
from ..pipelines.rollout import sample
from ..schedulers.dyweight import DyWeightScheduler


@dataclass(frozen=True)
class Row:
    """Normal equations of one step, in units of its size h.

    Attributes:
        products: (1 + U, 1 + U) of what an Euler step lacks, and of U directions that can make it up: [d_i in the last
            step,] d_{i-1} - d_i, d_{i-2} - d_i, ...
        found: (U,) their solution.
        size: h.
    """

    products: Tensor
    found: Tensor
    size: float


def regress(
    pipe: Any,
    table: SolverTable,
    paths: Pairs,
    call: Mapping[str, Any],
    *,
    batch_size: int = 16,
    mixed_precision: str | None = None,
) -> SolverTable:
    """The table with weights found row by row; its grid and time scale stay.

    Args:
        table: of N steps, without AFS.
        paths: a teacher's states at the N levels after the first of the table's grid, see :class:`Teacher`.
        batch_size: pairs at a time; the result does not depend on it.

    Raises:
        ValueError: no paths, paths of another number of steps, or a table with AFS, whose first state is never seen.
    """
    return _fit(pipe, table, paths, call, batch_size, mixed_precision)[0]


def regress_continuous(
    pipe: Any,
    function: ContinuousTable,
    paths: Mapping[int, Pairs],
    call: Mapping[str, Any],
    *,
    batch_size: int = 16,
    mixed_precision: str | None = None,
) -> ContinuousTable:
    """The function whose tables are nearest to those found row by row; its time scale stays 1.

        c = argmin sum over n, i of h_ni^2 / E_n |v_ni(c) - v*_ni|^2 in the products of row i

    v are a row's coefficients in its directions, to first order in c, v* those found, E_n = sum_i h_ni^2 |lack|^2. The
    levels stay, and only the last step's length is free, as in :func:`regress`.

    Args:
        paths: by number of steps, see :func:`regress`.
    """
    order, prediction = function.order, DyWeightScheduler.from_config(pipe.scheduler).host.prediction
    free = torch.zeros(order, len(FEATURES), dtype=torch.bool)
    free[0, FEATURES.index("last")], free[1:] = True, True
    start = replace(function, coefficients=torch.zeros_like(function.coefficients))
    left = 1e-9 * torch.eye(int(free.sum()), dtype=torch.float64)
    right = torch.zeros(len(left), dtype=torch.float64)
    for n, own in paths.items():
        nominal = SolverTable.initial(n, order, dict(function.grid), prediction, base="euler")
        _, levels, rows = _fit(pipe, nominal, own, call, batch_size, mixed_precision)
        base, phi = start.table(n, prediction, sigmas=levels).weights, features(levels, prediction.signal(levels))
        fades, scale = function.fades(n)[:order], sum(row.size**2 * float(row.products[0, 0]) for row in rows)
        for i, row in enumerate(rows):
            moves = torch.stack([base[i], *differences(order)[1:]], 1)  # (K, K): of w_ij by correction m
            slope = (moves * fades)[..., None] * phi[i]
            slope[:, i + 1 :] = 0  # there are i + 1 derivatives
            a, v = (_along(w, i, i == n - 1) for w in (slope[:, free], base[i]))
            products = row.size**2 / scale * row.products[1:, 1:]
            left += a.T @ products @ a
            right += a.T @ (products @ (row.found - v + _along(torch.eye(order)[0].double(), i, i == n - 1)))
    coefficients = torch.zeros_like(function.coefficients)
    coefficients[:order][free] = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
    return replace(function, coefficients=coefficients)


def _along(weights: Tensor, i: int, is_last: bool) -> Tensor:
    """Of (K, ...) weights of row i, what counts along the row's directions: [their sum,] w_i1, w_i2, ..."""
    older = weights[1 : i + 1]
    return torch.cat([weights.sum(0, keepdim=True), older]) if is_last else older


@torch.no_grad()
def _fit(
    pipe: Any, table: SolverTable, paths: Pairs, call: Mapping[str, Any], batch_size: int, precision: str | None
) -> tuple[SolverTable, Tensor, list[Row]]:
    """The table, the levels of its states, and the equations of its rows."""
    (n, order), states = table.weights.shape, paths.targets
    if not paths.is_path or states[[0]].shape[1] != n or table.afs:
        raise ValueError(f"Regression on {n} steps needs teacher paths of {n} states, and a table without afs.")
    scheduler = _Remembering.from_config(pipe.scheduler)
    weights, rows = torch.zeros_like(table.weights), []
    weights[:, 0] = 1  # steps to come are Euler's until it is their turn
    for i in range(n):
        scheduler.tables = {n: replace(table, weights=weights.clone())}
        is_last = i == n - 1
        count = min(i + 1, order) - 1 + is_last  # unknowns
        products = torch.zeros(count + 1, count + 1, dtype=torch.float64)
        for j, counts in in_turn(-(-len(paths) // batch_size)):
            part = paths[j * batch_size : (j + 1) * batch_size]
            with autocast(pipe, precision):
                vectors = _lack_and_directions(pipe, scheduler, i, is_last, part, call)
            products += counts * (vectors @ vectors.T).cpu()
        products = total(products)
        found = torch.linalg.lstsq(products[1:, 1:], products[1:, :1]).solution[:, 0]
        older = found[is_last:]
        weights[i, 1 : 1 + len(older)] = older
        weights[i, 0] += found[:is_last].sum() - older.sum()
        rows.append(Row(products, found, float(scheduler.plan.schedule.sizes[i])))
    return replace(table, weights=weights), scheduler.plan.schedule.levels, rows


class _Remembering(DyWeightScheduler):
    """Its past derivatives can be looked at when a run has ended."""

    def _ended(self) -> None:
        pass


def _lack_and_directions(
    pipe: Any, scheduler: DyWeightScheduler, i: int, is_last: bool, part: Pairs, call: Mapping[str, Any]
) -> Tensor:
    """(1 + U, B * D) float64, see :class:`Row`."""
    seen: list[Tensor] = []

    def watch(step: int, prev_sample: Tensor) -> None:
        if step == i:
            assert scheduler.plan is not None
            seen.extend([scheduler.plan.state_after(step, prev_sample), *scheduler.state.history])

    (steps,) = scheduler.tables
    sample(pipe, scheduler, steps, part.inputs, part.seeds, call, watch=watch, until=i + 1)
    after, newest, *older = (v.double() for v in seen)
    assert isinstance(part.targets, Tensor) and scheduler.plan is not None
    lacks = (part.targets[:, i].to(after) - after) / float(scheduler.plan.schedule.sizes[i])
    vectors = [lacks, *[newest] * is_last, *(d - newest for d in older)]
    return torch.stack([v.flatten() for v in vectors])
