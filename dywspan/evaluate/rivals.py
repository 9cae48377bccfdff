"""The best of all classical solvers on all grids, chosen on other samples than it is measured on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..artifact import table_from_json, table_to_json, write_atomically
from ..pipelines.arena import Arena
from ..pipelines.classical import Classical, asked_for, on_all_grids
from ..pipelines.hashes import digest
from ..pipelines.pairs import Pairs
from ..pipelines.processes import is_main, wait
from ..pipelines.replay import Memo
from ..schedulers.dyweight import DyWeightScheduler
from .baselines import BEST, Cell

SELECT = (8, 32)  # samples that all solvers are judged on, and those that the best ``FINALISTS`` of them are
FINALISTS = 8


def candidates(pipe: Any, arena: Arena, n: int) -> list[Classical]:
    """Every classical multistep solver on every grid that fits the pipeline."""
    return on_all_grids(pipe, *asked_for(pipe, n, arena.inputs, arena.call))


def best_classical(pipe: Any, arena: Arena, n: int, among: Sequence[Classical] | None = None) -> Classical:
    """The solver of the smallest mean error, latent rmse to the reference, on the first samples of an arena, at most
    ``SELECT``.

    Args:
        among: those to choose from; by default :func:`candidates`.
    """
    own, left = DyWeightScheduler.from_config(pipe.scheduler), list(among or candidates(pipe, arena, n))
    for most, kept in zip(SELECT, (FINALISTS, 1)):

        def error(classical: Classical, count: int = min(most, len(arena.inputs))) -> float:
            return float(arena.errors(own.with_tables([classical.table]), n, range(count)).mean())

        left = sorted(left, key=error)[:kept]
    return left[0]


@contextmanager
def judging(pipe: Any, pairs: Pairs, call: Mapping[str, Any]) -> Iterator[Arena]:
    """Samples whose targets are known; within, no evaluation of the network is made twice."""
    memo = Memo(pipe)
    with memo.installed(), torch.no_grad():
        arena = Arena(pipe, pairs.inputs, pairs.seeds, call, memo)
        arena.targets.update(enumerate(pairs.endpoints))
        yield arena


def best_cells(
    pipe: Any, pairs: Pairs, call: Mapping[str, Any], steps: Sequence[int], folder: Path, model: str, precision: str
) -> list[Cell]:
    """The best classical solver at each number of evaluations, as a row of a comparison; a choice once made is kept.

    Args:
        pairs: the reference's, of samples that nothing is measured on; at least ``SELECT[1]``.
        folder: of the choices.
        model, precision: what stands for the weights, and what they are evaluated in.
    """
    cells, own = list[Cell](), DyWeightScheduler.from_config(pipe.scheduler)
    with judging(pipe, pairs, call) as arena:
        for n in steps:
            among = candidates(pipe, arena, n)
            key = [
                model,
                precision,
                diffusers.__version__,
                dict(call),
                list(pairs.inputs),
                list(pairs.seeds),
                n,
                SELECT,
            ]
            key += [digest(pairs.endpoints.contiguous()), [[c.name, table_to_json(c.table)] for c in among]]
            file = folder / f"{digest(key)}.json"
            if is_main() and not file.exists():
                best = best_classical(pipe, arena, n, among)
                made = {"solver": best.name, "nfe": n, "among": len(among), "table": table_to_json(best.table)}
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(file, (json.dumps(made, indent=1) + "\n").encode())
            wait()
            made = json.loads(file.read_text(encoding="utf-8"))
            scheduler = own.with_tables([table_from_json(made["table"])])
            cells.append(Cell(f"{made['solver']} ({BEST})", scheduler, n, n, line=BEST))
    return cells
