"""Learn a solver by endpoint matching, through the pipeline's own call.

min over the solver's numbers of E loss(x_N, x*), the network frozen     (DyWeight eqs. (10)-(11), SpanLift eq. (4))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.prediction import EDM, Flow
from ..core.table import SolverTable
from ..schedulers.dyweight import DyWeightScheduler
from ..schedulers.spanlift import SpanLiftScheduler
from ..version import __version__
from .losses import Loss, latent_mse
from .pairs import Pairs, Teacher
from .rollout import frozen, sample
from .student import LiftStudent, Student, TableStudent


@dataclass(frozen=True)
class AdamConfig:
    """DyWeight's optimiser. Source: DyWeight appendix D.2.

    Attributes:
        updates: optimiser steps.
        batch_size: pairs a step.
        lr: peak learning rate; warm-up over the first 10% from 0.1x, cosine to 0.01x.
        weight_decay: AdamW's.
        clip: gradient norm.
        order: K, derivatives a step may use.
        init: base solver a table starts from ("ipndm", "euler", "adams", ...).
        afs: analytical first step.
        bounded: s = 0.5 + sigmoid(phi), the paper's choice for FLUX; else s is free.
        evaluate_every: updates between held-out evaluations; the best solver is kept.
        recompute: one denoiser call's activations at a time in memory.
        bf16: run the pipeline under bfloat16 autocast while learning (the reported errors are not).
        seed: of the order of the batches and of the operator's initial weights.
    """

    updates: int = 300
    batch_size: int = 8
    lr: float = 1e-2
    weight_decay: float = 0.0
    clip: float = 1.0
    order: int = 2
    init: str = "ipndm"
    afs: bool = False
    bounded: bool = False
    evaluate_every: int = 25
    recompute: bool = True
    bf16: bool = False
    seed: int = 0


def default_grid(scheduler: DyWeightScheduler) -> dict[str, Any]:
    """The grid to learn on, by the kind of network: EDM's polynomial, FLUX's shift, or uniform in model time down to 0.

    A flow pipeline whose shift depends on resolution keeps it: its ``mu`` is read at every call.
    """
    prediction, config = scheduler.host.prediction, scheduler.config
    if isinstance(prediction, EDM):
        ends = {"sigma_min": config.get("sigma_min", 0.002), "sigma_max": config.get("sigma_max", 80.0)}
        return {"name": "polynomial", **ends}
    if isinstance(prediction, Flow):
        shift = config.get("shift") or config.get("flow_shift") or 1.0
        return {"name": "flow"} if config.get("use_dynamic_shifting") else {"name": "flow", "shift": shift}
    sigma_max = float(prediction.sigma(torch.tensor([config["num_train_timesteps"] - 1.0])))
    return {"name": "discrete", "sigma_min": 0.0, "sigma_max": sigma_max}


def learning_rate(update: int, updates: int) -> float:
    """Factor of the peak rate: linear from 0.1 over the first 10%, then cosine to 0.01 (DyWeight appendix D.2)."""
    warmup = max(1, round(0.1 * updates))
    if update < warmup:
        return 0.1 + 0.9 * update / warmup
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (update - warmup) / max(1, updates - warmup))) / 2


@torch.no_grad()
def endpoint_error(
    pipe: Any,
    scheduler: Any,
    steps: int,
    pairs: Pairs,
    call: Mapping[str, Any],
    batch_size: int = 16,
    loss: Loss = latent_mse,
) -> float:
    """The loss of a scheduler's endpoints, averaged over ``pairs``."""
    total = 0.0
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        total += len(part) * float(loss(pipe, _endpoint(pipe, scheduler, steps, part, call), part.endpoints))
    return total / len(pairs)


def fit(
    pipe: Any,
    student: Student,
    steps: Sequence[int],
    train: Pairs,
    held_out: Pairs,
    *,
    call: Mapping[str, Any],
    config: AdamConfig,
    loss: Loss = latent_mse,
) -> dict[int, dict[str, float]]:
    """Move the student's parameters to the best they are on ``held_out``.

    Each update draws the next number of steps. Best is the lowest mean, over step counts, of the held-out loss relative
    to the start's.

    Returns:
        Held-out loss before and after, per number of steps, in the pipeline's own precision.

    Raises:
        FloatingPointError: the loss is not finite; says at which update, with which learning rate.
    """
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    draw = torch.Generator().manual_seed(config.seed)

    def errors(bf16: bool) -> dict[int, float]:
        with torch.no_grad():
            student.apply()
        with _precision(pipe, bf16):
            return {n: endpoint_error(pipe, student.scheduler, n, held_out, call, loss=loss) for n in steps}

    before = errors(False)
    start = {n: error or 1.0 for n, error in (errors(True) if config.bf16 else before).items()}
    best, best_error, shown = student.snapshot(), 1.0, "start"
    progress = tqdm(range(config.updates), desc=f"{', '.join(map(str, steps))} steps")
    order: list[int] = []
    with frozen(pipe, config.recompute):
        for update in progress:
            n = steps[update % len(steps)]
            while len(order) < config.batch_size:
                order += torch.randperm(len(train), generator=draw).tolist()
            batch, order = order[: config.batch_size], order[config.batch_size :]
            part = train.choose(batch)
            # Some dependencies of diffusers switch gradients off globally: ask for them where they are needed.
            with torch.enable_grad(), _precision(pipe, config.bf16):
                student.apply()
                value = loss(pipe, _endpoint(pipe, student.scheduler, n, part, call), part.endpoints)
            if not bool(value.detach().isfinite()):
                raise FloatingPointError(
                    f"The loss is {value.item()} at update {update} of the {n}-step solver (pairs {batch}): "
                    f"lower lr={config.lr}, or start from another base than init={config.init!r}."
                )
            optimizer.zero_grad()
            (value / start[n]).backward()  # step counts weigh alike, though few steps err more
            torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * learning_rate(update, config.updates)
            optimizer.step()
            if (update + 1) % config.evaluate_every == 0 or update + 1 == config.updates:
                now = errors(config.bf16)
                mean = sum(now[n] / start[n] for n in steps) / len(steps)
                shown = " ".join(f"{now[n]:.4f}" for n in steps)
                if mean < best_error:
                    best, best_error = student.snapshot(), mean
            loss_now = float(value.detach())
            progress.set_postfix(loss=f"{loss_now:.4f}", held_out=shown, best=f"{best_error:.3f} of the start")
    student.restore(best)
    after = errors(False)
    return {n: {"before": before[n], "after": after[n]} for n in steps}


def distill(
    pipe: Any,
    teacher: Teacher,
    train: Pairs,
    held_out: Pairs,
    steps: int,
    *,
    call: Mapping[str, Any],
    config: AdamConfig = AdamConfig(),
    grid: Mapping[str, Any] | None = None,
    loss: Loss = latent_mse,
) -> SolverTable:
    """Learn a DyWeight table for one number of steps.

    Args:
        pipe: the pipeline; its scheduler's configuration says what its network predicts.
        teacher: what made the pairs, for the provenance.
        train, held_out: teacher pairs; the table returned is the best one on ``held_out``.
        steps: network evaluations of the student.
        call: arguments of the pipeline's call.
        grid: nominal grid, :func:`default_grid` by default.
    """
    scheduler = DyWeightScheduler.from_config(pipe.scheduler.config)
    spec = dict(grid) if grid is not None else default_grid(scheduler)
    prediction = scheduler.host.prediction
    initial = SolverTable.initial(steps, config.order, spec, prediction, base=config.init, afs=config.afs)
    student = TableStudent(scheduler, initial, config.bounded)
    errors = fit(pipe, student, [steps], train, held_out, call=call, config=config, loss=loss)
    with torch.no_grad():
        table = student.table()
    detached = {"weights": table.weights.detach(), "time_scale": table.time_scale.detach().clone()}
    return replace(
        table, **detached, provenance=_provenance(pipe, teacher, train, held_out, call, config, loss, errors[steps])
    )


def distill_lift(
    pipe: Any,
    teacher: Teacher,
    train: Pairs,
    held_out: Pairs,
    base: DyWeightScheduler,
    steps: Sequence[int],
    *,
    call: Mapping[str, Any],
    config: AdamConfig,
    layout: str = "image",
    operator: Mapping[str, Any] | None = None,
    name: str = "shared",
    loss: Loss = latent_mse,
) -> SpanLiftScheduler:
    """Learn a SpanLift operator on a frozen base, shared by all ``steps``.

    Args:
        base: tables or a classical solver for every one of ``steps``.
        layout: of the latents.
        operator: size of the operator, see :class:`ResidualOperator`.
        name: of the operator in the artefact.
    """
    torch.manual_seed(config.seed)
    shape = train.endpoints.shape[1:]
    student = LiftStudent(base, steps, shape, order=config.order, layout=layout, operator=operator, name=name)
    errors = fit(pipe, student, steps, train, held_out, call=call, config=config, loss=loss)
    scheduler = student.lifted
    for network in scheduler.operators.values():
        network.requires_grad_(False)
    for n, lift in scheduler.lifts.items():
        provenance = _provenance(pipe, teacher, train, held_out, call, config, loss, errors[n])
        scheduler.lifts[n] = replace(lift.detach(), provenance=provenance)
    return scheduler


def _provenance(
    pipe: Any,
    teacher: Teacher,
    train: Pairs,
    held_out: Pairs,
    call: Mapping[str, Any],
    config: AdamConfig,
    loss: Loss,
    errors: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "base_model": str(getattr(pipe, "name_or_path", "")),
        "pipeline": type(pipe).__name__,
        "call": {k: v for k, v in call.items() if isinstance(v, (int, float, str, bool))},
        "latent_shape": list(train.endpoints.shape[1:]),
        "teacher": teacher.summary(),
        "loss": getattr(loss, "__name__", type(loss).__name__),
        "optimizer": {"name": "adam", **asdict(config)},
        "pairs": {"train": len(train), "held_out": len(held_out)},
        "held_out_error": dict(errors),
        "dywspan_version": __version__,
    }


def _endpoint(pipe: Any, scheduler: Any, steps: int, pairs: Pairs, call: Mapping[str, Any]) -> Tensor:
    endpoint, _ = sample(pipe, scheduler, steps, pairs.prompts, pairs.seeds, call)
    return endpoint.float().to(pairs.endpoints.device)


def _precision(pipe: Any, bf16: bool) -> AbstractContextManager[Any]:
    return torch.autocast(pipe.device.type, torch.bfloat16, enabled=bf16)
