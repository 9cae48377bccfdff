"""Learn a solver by endpoint matching, through the pipeline's own call.

min over the solver's numbers of E loss(x_N, x*), the network frozen     (DyWeight eqs. (10)-(11), SpanLift eq. (4))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..core.continuous import ContinuousTable, guided
from ..core.prediction import EDM, Flow
from ..core.table import SolverTable
from ..pipelines.pairs import Pairs, Source, common_path
from ..pipelines.precision import autocast
from ..pipelines.processes import share, total
from ..pipelines.rollout import frozen, sample
from ..pipelines.teacher import Teacher
from ..schedulers.bind import bind, guidance_scale
from ..schedulers.dyweight import DyWeightScheduler
from ..schedulers.spanlift import SpanLiftScheduler
from ..version import __version__
from .checkpoints import Checkpoints
from .config import OPTIMIZERS, LearningConfig
from .least_squares import fit_least_squares
from .losses import Loss, latent_mse
from .progress import Log, Progress, Term
from .regression import regress, regress_continuous
from .student import ContinuousStudent, LiftStudent, Student, TableStudent


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


T = TypeVar("T")
Call = Mapping[str, Any]  # arguments of the pipeline's call
Variants = Mapping[str, T]  # by name, where calls differ
# Training and held-out pairs, by steps and those of the whole way: see ``pairs.ends``.
Late = Mapping[tuple[int, int], tuple[Pairs, Pairs]]


def make_terms(
    pipe: Any,
    steps: Sequence[int],
    train: Pairs | Source | Variants[Pairs | Source],
    held_out: Pairs | Variants[Pairs],
    call: Call | Variants[Call],
    late: Late | None = None,
) -> list[Term]:
    """What is learned together: every number of steps, of every variant; and ends of the way.

    A pipeline whose variants differ in the guidance scale is bound, see :func:`dywspan.bind`, so that its solver knows.
    """
    ends = [Term(n, call, *pairs, whole=whole) for (n, whole), pairs in (late or {}).items()]
    if not isinstance(train, Mapping) or not isinstance(held_out, Mapping):
        assert not isinstance(train, Mapping) and not isinstance(held_out, Mapping)
        return [Term(n, call, train, held_out) for n in steps] + ends
    scales: dict[str, float | None] = {
        name: guidance_scale(pipe, {**held_out[name].inputs[0], **call[name]}) for name in train
    }
    if len({*scales.values()}) > 1:
        bind(pipe)
    else:
        scales = dict.fromkeys(train)
    return [Term(n, call[name], train[name], held_out[name], name, scales[name]) for n in steps for name in train]


def around(terms: Sequence[Term]) -> float | None:
    """g0, the geometric mean of the guidance scales; None where they do not differ."""
    scales = {term.guidance_scale for term in terms} - {None}
    return math.exp(sum(math.log(g) for g in scales if g) / len(scales)) if scales else None


def learn(
    pipe: Any,
    student: Student,
    terms: Sequence[Term],
    *,
    config: LearningConfig,
    loss: Loss = latent_mse,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, int | float]]:
    """Move the student's parameters to the best they are on the held-out pairs, as ``config.optimizer`` does.

    Args:
        terms: what it is learned for; least squares needs pairs, gradients can do with a source of endless ones.
        checkpoints: where to go on from and to save to.
        log: gets losses by name, and the update.

    Returns:
        Held-out loss before, after and in between, by the terms' names; and the cost.
    """
    progress = Progress(pipe, student, terms, config=config, loss=loss, checkpoints=checkpoints, log=log)
    (fit if config.optimizer in OPTIMIZERS else fit_least_squares)(progress)
    return progress.errors_by_term(), progress.cost()


def fit(progress: Progress) -> None:
    """Learn by gradients through the whole sampling.

    Each update draws the next term. The gradient is the mean over the batch however many processes and
    micro-batches share it. Pairs are gone through in shuffled order.

    Raises:
        FloatingPointError: the loss is not finite; says at which update, sampling step and level, and for which seeds.
            Or its gradient is not.
    """
    pipe, student, terms, config = progress.pipe, progress.student, progress.terms, progress.config
    sources = [term.source(config.seed) for term in terms]
    parameters, peak_rate, updates = student.parameters(), config.lr or student.lr, config.number("updates")
    optimizer = OPTIMIZERS[config.optimizer](parameters, lr=peak_rate, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(pipe.device.type, enabled=config.mixed_precision == "fp16")
    with progress.meter.running(), frozen(pipe, config.recompute, student.networks):
        progress.begin(optimizer)
        if progress.own:
            scaler.load_state_dict(progress.own)

        def step(update: int) -> dict[str, float]:
            turn, rate = update % len(terms), peak_rate * learning_rate(update, updates)
            term, source = terms[turn], sources[turn]
            student.scheduler.whole = term.whole
            own = share(range(update * config.batch_size, (update + 1) * config.batch_size))
            size = config.micro_batch_size or len(own)
            optimizer.zero_grad()
            value = torch.zeros((), dtype=torch.float64, device=pipe.device)
            for micro in range(0, len(own), size):
                with progress.meter.counting("fresh"):
                    part = source(own[micro : micro + size])

                def sampled(part: Pairs = part) -> Tensor:
                    # Some dependencies of diffusers switch gradients off globally: ask for them where they are needed.
                    with torch.enable_grad(), autocast(pipe, config.mixed_precision):
                        student.apply()
                        return batch_loss(pipe, student, term.steps, part, term.call, progress.loss)

                loss = progress.valid(sampled)
                fraction = loss * (len(part) / config.batch_size)
                if not bool(fraction.detach().isfinite()):
                    raise FloatingPointError(_where_it_broke(pipe, student, term, part, update, rate, config))
                # Terms weigh alike, though few steps err more.
                scaler.scale(fraction / (progress.start[term.name] or 1.0)).backward()
                value += fraction.detach().to(value)
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = total(parameter.grad)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            # A scaler leaves such an update out and goes lower, from 65536; what is not finite at 1 never is.
            if not bool(norm.isfinite()) and (not scaler.is_enabled() or scaler.get_scale() < 1):
                raise FloatingPointError(
                    f"The gradient is not finite at update {update} of the {term.name}-step solver, though the loss is "
                    f"{float(value):.4g}. Use a wider mixed_precision than {config.mixed_precision or 'no'!r}, or a "
                    "loss that has a slope there."
                )
            for group in optimizer.param_groups:
                group["lr"] = rate
            scaler.step(optimizer)
            scaler.update()
            progress.own, counts = scaler.state_dict(), progress.meter.counts
            counts["backward"] = counts["student"] // (1 + config.recompute)
            return {f"loss/{term.name}": float(total(value)), "lr": rate}

        progress.run(step, optimizer)


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
    paths: Pairs | None = None,
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
        paths: a teacher's, to start from weights that follow them, see :func:`regress`.
    """
    scheduler = DyWeightScheduler.from_config(pipe.scheduler)
    initial = initial_table(scheduler, steps, config, grid)
    if paths is not None:
        initial = regress(
            pipe, initial, paths, call, batch_size=config.batch_size, mixed_precision=config.mixed_precision
        )
    student = TableStudent(scheduler, initial, config.bounded, config.time_scaling)
    terms, options = [Term(steps, call, train, held_out)], {"config": config, "loss": loss}
    errors, cost = learn(pipe, student, terms, checkpoints=checkpoints, log=log, **options)
    with torch.no_grad():
        table = student.table()
    detached = {"weights": table.weights.detach(), "time_scale": table.time_scale.detach().clone()}
    provenance = _provenance(pipe, teacher, terms, student, errors[terms[0].name], cost, **options)
    _count_paths(provenance, {} if paths is None else {steps: paths}, teacher, cost)
    return replace(table, **detached, provenance=provenance)


def _count_paths(
    provenance: dict[str, Any], paths: Mapping[int, Pairs], teacher: Teacher, cost: Mapping[str, int | float]
) -> None:
    """What regression took: teachers at least as fine as the other one, and N samplings of 1 to N steps."""
    spent, per_step = provenance["evaluations"], cost["per_step"]
    for n, own in paths.items():
        spent["teacher"] += round(per_step * len(own) * n * -(-teacher.num_inference_steps // n))
        spent["regression"] = spent.get("regression", 0) + round(per_step * len(own) * n * (n + 1) / 2)


def initial_continuous(
    scheduler: DyWeightScheduler, config: LearningConfig, grid: Mapping[str, Any] | None
) -> ContinuousTable:
    """Where the learning of a function that writes tables starts."""
    grid = dict(grid) if grid is not None else default_grid(scheduler)
    function = ContinuousTable.initial(config.order, grid, base=config.init, horizon=config.horizon)
    return replace(function, convention=scheduler.host.prediction.convention)


def distill_continuous(
    pipe: Any,
    teacher: Teacher,
    train: Pairs | Source | Variants[Pairs | Source],
    held_out: Pairs | Variants[Pairs],
    steps: Sequence[int],
    *,
    call: Call | Variants[Call],
    config: LearningConfig = LearningConfig(),
    grid: Mapping[str, Any] | None = None,
    loss: Loss = latent_mse,
    paths: Mapping[int, Pairs] | None = None,
    late: Late | None = None,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
) -> ContinuousTable:
    """Learn the function that writes the table of every number of steps, on some of them together.

    Args:
        train, held_out, call: as of :func:`distill`; or of several variants by name. Where these differ in the guidance
            scale, tables depend on it, and the pipeline is bound, see :func:`dywspan.bind`.
        steps: numbers of steps to learn from; few and many, for the function to hold between them.
        paths: a teacher's by number of steps, to start from weights that follow them, see :func:`regress_continuous`;
            of the variant that is the middle one.
        late: training and held-out pairs that start in the middle of the way.
        others: as of :func:`distill`.
    """
    scheduler = DyWeightScheduler.from_config(pipe.scheduler)
    terms, options = make_terms(pipe, steps, train, held_out, call, late), {"config": config, "loss": loss}
    initial, size = initial_continuous(scheduler, config, grid), config.batch_size
    if paths:
        middle = terms[len(train) // 2].call if isinstance(train, Mapping) else call
        initial = regress_continuous(
            pipe, initial, paths, middle, batch_size=size, mixed_precision=config.mixed_precision
        )
    student = ContinuousStudent(scheduler, guided(initial, around(terms)))
    errors, cost = learn(pipe, student, terms, checkpoints=checkpoints, log=log, **options)
    provenance = _provenance(pipe, teacher, terms, student, errors, cost, **options)
    _count_paths(provenance, paths or {}, teacher, cost)
    return replace(student.table(), coefficients=student.coefficients.detach().clone(), provenance=provenance)


def distill_lift(
    pipe: Any,
    teacher: Teacher,
    train: Pairs | Source | Variants[Pairs | Source],
    held_out: Pairs | Variants[Pairs],
    base: DyWeightScheduler,
    steps: Sequence[int],
    *,
    call: Call | Variants[Call],
    config: LearningConfig,
    layout: str = "image",
    operator: Mapping[str, Any] | None = None,
    name: str = "shared",
    continuous: bool = False,
    loss: Loss = latent_mse,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
) -> SpanLiftScheduler:
    """Learn a SpanLift operator on a frozen base, shared by all ``steps``.

    Args:
        train, held_out, call: as of :func:`distill_continuous`, variants only with ``continuous``.
        base: tables or a classical solver for every one of ``steps``; a SpanLift solver is gone on with.
        layout: of the latents.
        operator: size of the operator, see :class:`ResidualOperator`.
        name: of the operator in the artefact.
        continuous: alpha and beta as functions that give them for every number of steps.

    Raises:
        ValueError: variants without ``continuous``.
    """
    if isinstance(train, Mapping) and not continuous:
        raise ValueError("Lifts of single numbers of steps are for one call: set continuous, or leave out variants.")
    torch.manual_seed(config.seed)
    size: dict[str, Any] = {"order": config.order, "layout": layout, "operator": operator, "name": name}
    size |= {"horizon": config.horizon if continuous else None}
    terms, options = make_terms(pipe, steps, train, held_out, call), {"config": config, "loss": loss}
    shape = terms[0].held_out.endpoints.shape[1:]
    student = LiftStudent(base, steps, shape, guidance_scale=around(terms), **size)
    errors, cost = learn(pipe, student, terms, checkpoints=checkpoints, log=log, **options)
    scheduler = student.lifted
    for network in scheduler.operators.values():
        network.requires_grad_(False)

    def provenance(error: Mapping[str, Any]) -> dict[str, Any]:
        return _provenance(pipe, teacher, terms, student, error, cost, **options)

    for n, lift in scheduler.lifts.items():
        scheduler.lifts[n] = replace(lift.detach(), provenance=provenance(errors[str(n)]))
    if (function := scheduler.continuous_lift) is not None:
        coefficients = function.coefficients.detach()
        scheduler.continuous_lift = replace(function, coefficients=coefficients, provenance=provenance(errors))
    return scheduler


def _provenance(
    pipe: Any,
    teacher: Teacher,
    terms: Sequence[Term],
    student: Student,
    errors: Mapping[str, Any],
    cost: Mapping[str, int | float],
    *,
    config: LearningConfig,
    loss: Loss,
) -> dict[str, Any]:
    by_variant = {term.variant: term for term in terms if term.whole is None}
    kept = sum(len(term.train) for term in by_variant.values() if isinstance(term.train, Pairs))
    held_out = sum(len(term.held_out) for term in by_variant.values())
    drawn = (config.number("updates") + (config.optimizer not in OPTIMIZERS)) * config.batch_size  # and one to try on
    steps = (kept + held_out) * teacher.num_inference_steps
    if late := [term for term in terms if term.whole is not None]:  # all from the same paths
        common, substeps = common_path((t.whole for t in late if t.whole is not None), teacher.num_inference_steps)
        samples = sum(len(pairs) for pairs in (late[0].train, late[0].held_out) if isinstance(pairs, Pairs))
        steps += samples * common * substeps
    teacher_cost = round(steps * cost["per_step"])
    shared, *calls = [_plain(term.call) for term in by_variant.values()]
    call = {k: v for k, v in shared.items() if all(k in other and other[k] == v for other in calls)}
    variants = {
        name: {k: v for k, v in _plain(term.call).items() if k not in call} for name, term in by_variant.items() if name
    }
    return {
        "base_model": str(getattr(pipe, "name_or_path", "")),
        "pipeline": type(pipe).__name__,
        "call": call,
        **({"variants": variants} if variants else {}),
        "latent_shape": list(terms[0].held_out.endpoints.shape[1:]),
        "teacher": teacher.summary(),
        "loss": getattr(loss, "__name__", type(loss).__name__),
        "learning": {**config.learning, "lr": config.lr or student.lr},
        "pairs": {"train": kept or drawn, "held_out": held_out},
        "held_out_error": dict(errors),
        "evaluations": {"teacher": teacher_cost, **{k: v for k, v in cost.items() if k != "per_step"}},
        "dywspan_version": __version__,
    }


def _plain(call: Call) -> dict[str, Any]:
    """What a provenance can hold of it."""
    return {k: v for k, v in call.items() if isinstance(v, (int, float, str, bool))}


def batch_loss(pipe: Any, student: Student, n: int, part: Pairs, call: Mapping[str, Any], loss: Loss) -> Tensor:
    """The endpoint's loss, and for a path the squared errors of the states before it (DyWeight eq. (A.15))."""
    states: list[Tensor] = []

    def keep(i: int, prev_sample: Tensor) -> None:
        assert student.scheduler.plan is not None
        states.append(student.scheduler.plan.state_after(i, prev_sample).float())

    watch = keep if part.is_path else None
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
    term: Term,
    part: Pairs,
    update: int,
    rate: float,
    config: LearningConfig,
) -> str:
    broken: list[int] = []
    watch = lambda i, x: None if bool(x.isfinite().all()) else broken.append(i)  # noqa: E731
    with autocast(pipe, config.mixed_precision):
        sample(pipe, student.scheduler, term.steps, part.inputs, part.seeds, term.call, watch=watch)
    if broken:
        place = f"from sampling step {broken[0]} (sigma {float(student.scheduler.sigmas[broken[0]]):.4g}) on"
    else:
        place = "though every sampling step is finite: look at the teacher's endpoints and at the loss"
    return (
        f"The loss is not finite at update {update} of the {term.name}-step solver, {place}; pairs with seeds "
        f"{list(part.seeds)}. Lower lr={rate}, start from another base than init={config.init!r}, or use a wider "
        f"mixed_precision than {config.mixed_precision or 'no'!r}."
    )
