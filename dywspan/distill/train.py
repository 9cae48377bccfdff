"""Learn a DyWeight table by endpoint matching: the paper's Adam recipe, through the pipeline's own call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from tqdm.auto import tqdm

from ..core.prediction import EDM, Flow, Prediction
from ..core.table import SolverTable
from ..schedulers.dyweight import DyWeightScheduler
from ..version import __version__
from .pairs import Pairs, Teacher
from .rollout import frozen, generators, rollout


@dataclass(frozen=True)
class AdamConfig:
    """DyWeight's optimiser. Source: DyWeight appendix D.2.

    Attributes:
        updates: optimiser steps.
        batch_size: pairs a step.
        lr: peak learning rate; warm-up over the first 10% from 0.1x, cosine to 0.01x.
        clip: gradient norm.
        order: K, derivatives a step may use.
        init: base solver the table starts from ("ipndm", "euler", "adams", ...).
        afs: analytical first step.
        bounded: s = 0.5 + sigmoid(phi), the paper's choice for FLUX; else s is free.
        evaluate_every: updates between held-out evaluations; the best table is kept.
        recompute: one denoiser call's activations at a time in memory.
        bf16: run the pipeline under bfloat16 autocast while learning (the reported errors are not).
        seed: of the order of the batches.
    """

    updates: int = 300
    batch_size: int = 8
    lr: float = 1e-2
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
        return {
            "name": "polynomial",
            "sigma_min": config.get("sigma_min", 0.002),
            "sigma_max": config.get("sigma_max", 80.0),
        }
    if isinstance(prediction, Flow):
        shift = config.get("shift") or config.get("flow_shift") or 1.0
        return {"name": "flow"} if config.get("use_dynamic_shifting") else {"name": "flow", "shift": shift}
    sigma_max = float(prediction.sigma(torch.tensor([config["num_train_timesteps"] - 1.0])))
    return {"name": "discrete", "sigma_min": 0.0, "sigma_max": sigma_max}


class TableParameters:
    """What is learned: the weights that exist, and the time scale."""

    def __init__(self, initial: SolverTable, bounded: bool) -> None:
        self.initial, self.bounded = initial, bounded
        s = initial.time_scale.double()
        self.weights = initial.weights.double().clone().requires_grad_()
        self.phi = (torch.logit(s - 0.5) if bounded else s.clone()).requires_grad_()

    def table(self) -> SolverTable:
        """The table these numbers make now, with gradients."""
        scale = 0.5 + torch.sigmoid(self.phi) if self.bounded else self.phi
        return replace(self.initial, weights=self.weights.tril(), time_scale=scale)

    def parameters(self) -> list[Tensor]:
        return [self.weights, self.phi]


def learning_rate(update: int, updates: int) -> float:
    """Factor of the peak rate: linear from 0.1 over the first 10%, then cosine to 0.01 (DyWeight appendix D.2)."""
    warmup = max(1, round(0.1 * updates))
    if update < warmup:
        return 0.1 + 0.9 * update / warmup
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (update - warmup) / max(1, updates - warmup))) / 2


@torch.no_grad()
def endpoint_error(
    pipe: Any, scheduler: Any, steps: int, pairs: Pairs, call: Mapping[str, Any], batch_size: int = 16
) -> float:
    """Mean squared error of the endpoints over ``pairs``."""
    total = 0.0
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        total += float(mse_loss(_student(pipe, scheduler, steps, part, call), part.endpoints, reduction="sum"))
    return total / pairs.endpoints.numel()


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
) -> SolverTable:
    """Learn the table for one number of steps.

    Endpoint matching: min over (W, s) of E |x_N(W, s) - x*|^2 with the network frozen (DyWeight eqs. (10)-(11)).

    Args:
        pipe: the pipeline; its scheduler's configuration says what its network predicts.
        teacher: what made the pairs, for the provenance.
        train, held_out: teacher pairs; the table returned is the best one on ``held_out``.
        steps: network evaluations of the student.
        call: arguments of the pipeline's call.
        grid: nominal grid, :func:`default_grid` by default.

    Raises:
        FloatingPointError: the loss is not finite; says at which update, with which learning rate.
    """
    scheduler = DyWeightScheduler.from_config(pipe.scheduler.config)
    initial = _initial(scheduler, steps, config, grid)
    learned = TableParameters(initial, config.bounded)
    optimizer = torch.optim.Adam(learned.parameters(), lr=config.lr)
    draw = torch.Generator().manual_seed(config.seed)

    def held_out_error(table: SolverTable, exact: bool = False) -> float:
        scheduler.tables = {steps: table}
        with _precision(pipe, config.bf16 and not exact):
            return endpoint_error(pipe, scheduler, steps, held_out, call)

    best, best_error = initial, held_out_error(initial)
    progress = tqdm(range(config.updates), desc=f"{steps} steps")
    order: list[int] = []
    with frozen(pipe, config.recompute):
        for update in progress:
            while len(order) < config.batch_size:
                order += torch.randperm(len(train), generator=draw).tolist()
            batch, order = order[: config.batch_size], order[config.batch_size :]
            part = Pairs([train.prompts[i] for i in batch], [train.seeds[i] for i in batch], train.endpoints[batch])
            scheduler.tables = {steps: learned.table()}
            # Some dependencies of diffusers switch gradients off globally: ask for them where they are needed.
            with torch.enable_grad(), _precision(pipe, config.bf16):
                loss = mse_loss(_student(pipe, scheduler, steps, part, call), part.endpoints)
            if not bool(loss.detach().isfinite()):
                raise FloatingPointError(
                    f"The loss is {loss.item()} at update {update} of the {steps}-step solver (pairs {batch}): "
                    f"lower lr={config.lr}, or start from another base than init={config.init!r}."
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned.parameters(), config.clip)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * learning_rate(update, config.updates)
            optimizer.step()
            if (update + 1) % config.evaluate_every == 0 or update + 1 == config.updates:
                table = _detached(learned.table())
                if (error := held_out_error(table)) < best_error:
                    best, best_error = table, error
            progress.set_postfix(loss=f"{float(loss.detach()):.4f}", held_out=f"{best_error:.4f}")
    provenance = {
        "base_model": str(getattr(pipe, "name_or_path", "")),
        "pipeline": type(pipe).__name__,
        "call": {k: v for k, v in call.items() if isinstance(v, (int, float, str, bool))},
        "latent_shape": list(train.endpoints.shape[1:]),
        "teacher": teacher.describe(),
        "loss": "latent mse",
        "optimizer": {"name": "adam", **asdict(config)},
        "pairs": {"train": len(train), "held_out": len(held_out)},
        "held_out_error": {"before": held_out_error(initial, True), "after": held_out_error(best, True)},
        "dywspan_version": __version__,
    }
    return replace(best, provenance=provenance)


def _initial(
    scheduler: DyWeightScheduler, steps: int, config: AdamConfig, grid: Mapping[str, Any] | None
) -> SolverTable:
    prediction: Prediction = scheduler.host.prediction
    spec = dict(grid) if grid is not None else default_grid(scheduler)
    return SolverTable.initial(steps, config.order, spec, prediction, base=config.init, afs=config.afs)


def _student(pipe: Any, scheduler: Any, steps: int, pairs: Pairs, call: Mapping[str, Any]) -> Tensor:
    prompts, seeds = list(pairs.prompts), generators(pairs.seeds)
    endpoint, _ = rollout(pipe, scheduler, prompt=prompts, generator=seeds, num_inference_steps=steps, **call)
    return endpoint.float().to(pairs.endpoints.device)


def _precision(pipe: Any, bf16: bool) -> AbstractContextManager[Any]:
    return torch.autocast(pipe.device.type, torch.bfloat16, enabled=bf16)


def _detached(table: SolverTable) -> SolverTable:
    return replace(table, weights=table.weights.detach().clone(), time_scale=table.time_scale.detach().clone())
