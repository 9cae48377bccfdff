"""What a run will cost, before it is started."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import yaml

from ..pipelines.memory import peak_bytes
from ..pipelines.networks import place
from ..pipelines.pairs import Pairs, common_path
from ..pipelines.precision import autocast
from ..pipelines.processes import is_main, share
from ..pipelines.rollout import frozen, sample
from ..text import markdown
from .config import OPTIMIZERS
from .gradients import batch_loss
from .kinds import STUDENTS
from .setup import Setup
from .student import Student
from .task import Task, Term


def print_plan(setup: Setup) -> None:
    """What the run will compute, its time and memory estimated from one update of the fewest steps."""
    config, pipe, n = setup.config, setup.pipe, min(setup.config.steps)
    squares = config.optimizer not in OPTIMIZERS
    share_size = len(share(range(config.batch_size)))
    micro, processes = config.micro_batch_size or share_size, config.batch_size // share_size
    own = [setup.inputs[i % len(setup.inputs)] for i in range(micro)]

    def sampled() -> torch.Tensor:
        with torch.no_grad():
            return sample(pipe, setup.untrained(n), n, own, range(micro), setup.call)[0]

    target = sampled()  # and warm
    per_evaluation = _seconds(sampled, pipe) / (n * micro)
    pairs = Pairs(own, range(micro), target.float().cpu())
    term = Term(n, setup.call, pairs, pairs)
    kind, parts = STUDENTS[config.solver, config.continuous], {"layout": config.layout, "operator": config.operator}
    options: dict[str, Any] = {"base": setup.base, "continuous": config.continuous, "grid": config.grid, **parts}
    student = kind.start(Task(pipe, setup.teacher, [term], config, setup.loss, config.solver, **options))

    def update() -> None:
        student.apply()
        with torch.set_grad_enabled(not squares), autocast(pipe, config.mixed_precision):
            loss = batch_loss(pipe, student, n, pairs, setup.call, setup.loss)
            if not squares:
                loss.backward()

    with frozen(pipe, config.recompute, student.networks, config.recompute_blocks):
        update()
        per_step = _seconds(update, pipe) / (n * micro)  # of one sample
        _, peak = peak_bytes(update, place(pipe))
    rows = _rows(setup, student, per_evaluation, per_step)
    if not is_main():
        return
    print(yaml.safe_dump({k: v for k, v in asdict(config).items() if v not in (None, [], {})}, sort_keys=False))
    said = [
        {"part": part, "what": what, "evaluations": count, "time": str(timedelta(seconds=round(seconds / processes)))}
        for part, what, count, seconds in rows
    ]
    print(markdown(said))
    networks = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    weights = sum(t.nbytes for m in networks for t in m.state_dict().values())
    growth = "about the same at more" if config.recompute else "in proportion at more"
    print(
        f"\nMemory on each process: weights {weights / 2**30:.2f} GiB, and {peak / 2**30:.2f} GiB for {micro} samples "
        f"of {n} steps, {growth}. Evaluations are of one sample, guidance counted as one."
    )


def _rows(setup: Setup, student: Student, per_evaluation: float, per_step: float) -> list[tuple[str, str, int, float]]:
    """(part, what it is of, denoiser evaluations, seconds in one process) of everything, and of all together."""
    config, teacher, scales = setup.config, setup.teacher.num_inference_steps, len(setup.calls)
    updates, squares = config.number("updates"), config.optimizer not in OPTIMIZERS

    def row(part: str, count: int, steps: int, seconds: float = per_evaluation) -> tuple[str, str, int, float]:
        of = "pairs" if part.startswith("teacher") else "samples"
        return part, f"{count} {of}", count * steps, count * steps * seconds

    made = scales * (config.held_out + (0 if config.on_the_fly else config.pairs))
    rows = [row("teacher", made, (config.path_substeps and max(config.steps) * config.path_substeps) or teacher)]
    if config.ends:
        common, substeps = common_path((whole for _, whole in config.ends), teacher)
        rows.append(row("teacher, late starts", config.held_out + config.pairs, common * substeps))
    checks = updates // config.number("evaluate_every") + 2
    for n in config.steps:
        if config.regression:  # a path as fine as the teacher's, and samplings of 1 to n steps
            rows.append(row(f"{n} steps, regression", config.regression, -(-teacher // n) * n + n * (n + 1) // 2))
        seen = updates * config.batch_size
        # Step counts and calls that are learned together take turns by gradients; least squares sees all each time.
        seen = seen * scales if squares else seen * len(config.groups) // len(config.steps)
        # Least squares: a batch before and after a step, and how every number changes it.
        rows.append(row(f"{n} steps, learning", seen, 2 * n + student.calls(n) if squares else n, per_step))
        if config.on_the_fly:
            rows.append(row(f"{n} steps, teacher", seen, teacher))
        rows.append(row(f"{n} steps, held out", checks * scales * config.held_out, n))
    return [*rows, ("total", "", sum(r[2] for r in rows), sum(r[3] for r in rows))]


def _seconds(run: Callable[[], Any], pipe: Any) -> float:
    """What a call takes, once all that it started on the device is done."""
    device = torch.get_device_module(place(pipe))
    started = time.perf_counter()
    run()
    if hasattr(device, "synchronize"):
        device.synchronize()
    return time.perf_counter() - started
