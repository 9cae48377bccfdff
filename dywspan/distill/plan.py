"""What a run will cost, before it is started."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import yaml

from ..artifact import markdown
from ..pipelines.memory import peak_bytes
from ..pipelines.pairs import Pairs
from ..pipelines.precision import autocast
from ..pipelines.processes import is_main, share
from ..pipelines.rollout import frozen, sample
from .config import OPTIMIZERS
from .student import ContinuousStudent, LiftStudent, Student, TableStudent
from .train import batch_loss, initial_continuous

if TYPE_CHECKING:
    from .run import Task


def print_plan(task: Task) -> None:
    """What the run will compute, its time and memory estimated from one update of the fewest steps."""
    config, pipe, n = task.config, task.pipe, min(task.config.steps)
    share_size = len(share(range(config.batch_size)))
    micro, processes = config.micro_batch_size or share_size, config.batch_size // share_size
    own = [task.inputs[i % len(task.inputs)] for i in range(micro)]
    untrained = task.untrained(n)
    started = time.perf_counter()
    with torch.no_grad():
        target, _ = sample(pipe, untrained, n, own, range(micro), task.call)
    per_evaluation = (time.perf_counter() - started) / (n * micro)
    student: Student
    if task.base is not None:
        size: dict[str, Any] = {"order": config.order, "layout": config.layout, "operator": config.operator}
        size["horizon"] = config.horizon if config.continuous else None
        student = LiftStudent(task.base, [n], target.shape[1:], **size)
    elif config.continuous:
        student = ContinuousStudent(untrained, initial_continuous(untrained, config, config.grid))
    else:
        student = TableStudent(untrained, untrained.tables[n])
    pairs = Pairs(own, range(micro), target.float().cpu())

    def update() -> None:
        student.apply()
        with torch.enable_grad(), autocast(pipe, config.mixed_precision):
            batch_loss(pipe, student, n, pairs, task.call, task.loss).backward()

    def sampling() -> None:
        student.apply()
        with torch.no_grad(), autocast(pipe, config.mixed_precision):
            batch_loss(pipe, student, n, pairs, task.call, task.loss)

    squares = config.optimizer not in OPTIMIZERS
    with frozen(pipe, config.recompute, student.networks):
        started = time.perf_counter()
        _, peak = peak_bytes(sampling if squares else update, pipe.device)
    per_step = (time.perf_counter() - started) / (n * micro)  # of one sample

    networks = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    weights = sum(t.nbytes for m in networks for t in m.state_dict().values())
    updates, every = config.number("updates"), config.number("evaluate_every")
    teacher, checks = task.teacher.num_inference_steps, updates // every + 2
    scales = len(task.calls)
    count = scales * (config.held_out + (0 if config.on_the_fly else config.pairs))
    rows = [("teacher", f"{count} pairs", count * teacher, count * teacher * per_evaluation)]
    for steps in config.steps:
        seen = updates * config.batch_size
        extra = teacher if config.on_the_fly else 0
        # Step counts and calls that are learned together take turns by gradients; least squares sees all each time.
        seen = seen * scales if squares else seen * len(task.groups) // len(config.steps)
        # Least squares: a batch before and after a step, and how every number changes it.
        calls = 2 * steps + student.calls(steps) if squares else steps
        seconds = seen * (calls * per_step + extra * per_evaluation)
        rows.append((f"{steps} steps, learning", f"{seen} samples", seen * (calls + extra), seconds))
        checked = checks * scales * config.held_out
        rows.append(
            (f"{steps} steps, held out", f"{checked} samples", checked * steps, checked * steps * per_evaluation)
        )
    rows.append(("total", "", sum(r[2] for r in rows), sum(r[3] for r in rows)))
    if not is_main():
        return
    print(yaml.safe_dump({k: v for k, v in asdict(config).items() if v not in (None, [], {})}, sort_keys=False))
    print(
        markdown(
            [
                {
                    "part": part,
                    "what": what,
                    "evaluations": n,
                    "time": str(timedelta(seconds=round(seconds / processes))),
                }
                for part, what, n, seconds in rows
            ]
        )
    )
    growth = "about the same at more" if config.recompute else "in proportion at more"
    print(
        f"\nMemory on each process: weights {weights / 2**30:.2f} GiB, and {peak / 2**30:.2f} GiB for {micro} samples "
        f"of {n} steps, {growth}. Evaluations are of one sample, guidance counted as one."
    )
