"""Where a table's learning can start from: each row alone, by linear least squares on a teacher's path.

w_i = argmin sum over pairs |x_i + h_i sum_j w_ij d_{i-j} - x*_{i+1}|^2,    sum_j w_ij = 1 but in the last row

x* is the teacher's state at the next level; x_i and d are those of the rows found before, on the solver's own path, so
that a row also mends what those before it left. Rows that sum to 1 keep the levels nominal, where the teacher's states
are. N samplings of a few pairs, forward passes only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.table import SolverTable
from ..schedulers.dyweight import DyWeightScheduler
from .pairs import Pairs
from .processes import in_turn, total
from .progress import autocast
from .rollout import sample


@torch.no_grad()
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
    (n, order), states = table.weights.shape, paths.targets
    if not paths.is_path or states[[0]].shape[1] != n or table.afs:
        raise ValueError(f"Regression on {n} steps needs teacher paths of {n} states, and a table without afs.")
    scheduler = DyWeightScheduler.from_config(pipe.scheduler.config)
    weights = torch.zeros_like(table.weights)
    weights[:, 0] = 1  # steps to come are Euler's until it is their turn
    for i in range(n):
        scheduler.tables = {n: replace(table, weights=weights.clone())}
        is_last = i == n - 1
        count = min(i + 1, order) - 1 + is_last  # unknowns
        sums = torch.zeros(count + 1, count + 1, dtype=torch.float64)
        for j, counts in in_turn(-(-len(paths) // batch_size)):
            part = paths[j * batch_size : (j + 1) * batch_size]
            with autocast(pipe, mixed_precision):
                rows = _residual_and_directions(pipe, scheduler, i, is_last, part, call)
            sums += counts * (rows @ rows.T).cpu()
        sums = total(sums.to(pipe.device)).cpu()
        found = torch.linalg.lstsq(sums[1:, 1:], sums[1:, :1]).solution[:, 0]
        older = found[is_last:]
        weights[i, 1 : 1 + len(older)] = older
        weights[i, 0] += found[:is_last].sum() - older.sum()
    return replace(table, weights=weights)


def _residual_and_directions(
    pipe: Any, scheduler: DyWeightScheduler, i: int, is_last: bool, part: Pairs, call: Mapping[str, Any]
) -> Tensor:
    """(1 + count, B * D) float64: what an Euler step i lacks, by h_i; [d_i,] d_{i-1} - d_i, ... to make it up with."""
    seen: list[Tensor] = []

    def watch(step: int, prev_sample: Tensor) -> None:
        if step == i:
            seen.extend([scheduler.state(step, prev_sample), *scheduler._history])

    (steps,) = scheduler.tables
    sample(pipe, scheduler, steps, part.inputs, part.seeds, call, watch=watch)
    after, newest, *older = (v.double() for v in seen)
    assert isinstance(part.targets, Tensor) and scheduler._schedule is not None
    lacks = (part.targets[:, i].to(after) - after) / float(scheduler._schedule.sizes[i])
    rows = [lacks, *[newest] * is_last, *(d - newest for d in older)]
    return torch.stack([row.flatten() for row in rows])
