"""Learn a solver by endpoint matching, through the pipeline's own call.

min over the solver's numbers of E loss(x_N, x*), the network frozen     (DyWeight eqs. (10)-(11), SpanLift eq. (4))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from tqdm.auto import tqdm

from ..core.prediction import EDM, Flow
from ..core.table import SolverTable
from ..schedulers.dyweight import DyWeightScheduler
from ..schedulers.spanlift import SpanLiftScheduler
from ..version import __version__
from .checkpoints import Checkpoints
from .config import OPTIMIZERS, LearningConfig
from .losses import Loss, latent_mse
from .pairs import Pairs, Source, Teacher, shuffled
from .processes import in_turn, is_main, share, total
from .rollout import frozen, sample
from .student import LiftStudent, Student, TableStudent

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Log = Callable[[Mapping[str, float], int], None]


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
    """The loss of a scheduler's endpoints, averaged over ``pairs``, which the processes share."""
    starts = range(0, len(pairs), batch_size)
    error = torch.zeros((), dtype=torch.float64, device=pipe.device)
    for j, counts in in_turn(len(starts)):
        part = pairs[starts[j] : starts[j] + batch_size]
        endpoint, _ = sample(pipe, scheduler, steps, part.inputs, part.seeds, call)
        value = loss(pipe, endpoint.float(), part.endpoints.to(endpoint.device))
        error += counts * len(part) * value.to(error)
    return float(total(error)) / len(pairs)


def fit(
    pipe: Any,
    student: Student,
    steps: Sequence[int],
    train: Pairs | Source,
    held_out: Pairs,
    *,
    call: Mapping[str, Any],
    config: LearningConfig,
    loss: Loss = latent_mse,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
) -> dict[int, dict[str, float]]:
    """Move the student's parameters to the best they are on ``held_out``.

    Each update draws the next number of steps. Best is the lowest mean, over step counts, of the held-out loss relative
    to the start's. The gradient is the mean over the batch however many processes and micro-batches share it.

    Args:
        train: pairs, gone through in shuffled order, or a source of endless ones.
        checkpoints: where to go on from and to save to.
        log: gets losses by name, and the update.

    Returns:
        Held-out loss before and after, per number of steps, in the pipeline's own precision.

    Raises:
        FloatingPointError: the loss is not finite; says at which update, sampling step and level, and for which seeds.
    """
    source = shuffled(train, config.seed) if isinstance(train, Pairs) else train
    parameters, rate = student.parameters(), config.lr or student.lr
    optimizer = OPTIMIZERS[config.optimizer](parameters, lr=rate, weight_decay=config.weight_decay)
    precision = config.mixed_precision
    scaler = torch.amp.GradScaler(pipe.device.type, enabled=precision == "fp16")

    def errors(precision: str | None) -> dict[int, float]:
        with torch.no_grad():
            student.apply()
        with autocast(pipe, precision):
            return {n: endpoint_error(pipe, student.scheduler, n, held_out, call, loss=loss) for n in steps}

    saved = checkpoints.latest() if checkpoints else None
    if saved is None:
        before = errors(None)
        facts = {"update": 0, "best_error": 1.0, "stale": 0, "before": before, "after": None}
        facts["start"] = before if precision in (None, "no") else errors(precision)
        best = student.snapshot()
    else:
        facts, best = saved.facts, saved.restore(parameters, optimizer)
        scaler.load_state_dict(facts["scaler"])
        if facts["after"] is not None:
            student.restore(best)
            return _results(facts, steps)
    start = {n: facts["start"][n] or 1.0 for n in steps}

    bar = tqdm(
        range(facts["update"], config.updates),
        f"{', '.join(map(str, steps))} steps",
        initial=facts["update"],
        total=config.updates,
        disable=not is_main(),
    )
    shown = "start" if saved is None else "resumed"
    with frozen(pipe, config.recompute, student.networks):
        for update in bar:
            n = steps[update % len(steps)]
            own = share(range(update * config.batch_size, (update + 1) * config.batch_size))
            size = config.micro_batch_size or len(own)
            optimizer.zero_grad()
            value = torch.zeros((), dtype=torch.float64, device=pipe.device)
            for micro in range(0, len(own), size):
                part = source(own[micro : micro + size])
                # Some dependencies of diffusers switch gradients off globally: ask for them where they are needed.
                with torch.enable_grad(), autocast(pipe, precision):
                    student.apply()
                    loss_here = batch_loss(pipe, student, n, part, call, loss) * (len(part) / config.batch_size)
                if not bool(loss_here.detach().isfinite()):
                    raise FloatingPointError(_where_it_broke(pipe, student, n, part, call, update, rate, config))
                scaler.scale(loss_here / start[n]).backward()  # step counts weigh alike, though few steps err more
                value += loss_here.detach().to(value)
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = total(parameter.grad)
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate(update, config.updates)
            scaler.step(optimizer)
            scaler.update()

            numbers = {f"loss/{n}": float(total(value)), "lr": rate * learning_rate(update, config.updates)}
            last = update + 1 == config.updates
            if (update + 1) % config.evaluate_every == 0 or last:
                now = errors(precision)
                numbers |= {f"held_out/{n}": error for n, error in now.items()}
                mean, shown = (
                    sum(now[n] / start[n] for n in steps) / len(steps),
                    " ".join(f"{e:.4f}" for e in now.values()),
                )
                facts["stale"] += 1
                if mean < facts["best_error"]:
                    best, facts["best_error"], facts["stale"] = student.snapshot(), mean, 0
                last = last or (bool(config.patience) and facts["stale"] >= config.patience)
            facts["update"] = update + 1
            bar.set_postfix(
                loss=f"{numbers[f'loss/{n}']:.4f}", held_out=shown, best=f"{facts['best_error']:.3f} of the start"
            )
            if log is not None:
                log(numbers, update + 1)
            if checkpoints is not None and ((update + 1) % checkpoints.every == 0 or last):
                checkpoints.save(parameters, best, optimizer, {**facts, "scaler": scaler.state_dict()})
            if last:
                break
    bar.close()
    student.restore(best)
    facts["after"] = errors(None)
    if checkpoints is not None:
        checkpoints.save(parameters, best, optimizer, {**facts, "scaler": scaler.state_dict()})
    return _results(facts, steps)


def initial_table(
    scheduler: DyWeightScheduler, steps: int, config: LearningConfig, grid: Mapping[str, Any] | None
) -> SolverTable:
    """Where a table's learning starts."""
    return SolverTable.initial(
        steps,
        config.order,
        dict(grid) if grid is not None else default_grid(scheduler),
        scheduler.host.prediction,
        base=config.init,
        afs=config.afs,
        time_shifting=config.time_shifting,
    )


def distill(
    pipe: Any,
    teacher: Teacher,
    train: Pairs | Source,
    held_out: Pairs,
    steps: int,
    *,
    call: Mapping[str, Any],
    config: LearningConfig = LearningConfig(),
    grid: Mapping[str, Any] | None = None,
    loss: Loss = latent_mse,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
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
    initial = initial_table(scheduler, steps, config, grid)
    student = TableStudent(scheduler, initial, config.bounded, config.time_scaling)
    options: dict[str, Any] = {"call": call, "config": config, "loss": loss}
    errors = fit(pipe, student, [steps], train, held_out, checkpoints=checkpoints, log=log, **options)
    with torch.no_grad():
        table = student.table()
    detached = {"weights": table.weights.detach(), "time_scale": table.time_scale.detach().clone()}
    return replace(
        table, **detached, provenance=_provenance(pipe, teacher, train, held_out, student, errors[steps], **options)
    )


def distill_lift(
    pipe: Any,
    teacher: Teacher,
    train: Pairs | Source,
    held_out: Pairs,
    base: DyWeightScheduler,
    steps: Sequence[int],
    *,
    call: Mapping[str, Any],
    config: LearningConfig,
    layout: str = "image",
    operator: Mapping[str, Any] | None = None,
    name: str = "shared",
    loss: Loss = latent_mse,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
) -> SpanLiftScheduler:
    """Learn a SpanLift operator on a frozen base, shared by all ``steps``.

    Args:
        base: tables or a classical solver for every one of ``steps``.
        layout: of the latents.
        operator: size of the operator, see :class:`ResidualOperator`.
        name: of the operator in the artefact.
    """
    torch.manual_seed(config.seed)
    shape = held_out.endpoints.shape[1:]
    student = LiftStudent(base, steps, shape, order=config.order, layout=layout, operator=operator, name=name)
    options: dict[str, Any] = {"call": call, "config": config, "loss": loss}
    errors = fit(pipe, student, steps, train, held_out, checkpoints=checkpoints, log=log, **options)
    scheduler = student.lifted
    for network in scheduler.operators.values():
        network.requires_grad_(False)
    for n, lift in scheduler.lifts.items():
        provenance = _provenance(pipe, teacher, train, held_out, student, errors[n], **options)
        scheduler.lifts[n] = replace(lift.detach(), provenance=provenance)
    return scheduler


def _provenance(
    pipe: Any,
    teacher: Teacher,
    train: Pairs | Source,
    held_out: Pairs,
    student: Student,
    errors: Mapping[str, Any],
    *,
    call: Mapping[str, Any],
    config: LearningConfig,
    loss: Loss,
) -> dict[str, Any]:
    seen = len(train) if isinstance(train, Pairs) else config.updates * config.batch_size
    return {
        "base_model": str(getattr(pipe, "name_or_path", "")),
        "pipeline": type(pipe).__name__,
        "call": {k: v for k, v in call.items() if isinstance(v, (int, float, str, bool))},
        "latent_shape": list(held_out.endpoints.shape[1:]),
        "teacher": teacher.summary(),
        "loss": getattr(loss, "__name__", type(loss).__name__),
        "learning": {**config.learning, "lr": config.lr or student.lr},
        "pairs": {"train": seen, "held_out": len(held_out)},
        "held_out_error": dict(errors),
        "dywspan_version": __version__,
    }


def batch_loss(pipe: Any, student: Student, n: int, part: Pairs, call: Mapping[str, Any], loss: Loss) -> Tensor:
    """The endpoint's loss, and for a path the squared errors of the states before it (DyWeight eq. (A.15))."""
    states: list[Tensor] = []
    watch = (lambda i, x: states.append(student.scheduler.state(i, x).float())) if part.is_path else None
    endpoint, _ = sample(pipe, student.scheduler, n, part.inputs, part.seeds, call, watch=watch)
    value = loss(pipe, endpoint.float(), part.endpoints.to(endpoint.device))
    if part.is_path:
        assert isinstance(part.targets, Tensor)
        # From the end: with AFS the first state is never seen.
        for x, target in zip(states[-2::-1], part.targets[:, :-1].flip(1).unbind(1)):
            value = value + mse_loss(x, target.to(x.device))
    return value


@torch.no_grad()
def _where_it_broke(
    pipe: Any,
    student: Student,
    n: int,
    part: Pairs,
    call: Mapping[str, Any],
    update: int,
    rate: float,
    config: LearningConfig,
) -> str:
    broken: list[int] = []
    watch = lambda i, x: None if bool(x.isfinite().all()) else broken.append(i)  # noqa: E731
    with autocast(pipe, config.mixed_precision):
        sample(pipe, student.scheduler, n, part.inputs, part.seeds, call, watch=watch)
    if broken:
        place = f"from sampling step {broken[0]} (sigma {float(student.scheduler.sigmas[broken[0]]):.4g}) on"
    else:
        place = "though every sampling step is finite: look at the teacher's endpoints and at the loss"
    return (
        f"The loss is not finite at update {update} of the {n}-step solver, {place}; pairs with seeds "
        f"{list(part.seeds)}. Lower lr={rate}, start from another base than init={config.init!r}, or use a wider "
        f"mixed_precision than {config.mixed_precision or 'no'!r}."
    )


def _results(facts: Mapping[str, Any], steps: Sequence[int]) -> dict[int, dict[str, float]]:
    return {n: {"before": facts["before"][n], "after": facts["after"][n]} for n in steps}


def autocast(pipe: Any, precision: str | None) -> AbstractContextManager[Any]:
    """The pipeline computes in this precision within: "no", "bf16" or "fp16"."""
    dtype = PRECISIONS[precision or "no"]
    return torch.autocast(pipe.device.type, dtype or torch.bfloat16, enabled=dtype is not None)
