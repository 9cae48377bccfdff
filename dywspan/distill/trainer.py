"""Learn solvers for a pipeline: the loop, and all around it. A run that is repeated resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..artifact import provenances, steps_of
from ..core.layout import LAYOUTS, Packed
from ..pipelines.embeddings import PromptMemory, remembered_prompts
from ..pipelines.encoders import encode_apart
from ..pipelines.precision import fast_and_safe
from ..pipelines.processes import is_main, wait
from ..pipelines.rollout import blocks, denoisers, load_pipeline, sample
from ..schedulers.bind import bind, unbind
from ..schedulers.spanlift import SpanLiftScheduler
from ..text import markdown
from .card import errors, write_card
from .checkpoints import Checkpoints
from .config import OPTIMIZERS, DistillConfig, missing
from .gradients import Gradients
from .kinds import STUDENTS
from .output import find_artefact, locked, push, save_artefact, written
from .pictures import Pictures
from .plan import print_plan
from .progress import Log, Method, Progress, Show
from .secant import least_squares
from .setup import Setup, prepare
from .split import split_inputs
from .student import Student
from .task import Task
from .time_lift import modulation

METHODS: dict[str, Callable[[Progress], Method]] = {
    **dict.fromkeys(OPTIMIZERS, Gradients),
    "least_squares": least_squares,
}


def run(config: DistillConfig) -> Any:
    """Load the pipeline that ``config`` names, and learn, see :class:`SolverTrainer`; None after ``dry_run``.

    Raises:
        ValueError, OSError: as of :class:`SolverTrainer`, or no model.
    """
    if not config.model:
        raise ValueError(missing("model"))
    accelerator = _accelerator(config)
    # What can be found out before gigabytes are loaded.
    inputs = [own for part in split_inputs(config) for own in part]
    find_artefact(config)
    # A network that is to be sharded may not fit on one device: each block moves there when it is.
    device = "cpu" if config.fsdp else accelerator.device
    how: dict[str, Any] = {"dtype": getattr(torch, config.dtype), "device": device, "revision": config.revision}
    left_out: dict[str, bytes] = {}
    if config.release_text_encoders and not config.dry_run:  # which writes nothing
        size = config.teacher_batch_size
        left_out = encode_apart(config.model, inputs, config.calls.values(), config.prompts_cache, size, **how)
    pipe = load_pipeline(config.model, **how, parts=dict.fromkeys(left_out))
    return SolverTrainer(pipe, config, left_out).train()


class SolverTrainer:
    """Learns solvers for a pipeline, whatever it is made of: it need only sample.

        scheduler = SolverTrainer(pipe, DistillConfig(prompts="prompts.txt", steps=[3, 5], output="solvers")).train()

    Source: DyWeight (arXiv 2603.11607), SpanLift (arXiv 2606.08672).

    Args:
        pipe: a diffusers pipeline, where it is: on its device, offloaded, quantised or compiled. It is given back as it
            was.
        config: what is learned, how, and where it is saved; ``model`` may stay empty.
        left_out: text encoders that the pipeline was loaded without, as :func:`encode_apart` says them.

    Attributes:
        setup: all of it, checked.

    Raises:
        ValueError, OSError: settings that cannot work, files that cannot be read.
    """

    def __init__(self, pipe: Any, config: DistillConfig, left_out: Mapping[str, bytes] | None = None) -> None:
        self.accelerator, self._own_class = _accelerator(config), type(pipe)
        precision: Any = config.mixed_precision or self.accelerator.mixed_precision
        self.setup = prepare(pipe, replace(config, mixed_precision=precision), left_out)
        self._is_told = type(pipe) is not self._own_class
        if config.fsdp:
            _shard(pipe)
            pipe.to(self.accelerator.device)
        with self._remembered() if left_out else nullcontext():
            _check_sample(self.setup)

    def train(self) -> Any:
        """Learn and save.

        Every result is written as soon as it is there, and found again when the same is repeated.

        Returns:
            The scheduler with all that ``config.output`` holds; None after ``dry_run``, which only prints the plan.

        Raises:
            OSError: files that cannot be written.
            FloatingPointError: the loss is not finite.
        """
        setup, config = self.setup, self.setup.config
        if config.dry_run:
            print_plan(setup)
            return None
        output = Path(config.output)
        output.mkdir(parents=True, exist_ok=True)
        with written(), locked(output), self._at_work(), self._tracked() as log:
            result = find_artefact(config)  # again: another run may have ended since
            pictures = Pictures(setup, self.accelerator.trackers)
            for done, group in enumerate(config.groups):
                for n in group:
                    pictures.show(n)  # the first ones come before the pairs
                before = done * config.number("updates")  # a tracker's step never goes back
                logged = None if log is None else lambda numbers, update, log=log, b=before: log(numbers, b + update)
                shown = _best_so_far(pictures, group, before)
                learned = distill(setup.task(group), self._checkpoints(group), logged, shown)
                kind = STUDENTS[config.solver, config.continuous]
                result = learned if result is None else kind.merge(result, learned)
                save_artefact(result, output)
                for n in group:
                    pictures.show(n, "learned", result)
                    _say(result, n, output)
            if is_main():
                model = config.model or str(getattr(setup.pipe, "name_or_path", "") or "")
                write_card(result, output, {**asdict(config), "model": model}, setup.inputs[0])
                print(markdown(errors(result)))
                if config.push_to_hub:
                    push(config.push_to_hub, output)
            wait()
        return result

    def _remembered(self) -> AbstractContextManager[PromptMemory | None]:
        return remembered_prompts(self.setup.pipe, self.setup.config.prompts_cache, self.setup.left_out)

    def _checkpoints(self, group: list[int]) -> Checkpoints:
        config = self.setup.config
        folder = Path(config.output) / "state" / f"{'-'.join(map(str, group))}-{self.setup.key(group)}"
        return Checkpoints(folder, config.number("checkpoint_every"), config.keep_checkpoints)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Every prompt is encoded once, and then the text encoders may go; all is put back at the end."""
        setup, pipe = self.setup, self.setup.pipe
        bars = getattr(pipe, "_progress_bar_config", {})
        if self._is_told:  # this may not be the first time
            bind(pipe)
        pipe.set_progress_bar_config(disable=True)
        try:
            with fast_and_safe(), self._remembered() as memory:
                if memory is not None:
                    inputs = [*setup.held_out_inputs, *setup.inputs, *setup.test_inputs]
                    for call in setup.calls.values():
                        memory.fill(inputs, call, setup.config.teacher_batch_size)
                    if setup.config.release_text_encoders:
                        memory.release()
                yield
        finally:
            pipe.set_progress_bar_config(**bars)
            if self._is_told:
                unbind(pipe)

    @contextmanager
    def _tracked(self) -> Iterator[Log | None]:
        """What losses are logged to: Accelerate's trackers."""
        config, accelerator = self.setup.config, self.accelerator
        if not config.trackers:
            yield None
            return
        plain = (int, float, str, bool)
        settings = {k: v if isinstance(v, plain) else json.dumps(v) for k, v in asdict(config).items()}
        accelerator.init_trackers("dywspan", settings)
        try:
            yield lambda numbers, update: accelerator.log(dict(numbers), step=update)
        finally:
            accelerator.end_training()


def distill(
    task: Task, checkpoints: Checkpoints | None = None, log: Log | None = None, show: Show | None = None
) -> Any:
    """Learn the solver of one task, through the pipeline's own call.

    Args:
        checkpoints: where to go on from and to save to.
        log: gets losses by name, and the update.
        show: gets the best solver so far, and the update, whenever there is a better one.

    Returns:
        A ``DyWeightScheduler`` or ``SpanLiftScheduler`` that holds what was learned, with its provenance, and nothing
        else: the best that there was on the held-out pairs.

    Raises:
        ValueError: a task that its kind of solver or optimizer cannot learn.
        FloatingPointError: the loss or its gradient is not finite.
    """
    student = STUDENTS[task.solver, task.continuous].start(task)
    return student.result(learn(task, student, checkpoints, log, show).provenance)


def learn(
    task: Task,
    student: Student,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
    show: Show | None = None,
    quiet: bool = False,
) -> Progress:
    """Move a student to the best that it is on the held-out pairs, see :func:`distill`; ``quiet``: without a bar."""
    progress = Progress(task, student, checkpoints, log, show, quiet)
    method = METHODS[task.config.optimizer](progress)
    with fast_and_safe(), progress.meter.running(), method.around():
        progress.begin(method.optimizer)
        method.begin()
        for update in progress.updates():
            progress.done(method.step(update), method.optimizer)
        progress.finish(method.optimizer)
    return progress


def _accelerator(config: DistillConfig) -> Any:
    """Accelerate's state of this process, and its trackers.

    Raises:
        ValueError: trackers that are not installed, or processes that do not see each other.
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
    return accelerator


def _best_so_far(pictures: Pictures, group: list[int], before: int) -> Show:
    """Draws it, at each number of steps; ``before``: updates of the groups before this one."""

    def show(scheduler: Any, update: int) -> None:
        for n in group:
            pictures.show(n, f"update {update}", scheduler, before + update)

    return show


def _say(result: Any, n: int, output: Path) -> None:
    """What was learned for n steps."""
    found = {name: made["held_out_error"] for name, made in provenances(result).items() if steps_of(name) == n}
    for name, error in found.items() if is_main() else ():
        print(f"{name} steps: held-out error {error['before']:.4g} -> {error['after']:.4g}, saved to {output}")


@torch.no_grad()
def _check_sample(setup: Setup) -> None:
    """One sample of where learning starts is of the layout, and can be decoded where the loss does.

    Whether packed tokens are the size told is seen at a new SpanLift solver's first step.
    """
    config, steps = setup.config, min(setup.config.steps)
    if setup.base is None and config.features is None:
        return
    scheduler, layout = setup.untrained(steps), LAYOUTS[config.layout]
    if config.solver == "timelift":
        modulation(setup.pipe, scheduler, steps, setup.inputs[:1], setup.call)
        if config.features is None:
            return
    x, _ = sample(setup.pipe, scheduler, steps, setup.inputs[:1], [0], setup.call)
    try:
        if isinstance(scheduler, SpanLiftScheduler):
            layout.to_grid(x, scheduler.request and scheduler.request.latent_size)
        elif setup.base is not None and (x.ndim != 3 or not isinstance(layout, Packed)):
            layout.to_grid(x)  # no other solver is told the size of packed tokens
        if config.features is not None:
            setup.loss(setup.pipe, x.float(), x.float())
    except ValueError as error:
        raise ValueError(f"layout={config.layout!r} is not that of {type(setup.pipe).__name__}: {error}") from None


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
