"""All that a run needs, checked, before anything is computed; and the tasks that it consists of."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.bases import multistep
from ..core.layout import LAYOUTS, Packed
from ..core.prediction import Flow
from ..pipelines.classical import default_grid
from ..pipelines.gradients import check_gradients
from ..pipelines.hashes import digest, fingerprint
from ..pipelines.inputs import check_call
from ..pipelines.pairs import Pairs, Source, common_path, ends, fresh, make_pairs
from ..pipelines.processes import share
from ..pipelines.rollout import Inputs, set_timesteps
from ..pipelines.teacher import Teacher, find_teacher
from ..schedulers.bind import bind, call_arguments, guidance_argument
from ..schedulers.dyweight import DyWeightScheduler
from ..schedulers.spanlift import BASE, SpanLiftScheduler
from .checks import check_extension, check_model, check_operator, check_variants, find_base
from .config import OPTIMIZERS, DistillConfig
from .kinds import STUDENTS
from .losses import Loss, make_loss, residuals_of
from .output import find_artefact
from .split import split_inputs
from .task import Late, Task, make_terms

# Three ranges of seeds that never meet: a demo's or user's small ones, held-out pairs, training pairs.
HELD_OUT_SEED, TRAIN_SEED = 10**6, 2 * 10**6


@dataclass(frozen=True, eq=False)
class Setup:
    """All a run needs.

    Attributes:
        base: of SpanLift; None where tables are learned.
        model: hash of the pipeline's weights.
        left_out: text encoders that the pipeline was loaded without.
    """

    config: DistillConfig
    pipe: Any
    inputs: Inputs
    held_out_inputs: Inputs
    test_inputs: Inputs
    teacher: Teacher
    loss: Loss
    base: DyWeightScheduler | None
    model: str
    left_out: Mapping[str, bytes]

    @property
    def calls(self) -> dict[str | None, dict[str, Any]]:
        """That of each variant by name; None: the only one."""
        return self.config.calls

    @property
    def call(self) -> dict[str, Any]:
        """The one that is shown: the middle one."""
        calls = [*self.calls.values()]
        return calls[len(calls) // 2]

    def key(self, group: list[int]) -> str:
        """Hash of everything that the result for these numbers of steps depends on."""
        own = {} if self.base is None else self.base.config
        base = {k: own.get(k) for k in (*BASE, "lifts", "continuous_lift", "weights_sha256", "timelift_sha256")}
        base["tables"] = {n: table for n, table in (base["tables"] or {}).items() if int(n) in group}
        host = {k: v for k, v in self.pipe.scheduler.config.items() if not k.startswith("_") and v is not None}
        known = [self.teacher.describe(), host, self.inputs, self.held_out_inputs]
        return digest([self.config.matters, self.model, base, *known])

    def untrained(self, steps: int) -> DyWeightScheduler:
        """Where learning starts."""
        config, base = self.config, self.base
        base = DyWeightScheduler.from_config(self.pipe.scheduler) if base is None else base
        return STUDENTS[config.solver, config.continuous].untrained(base, steps, config, config.grid)

    # ------------------------------------------------------------------ tasks

    def task(self, group: list[int]) -> Task:
        """What is learned for some numbers of steps together, with the teacher's pairs made."""
        config, name = self.config, "-".join(map(str, group))
        after = config.groups[config.groups.index(group) + 1 :]
        substeps = config.path_substeps
        teacher = self.path_teacher(group[0], substeps) if substeps else self.teacher
        train, held_out = self.pairs(teacher)
        calls: Any = self.calls if config.variants else config.call
        return Task(
            self.pipe,
            teacher,
            make_terms(self.pipe, group, train, held_out, calls, self.late(), self.tests(teacher)),
            config,
            self.loss,
            solver=config.solver,
            continuous=config.continuous,
            grid=config.grid,
            paths={n: self.paths(n) for n in group if config.regression},
            base=self.base,
            layout=config.layout,
            operator=config.operator,
            name="continuous" if config.continuous else "shared" if config.shared else name,
            part=f"{config.groups.index(group) + 1} of {len(config.groups)}" if len(config.groups) > 1 else "",
            later=sum(map(sum, after)) / sum(group),
        )

    def pairs(self, teacher: Teacher) -> tuple[Any, Any]:
        """Training and held-out pairs; of several variants by name."""
        train: dict[str | None, Any] = {}
        held_out: dict[str | None, Any] = {}
        for name, call in self.calls.items():
            held_out[name] = self._made(teacher, self.held_out_inputs, HELD_OUT_SEED, call)
            train[name] = self._fresh(teacher, call) if self.config.on_the_fly else self._trained(teacher, call)
        return (train, held_out) if self.config.variants else (train[None], held_out[None])

    def tests(self, teacher: Teacher) -> Any:
        """The pairs that only the reported error is of; of several variants by name; None: there are none."""
        if not self.test_inputs:
            return None
        first = HELD_OUT_SEED + len(self.held_out_inputs)
        made = {name: self._made(teacher, self.test_inputs, first, call) for name, call in self.calls.items()}
        return made if self.config.variants else made[None]

    def paths(self, n: int) -> Pairs:
        """What the first weights of a table of n steps are fitted to."""
        teacher = self.path_teacher(n, -(-self.config.teacher_steps // n))
        return self._made(teacher, self.inputs[: self.config.regression], TRAIN_SEED, self.call)

    def late(self) -> Late:
        """Training and held-out pairs of every late start, all from the same paths."""
        if not (starts := self.config.ends):
            return {}
        common, substeps = common_path((whole for _, whole in starts), self.config.teacher_steps)
        teacher = self.path_teacher(common, substeps)
        scheduler, is_flow = teacher.scheduler, isinstance(teacher.scheduler.host.prediction, Flow)
        parts = (self.inputs, TRAIN_SEED), (self.held_out_inputs, HELD_OUT_SEED)
        train, held_out = (self._made(teacher, *part, self.call)[:] for part in parts)  # read once
        found = {}
        for steps, whole in starts:
            set_timesteps(scheduler, whole)
            level = 1.0 if is_flow else float(scheduler.sigmas[whole - steps])
            left = steps * common // whole
            found[steps, whole] = ends(train, left, level), ends(held_out, left, level)
        return found

    def path_teacher(self, steps: int, substeps: int) -> Teacher:
        """The student's own grid with several steps for each of its own. Source: DyWeight appendix C."""
        config, own = self.config, DyWeightScheduler.from_config(self.pipe.scheduler)
        base = config.teacher if config.teacher in multistep() else "ipndm"
        solver = {"solver": base, "solver_order": config.teacher_order}
        scheduler = DyWeightScheduler.from_config(own.config, grid=config.grid or default_grid(own), **solver)
        return Teacher(scheduler, (steps + config.afs) * substeps, substeps)

    def _trained(self, teacher: Teacher, call: Mapping[str, Any]) -> Pairs:
        return self._made(teacher, self.inputs, TRAIN_SEED, call)

    def _fresh(self, teacher: Teacher, call: Mapping[str, Any]) -> Source:
        return fresh(self.pipe, teacher, self.inputs, TRAIN_SEED, call)

    def _made(self, teacher: Teacher, inputs: Inputs, first_seed: int, call: Mapping[str, Any]) -> Pairs:
        seeds = range(first_seed, first_seed + len(inputs))
        options: dict[str, Any] = {"batch_size": self.config.teacher_batch_size, "model": self.model}
        return make_pairs(self.pipe, teacher, inputs, seeds, call=call, cache=self.config.pairs_cache, **options)


def prepare(pipe: Any, config: DistillConfig, left_out: Mapping[str, bytes] | None = None) -> Setup:
    """Find whatever is wrong with a configuration for a pipeline.

    The pipeline is bound where its solver is to be told what it is called with, see :func:`dywspan.bind`.

    Raises:
        ValueError, OSError: settings that cannot work, files that cannot be read.
    """
    share(range(config.batch_size))
    inputs, held_out_inputs, test_inputs = split_inputs(config)
    existing = find_artefact(config)
    if isinstance(LAYOUTS[config.layout], Packed) or guidance_argument(pipe) is not None:
        with suppress(TypeError):  # it cannot be told: that counts where it must be, and is said there
            bind(pipe)
    for call in config.calls.values():
        check_call(pipe, inputs, call)
    if config.late_starts and "latents" not in call_arguments(pipe):
        raise ValueError(f"late_starts={config.late_starts} need a pipeline that takes latents: leave them out.")
    base = find_base(config, pipe) if config.solver != "dyweight" else None
    if base is not None and Path(config.base).resolve() == Path(config.output).resolve():
        raise ValueError(f"base and output are both {config.output}: choose another output, so that a run can resume.")
    if config.solver == "spanlift" and isinstance(base, SpanLiftScheduler):  # its operators stay of their size
        own = base.config["operator"]
        config = replace(config, layout=base.config["layout"], order=own["order"], operator=dict(own))
    teacher = find_teacher(pipe, config.teacher, config.teacher_steps, config.teacher_order, config.teacher_grid)
    size: Any = config.latent_size and tuple(config.latent_size)
    loss = make_loss(pipe, config.loss, config.features, config.latent_weight, config.layout, size)
    if config.optimizer in OPTIMIZERS:
        check_gradients(pipe, config.recompute)
    else:
        residuals_of(loss)
    model, left_out = fingerprint(pipe, left_out), left_out or {}
    setup = Setup(config, pipe, inputs, held_out_inputs, test_inputs, teacher, loss, base, model, left_out)
    check_variants(pipe, config, {**inputs[0]}, [*setup.calls.values()])
    if base is not None:
        if config.solver == "spanlift":
            check_operator(config)
        check_extension(existing, base, config)
    for n in config.steps:
        set_timesteps(setup.untrained(n), n)
    if existing is not None:
        check_model(existing, setup.untrained(config.steps[0]), config)
    return setup
