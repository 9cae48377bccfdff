"""A whole distillation: pipeline, teacher pairs, learning, artefact, model card. Killed and repeated, it goes on."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..artifact import provenances, steps_of
from ..core.bases import BASES, multistep
from ..core.layout import LAYOUTS, Packed
from ..core.operator import make_operator
from ..core.prediction import Flow
from ..pipelines.embeddings import remembered_prompts
from ..pipelines.hashes import digest, fingerprint
from ..pipelines.inputs import check_call
from ..pipelines.pairs import UNWRITABLE, Pairs, Source, common_path, ends, fresh, make_pairs
from ..pipelines.processes import is_main, share, wait
from ..pipelines.rollout import Inputs, blocks, denoisers, load_pipeline, sample, set_timesteps
from ..pipelines.teacher import Teacher, find_teacher
from ..schedulers.apply import load
from ..schedulers.bind import bind, guidance_argument, guidance_scale
from ..schedulers.dyweight import DyWeightScheduler
from ..schedulers.hosts import different_networks
from ..schedulers.spanlift import BASE, SpanLiftScheduler, different_bases
from .card import Images, draw_samples, sample_images, write_card
from .checkpoints import Checkpoints
from .config import OPTIMIZERS, DistillConfig
from .losses import Loss, make_loss, residuals_of
from .plan import print_plan
from .progress import Log
from .split import split_inputs
from .student import gone_on_with
from .train import default_grid, distill, distill_continuous, distill_lift, initial_continuous, initial_table

# Three ranges of seeds that never meet: a demo's or user's small ones, held-out pairs, training pairs.
HELD_OUT_SEED, TRAIN_SEED = 10**6, 2 * 10**6
_OF_SOLVERS = {*BASE, *("layout", "operator", "lifts", "continuous_lift", "weights_sha256", "dywspan_version")}
SPARE = ".spare"  # a copy of the artefact, in its folder


@dataclass(frozen=True)
class Task:
    """All a run needs, checked, before anything is computed.

    Attributes:
        base: of SpanLift; None where tables are learned.
        model: hash of the pipeline's weights.
    """

    config: DistillConfig
    pipe: Any
    inputs: Inputs
    held_out_inputs: Inputs
    teacher: Teacher
    loss: Loss
    base: DyWeightScheduler | None
    model: str

    @property
    def groups(self) -> list[list[int]]:
        """Step counts that are learned together: all where they share an operator or a function."""
        config = self.config
        together = config.continuous or (config.solver == "spanlift" and config.shared)
        return [config.steps] if together else [[n] for n in config.steps]

    @property
    def calls(self) -> dict[str | None, dict[str, Any]]:
        """That of each variant by name; None: the only one."""
        config = self.config
        return {name: {**config.call, **own} for name, own in config.variants.items()} or {None: config.call}

    @property
    def call(self) -> dict[str, Any]:
        """The one that is shown: the middle one."""
        calls = [*self.calls.values()]
        return calls[len(calls) // 2]

    def key(self, group: list[int]) -> str:
        """Hash of everything that the result for these numbers of steps depends on."""
        own = {} if self.base is None else self.base.config
        base = {k: own.get(k) for k in (*BASE, "lifts", "continuous_lift", "weights_sha256")}
        base["tables"] = {n: table for n, table in (base["tables"] or {}).items() if int(n) in group}
        host = {k: v for k, v in self.pipe.scheduler.config.items() if not k.startswith("_") and v is not None}
        known = [self.teacher.describe(), host, self.inputs, self.held_out_inputs]
        return digest([self.config.matters, self.model, base, *known])

    def untrained(self, steps: int) -> DyWeightScheduler:
        """Where learning starts."""
        if self.base is not None:
            return self.base
        scheduler = DyWeightScheduler.from_config(self.pipe.scheduler)
        if self.config.continuous:
            return scheduler.with_continuous(initial_continuous(scheduler, self.config, self.config.grid))
        return scheduler.with_tables([initial_table(scheduler, steps, self.config, self.config.grid)])


def prepare(config: DistillConfig, device: torch.device | str = "cpu") -> Task:
    """Load what ``config`` names and find whatever is wrong with it.

    Raises:
        ValueError, OSError: settings that cannot work, files that cannot be read.
    """
    share(range(config.batch_size))
    inputs, held_out_inputs = split_inputs(config)
    existing = _artefact(config)
    # A network that is to be sharded may not fit on one device: each block moves there when it is.
    place = "cpu" if config.fsdp else device
    pipe = load_pipeline(config.model, getattr(torch, config.dtype), place, config.revision)
    if isinstance(LAYOUTS[config.layout], Packed) or guidance_argument(pipe) is not None:
        with suppress(TypeError):  # it cannot be told: that counts where it must be, and is said there
            bind(pipe)
    for own in config.variants.values() or [{}]:
        check_call(pipe, inputs, {**config.call, **own})
    if config.late_starts and "latents" not in inspect.signature(type(pipe).__call__).parameters:
        raise ValueError(f"late_starts={config.late_starts} need a pipeline that takes latents: leave them out.")
    base = _base(config, pipe) if config.solver == "spanlift" else None
    if isinstance(base, SpanLiftScheduler):  # its operators stay of their size
        if Path(config.base).resolve() == Path(config.output).resolve():
            raise ValueError(f"base and output are both {config.output}: a killed run could not go on from its base.")
        size = base.config["operator"]
        config = replace(config, layout=base.config["layout"], order=size["order"], operator=dict(size))
    teacher = find_teacher(pipe, config.teacher, config.teacher_steps, config.teacher_order, config.teacher_grid)
    model = fingerprint(pipe)
    size: Any = config.latent_size and tuple(config.latent_size)
    loss = make_loss(pipe, config.loss, config.features, config.latent_weight, config.layout, size)
    if config.optimizer not in OPTIMIZERS:
        residuals_of(loss)
    task = Task(config, pipe, inputs, held_out_inputs, teacher, loss, base, model)
    told = {call.get(str(guidance_argument(pipe))) for call in task.calls.values()}
    found = {guidance_scale(pipe, {**inputs[0], **call}) for call in task.calls.values()}
    if len(told) > 1 and len(found) == 1:
        raise ValueError(
            f"variants={config.variants}: {type(pipe).__name__} guides by {found.pop():g} in all of them. Give scales "
            "that it follows, and a negative prompt if it needs one."
        )
    if base is not None:
        _check_operator(config)
        _check_extension(existing, base, config)
    for n in config.steps:
        set_timesteps(task.untrained(n), n)
    if existing is not None:
        _check_model(existing, task.untrained(config.steps[0]), config)
    if config.fsdp:
        _shard(pipe)
        pipe.to(device)
    return task


def run(config: DistillConfig) -> DyWeightScheduler | SpanLiftScheduler | None:
    """Learn what ``config`` says and save it; None after ``dry_run``.

    Every result is written as soon as it is there, and found again when the same command is repeated.

    Raises:
        ValueError, OSError: settings that cannot work, files that cannot be read or written.
        FloatingPointError: the loss is not finite.
    """
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers

    trackers: Any = config.trackers or None
    known = [str(tracker) for tracker in get_available_trackers()]
    if unknown := [name for name in config.trackers if name not in [*known, "all"]]:
        raise ValueError(f"trackers={unknown} are not installed, or not Accelerate's: there are {known}.")
    # Without config.mixed_precision: Accelerate would keep it for every later run in this process.
    accelerator = Accelerator(log_with=trackers, project_dir=config.output)
    if (started := int(os.environ.get("WORLD_SIZE", 1))) != accelerator.num_processes:
        raise ValueError(f"{started} processes were started, but each sees itself alone: set ACCELERATE_USE_CPU=true.")
    precision: Any = config.mixed_precision or accelerator.mixed_precision
    task = prepare(replace(config, mixed_precision=precision), accelerator.device)
    _check_sample(task)
    if config.dry_run:
        print_plan(task)
        return None
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    with _written(), _locked(output), _encoded(task), _tracked(accelerator, config) as log:
        result = _artefact(config)  # again: another run may have ended since
        teacher = _samples(task, task.teacher.scheduler, task.teacher.num_inference_steps)
        for group in task.groups:
            new = _learn(task, group, log)
            if result is None:
                result = new
            elif config.solver == "spanlift":
                result = result.with_lifts(new)
            elif config.continuous:
                result = result.with_continuous(new.continuous)
            else:
                result = result.with_tables([*new.tables.values()])
            if is_main():
                # Two files are not written at once: whenever this is killed, one of the folders is whole.
                for folder in (output / SPARE, output):
                    result.save_pretrained(folder)
            for n in group:
                _show(task, result, n, teacher)
        assert result is not None
        if is_main():
            write_card(result, output, asdict(config), task.inputs[0])
            if config.push_to_hub:
                _push(config.push_to_hub, output)
        wait()
    return result


def _learn(task: Task, group: list[int], log: Log | None) -> Any:
    """One artefact with what one group of step counts learned."""
    config, name = task.config, "-".join(map(str, group))
    state = Path(config.output) / "state" / f"{name}-{task.key(group)}"
    calls: Any = task.calls if config.variants else config.call
    options: dict[str, Any] = {"call": calls, "config": config, "loss": task.loss, "log": log}
    options["checkpoints"] = Checkpoints(state, config.number("checkpoint_every"), config.keep_checkpoints)
    if task.base is not None:
        label = "continuous" if config.continuous else "shared" if config.shared else name
        options |= {"layout": config.layout, "operator": config.operator, "name": label}
        options["continuous"] = config.continuous
        return distill_lift(task.pipe, task.teacher, *_pairs(task, task.teacher), task.base, group, **options)
    scheduler = DyWeightScheduler.from_config(task.pipe.scheduler)
    if config.continuous:
        pairs, paths = _pairs(task, task.teacher), {n: _paths(task, n) for n in group if config.regression}
        options |= {"grid": config.grid, "paths": paths, "late": _ends(task)}
        return scheduler.with_continuous(distill_continuous(task.pipe, task.teacher, *pairs, group, **options))
    (n,) = group
    teacher = _path_teacher(task, n, config.path_substeps) if config.path_substeps else task.teacher
    options |= {"grid": config.grid, "paths": _paths(task, n) if config.regression else None}
    table = distill(task.pipe, teacher, *_pairs(task, teacher), n, **options)
    return scheduler.with_tables([table])


def _pairs(task: Task, teacher: Teacher) -> tuple[Any, Any]:
    """Training and held-out pairs; of several variants by name."""
    train: dict[str | None, Pairs | Source] = {}
    held_out: dict[str | None, Pairs] = {}
    for name, call in task.calls.items():
        held_out[name] = _made(task, teacher, task.held_out_inputs, HELD_OUT_SEED, call)
        if task.config.on_the_fly:
            train[name] = fresh(task.pipe, teacher, task.inputs, TRAIN_SEED, call)
        else:
            train[name] = _made(task, teacher, task.inputs, TRAIN_SEED, call)
    return (train, held_out) if task.config.variants else (train[None], held_out[None])


def _paths(task: Task, n: int) -> Pairs:
    """What the first weights of a table of n steps are fitted to."""
    teacher = _path_teacher(task, n, -(-task.config.teacher_steps // n))
    return _made(task, teacher, task.inputs[: task.config.regression], TRAIN_SEED, task.call)


def _ends(task: Task) -> dict[tuple[int, int], tuple[Pairs, Pairs]]:
    """Training and held-out pairs of every late start, all from the same paths."""
    if not (starts := task.config.ends):
        return {}
    common, substeps = common_path((whole for _, whole in starts), task.config.teacher_steps)
    teacher = _path_teacher(task, common, substeps)
    scheduler, is_flow = teacher.scheduler, isinstance(teacher.scheduler.host.prediction, Flow)
    parts = (task.inputs, TRAIN_SEED), (task.held_out_inputs, HELD_OUT_SEED)
    train, held_out = (_made(task, teacher, *part, task.call)[:] for part in parts)  # read once
    found = {}
    for steps, whole in starts:
        set_timesteps(scheduler, whole)
        level = 1.0 if is_flow else float(scheduler.sigmas[whole - steps])
        left = steps * common // whole
        found[steps, whole] = ends(train, left, level), ends(held_out, left, level)
    return found


def _made(task: Task, teacher: Teacher, inputs: Inputs, first_seed: int, call: Mapping[str, Any]) -> Pairs:
    config, seeds = task.config, range(first_seed, first_seed + len(inputs))
    options: dict[str, Any] = {"batch_size": config.teacher_batch_size, "model": task.model, "cache": _cache(config)}
    return make_pairs(task.pipe, teacher, inputs, seeds, call=call, **options)


def _show(task: Task, result: Any, n: int, teacher: Images | None) -> None:
    """Say and draw what was learned for n steps."""
    output = Path(task.config.output)
    errors = {name: made["held_out_error"] for name, made in provenances(result).items() if steps_of(name) == n}
    for name, error in errors.items() if is_main() else ():
        print(f"{name} steps: held-out error {error['before']:.4g} -> {error['after']:.4g}, saved to {output}")
    rows = {f"teacher, {task.teacher.num_inference_steps} steps": teacher}
    for label, scheduler in {"base": task.untrained(n), "learned": result}.items() if teacher else ():
        rows[f"{label}, {n} steps"] = _samples(task, scheduler, n)
    draw_samples(rows, task.held_out_inputs[: task.config.pictures], output / f"samples-{n}.png")


def _samples(task: Task, scheduler: Any, steps: int) -> Images | None:
    own = task.held_out_inputs[: task.config.pictures]
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + len(own))
    return sample_images(task.pipe, scheduler, steps, own, seeds, task.call)


def _cache(config: DistillConfig) -> Path:
    return Path(config.cache or Path(config.output) / "cache")


@contextmanager
def _encoded(task: Task) -> Iterator[None]:
    """Every prompt is encoded once, and then the text encoders may go."""
    config = task.config
    with remembered_prompts(task.pipe, _cache(config) / "prompts", task.model) as memory:
        if memory is not None:
            for call in task.calls.values():
                memory.fill([*task.held_out_inputs, *task.inputs], call, config.teacher_batch_size)
            if config.release_text_encoders:
                memory.release()
        yield


def _base(config: DistillConfig, pipe: Any) -> Any:
    """SpanLift's base: a DyWeight or SpanLift artefact, or a classical solver for every number of steps."""
    classical = config.base in BASES
    found: Any = None if classical else load(config.base)
    lifted = isinstance(found, SpanLiftScheduler)
    if config.optimizer not in OPTIMIZERS and not lifted:
        raise ValueError(
            f"least_squares fits alpha and beta of an operator that is there: base={config.base!r} must be a SpanLift "
            "artefact. Learn one by adam or adamw first."
        )
    if classical:
        return DyWeightScheduler.from_config(pipe.scheduler, solver=config.base)
    base = found
    own, other = (s.host.prediction for s in (DyWeightScheduler.from_config(pipe.scheduler), base))
    if wrong := different_networks(own, other):
        raise ValueError(
            f"base={config.base!r} was learned for {type(other).__name__} networks, and {config.model} is of kind "
            f"{type(own).__name__}, with other {wrong}: learn a base for this pipeline."
        )
    if config.continuous and base.continuous is None and base._solver is None:
        raise ValueError(
            f"base={config.base!r} has tables for {sorted(base.tables)} steps only, and continuous needs a base for "
            "every number: one learned with continuous, or a base solver."
        )
    return gone_on_with(base, config.steps, config.continuous) if lifted else base


def _artefact(config: DistillConfig) -> Any:
    """What lies in the output folder from an earlier run and is added to."""
    kind = SpanLiftScheduler if config.solver == "spanlift" else DyWeightScheduler
    if not (Path(config.output) / kind.config_name).exists():
        return None
    found = kind.load_config(config.output).get("_class_name")
    if found != kind.__name__:
        raise ValueError(f"{config.output} holds a {found}: choose another output for a {kind.__name__}.")
    try:
        return kind.from_pretrained(config.output)
    except (ValueError, OSError):
        if not (spare := Path(config.output) / SPARE).exists():
            raise
        return kind.from_pretrained(spare)


def _check_operator(config: DistillConfig) -> None:
    """The operator can be built, for any number of channels."""
    try:
        with torch.device("meta"):
            make_operator({"channels": 1, "order": config.order, **config.operator})
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"operator={config.operator} does not describe a SpanLift operator: {error}.") from None


@torch.no_grad()
def _check_sample(task: Task) -> None:
    """One sample of where learning starts is of the layout, and can be decoded where the loss does.

    Whether packed tokens are the size told is seen at a new SpanLift solver's first step.
    """
    config, steps = task.config, min(task.config.steps)
    if task.base is None and config.features is None:
        return
    scheduler, layout = task.untrained(steps), LAYOUTS[config.layout]
    x, _ = sample(task.pipe, scheduler, steps, task.inputs[:1], [0], task.call)
    try:
        if isinstance(scheduler, SpanLiftScheduler):
            layout.to_grid(x, scheduler.request and scheduler.request.latent_size)
        elif task.base is not None and (x.ndim != 3 or not isinstance(layout, Packed)):
            layout.to_grid(x)  # no other solver is told the size of packed tokens
        if config.features is not None:
            task.loss(task.pipe, x.float(), x.float())
    except ValueError as error:
        raise ValueError(f"layout={config.layout!r} is not that of {type(task.pipe).__name__}: {error}") from None


def _check_extension(existing: SpanLiftScheduler | None, base: DyWeightScheduler, config: DistillConfig) -> None:
    """A SpanLift artefact has one base, one layout and one size of operator: found out now, not after learning."""
    if existing is None:
        return
    size = {"order": config.order, **config.operator}
    wrong = different_bases(existing.config, base.config)
    wrong += ["layout"] if existing.config["layout"] != config.layout else []
    wrong += [f"operator.{k}" for k, v in size.items() if existing.config["operator"].get(k, v) != v]
    if wrong:
        raise ValueError(f"{config.output} holds operators that differ in {wrong}: choose another output.")


def _check_model(existing: DyWeightScheduler, new: DyWeightScheduler, config: DistillConfig) -> None:
    """An artefact's configuration is that of one pipeline's scheduler."""
    ours, theirs = (json.loads(scheduler.to_json_string()) for scheduler in (existing, new))
    shared = {k for k in ours.keys() & theirs.keys() if not k.startswith("_")} - _OF_SOLVERS
    if wrong := {k: (ours[k], theirs[k]) for k in sorted(shared) if ours[k] != theirs[k]}:
        raise ValueError(
            f"{config.output} holds solvers of another pipeline, or of its former scheduler: {wrong}. Choose another "
            "output."
        )


def _path_teacher(task: Task, steps: int, substeps: int) -> Teacher:
    """The student's own grid with several steps for each of its own. Source: DyWeight appendix C."""
    config, own = task.config, DyWeightScheduler.from_config(task.pipe.scheduler)
    base = config.teacher if config.teacher in multistep() else "ipndm"
    solver = {"solver": base, "solver_order": config.teacher_order}
    scheduler = DyWeightScheduler.from_config(own.config, grid=config.grid or default_grid(own), **solver)
    return Teacher(scheduler, (steps + config.afs) * substeps, substeps)


def _shard(pipe: Any) -> None:
    """FSDP: each process keeps its part of the denoisers' weights, and gathers a block at a time when it runs.

    Raises:
        ValueError: a single process has nothing to share with.
    """
    if not torch.distributed.is_initialized():
        raise ValueError("fsdp shards weights over processes, and there is one: accelerate launch --num_processes N.")
    from torch.distributed.fsdp import fully_shard

    for model in denoisers(pipe).values():
        model.requires_grad_(False)
        for block in blocks(model):
            fully_shard(block)
        fully_shard(model)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """One run at a time in a folder; a killed one's lock is gone with it."""
    from filelock import FileLock, Timeout

    if not is_main():
        yield
        return
    lock = FileLock(output / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OSError(f"Another run is writing to {output}: wait for it, stop it, or choose another output.") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _written() -> Iterator[None]:
    """A full disk's error says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise OSError(
            f"{error.filename} cannot be written ({error.strerror}). What is finished is kept: make room, or choose "
            "another output or cache, and run the same command again."
        ) from error


@contextmanager
def _tracked(accelerator: Any, config: DistillConfig) -> Iterator[Any]:
    """What ``fit`` logs to: Accelerate's trackers."""
    if not config.trackers:
        yield None
        return
    settings = {k: v if isinstance(v, (int, float, str, bool)) else json.dumps(v) for k, v in asdict(config).items()}
    accelerator.init_trackers("dywspan", settings)
    try:
        yield lambda numbers, update: accelerator.log(dict(numbers), step=update)
    finally:
        accelerator.end_training()


def _push(repository: str, output: Path) -> None:
    from huggingface_hub import HfApi

    files = ["scheduler_config.json", "spanlift.safetensors", "README.md", "*.png"]
    try:
        api = HfApi()
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=output, allow_patterns=files, commit_message="Upload solvers"
        )
    except Exception as error:
        raise OSError(
            f"The upload to {repository} failed ({error}). Nothing is lost: all is in {output}; repeat the command, or "
            f"`hf upload {repository} {output} .` later."
        ) from error
    print(f"Uploaded to {url}")
