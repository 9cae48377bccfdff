"""A step cache beside learned solvers at equal cost: more steps of a classical solver, most of them from the cache.

diffusers' FirstBlockCache asks a transformer's first block at each step, and the others only where its answer changed
by more than a threshold. The cost is the share of the blocks' multiply-adds that were computed, in evaluations of all
blocks. For each budget, the best solver, number of steps and threshold is chosen on other samples than it is measured
on.

    python examples/studies/step_cache.py --output docs/results/step-cache.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
from claims import claim, report
from diffusers import FirstBlockCacheConfig
from runs import SEED
from subjects import SUBJECTS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from dywspan import DyWeightScheduler
from dywspan.evaluate.baselines import find_solvers, make_cell
from dywspan.evaluate.metrics import latent_rmse
from dywspan.evaluate.paired import difference
from dywspan.evaluate.rivals import best_classical, judging
from dywspan.pipelines.inputs import read_inputs
from dywspan.pipelines.pairs import Pairs, make_pairs
from dywspan.pipelines.rollout import load_pipeline, sample
from dywspan.pipelines.teacher import find_teacher
from dywspan.schedulers.apply import load

SUBJECT = SUBJECTS["emoji-flow"]  # the one with a transformer
BUDGETS = (3, 5, 7)
STEPS = (4, 6, 8, 10, 14, 20)
THRESHOLDS = (0.05, 0.1, 0.2, 0.35, 0.5)
SOLVERS = ("euler", "unipc", "ipndm-2m")
OURS = ("-solvers", "-spanlift", "-timelift")
OTHERS = 32  # samples that the best is chosen on


class Cached(NamedTuple):
    """A classical solver with a step cache."""

    solver: str
    steps: int
    threshold: float

    def __str__(self) -> str:
        return f"{self.solver}, {self.steps} steps, threshold {self.threshold:g}"


@contextmanager
def counted(network: nn.Module, cost: dict[nn.Module, float]) -> Iterator[list[float]]:
    """The costs of the blocks that are computed within, not answered from the cache."""
    spent: list[float] = []
    inner = {block: next(m for m in block.modules() if isinstance(m, nn.Linear)) for block in cost}

    def keep(value: float) -> Callable[..., None]:
        return lambda *_: spent.append(value)

    hooks = [layer.register_forward_pre_hook(keep(cost[block])) for block, layer in inner.items()]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def costs(pipe: Any, call: Mapping[str, Any], own: Mapping[str, Any]) -> dict[nn.Module, float]:
    """Of each block its share of an evaluation's multiply-adds."""
    network, (solver,) = pipe.transformer, find_solvers([SOLVERS[0]])
    scheduler = make_cell(pipe, solver, 1, own, call).scheduler
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        sample(pipe, scheduler, 1, [own], [0], call)
    found = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(network).__name__
    blocks = {m: name for name, m in network.named_modules() if type(m).__name__.endswith("TransformerBlock")}
    counts = {m: float(found[f"{root}.{name}"]) for m, name in blocks.items()}
    return {m: count / sum(counts.values()) for m, count in counts.items()}


def measured(
    pipe: Any, cached: Cached, pairs: Pairs, call: dict[str, Any], cost: dict[nn.Module, float]
) -> tuple[Tensor, float]:
    """(P,) errors of samples made one by one, as users make them, and the mean number of evaluations they cost."""
    (solver,) = find_solvers([cached.solver])
    cell = make_cell(pipe, solver, cached.steps, pairs.inputs[0], call)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=cached.threshold))
    try:
        with counted(pipe.transformer, cost) as spent, torch.no_grad():
            ends = [
                sample(pipe, cell.scheduler, cell.num_inference_steps, [own], [seed], call)[0].float()
                for own, seed in zip(pairs.inputs, pairs.seeds)
            ]
    finally:
        pipe.transformer.disable_cache()
    errors = (torch.cat(ends) - pairs.endpoints).flatten(1).square().mean(1).sqrt()
    return errors, sum(spent) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=96, help="to measure on")
    parser.add_argument("--output", default="build/studies/step-cache.json")
    args = parser.parse_args()
    pipe, call = load_pipeline(SUBJECT.model), dict(SUBJECT.call)
    inputs, seeds = read_inputs(SUBJECT.held_out, limit=args.samples + OTHERS) or [], range(SEED, SEED + 10**6)
    teacher = find_teacher(pipe, "ipndm", 50)
    made = make_pairs(pipe, teacher, inputs, seeds[: len(inputs)], call=call, cache="build/studies/pairs")
    others, fresh = made.choose(range(args.samples, len(inputs))), made.choose(range(args.samples))
    cost = costs(pipe, call, inputs[0])
    tried: dict[Cached, tuple[float, float]] = {}
    for cached in tqdm([Cached(*own) for own in product(SOLVERS, STEPS, THRESHOLDS)], "step caches"):
        errors, spent = measured(pipe, cached, others.choose(range(8)), call, cost)
        tried[cached] = float(errors.mean()), spent
    rows: list[dict[str, Any]] = []
    with judging(pipe, others, call) as arena:
        best = {n: best_classical(pipe, arena, n) for n in BUDGETS}
    own = DyWeightScheduler.from_config(pipe.scheduler)
    for budget in BUDGETS:
        chosen = min((c for c in tried if tried[c][1] <= budget), key=lambda c: tried[c][0])
        cached_errors, spent = measured(pipe, chosen, fresh, call, cost)
        rows.append(row(budget, f"step cache: {chosen}", cached_errors, spent, None))
        solvers = {f"{best[budget].name} (best classical)": own.with_tables([best[budget].table])}
        solvers |= {name.strip("-"): load(SUBJECT.model + name) for name in OURS}
        with judging(pipe, fresh, call) as arena:
            for name, scheduler in solvers.items():
                errors = arena.errors(scheduler, budget, range(args.samples))
                rows.append(row(budget, name, errors, budget, cached_errors))
    ours = [(f"{r['budget']} evaluations, {r['solver']}", r["paired"]["high"], 0) for r in rows if "paired" in r]
    text = "at equal cost a solver's error is below the step cache's: the interval of their difference is below 0"
    report(args.output, rows, [claim(text, ours)], tried={str(c): v for c, v in tried.items()})


def row(budget: int, name: str, errors: Tensor, spent: float, other: Tensor | None) -> dict[str, Any]:
    """A line of the results; ``paired`` is the difference to the step cache's errors."""
    found = {"budget": budget, "solver": name, "evaluations": spent, "latent_rmse": float(errors.mean())}
    if other is not None:
        found["paired"] = difference(latent_rmse(), errors, other, float((errors - other).mean()))
    return found


if __name__ == "__main__":
    main()
