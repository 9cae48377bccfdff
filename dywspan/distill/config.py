"""What a distillation is told: one flat list of settings, from a YAML file, the command line, or Python."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from .. import names
from ..settings import check_sampling, check_types, help_of, option

# By gradients and by least squares, whose updates take more and tell more.
DEFAULTS = {"updates": (300, 30), "evaluate_every": (25, 5), "checkpoint_every": (25, 1)}
_SAID = {name: "default: {}, least_squares {}".format(*numbers) for name, numbers in DEFAULTS.items()}
OPTIMIZERS = ("adam", "adamw")  # those that take gradients


@dataclass(frozen=True)
class LearningConfig:
    """How a solver is learned from pairs. The defaults are DyWeight's where they do not depend on the model.

    Source: DyWeight appendix D.2.
    """

    optimizer: Literal["adam", "adamw", "least_squares"] = option(
        "adamw", "how the solver is learned; least_squares needs no gradients"
    )
    updates: int | None = option(None, f"updates for each solver; {_SAID['updates']}")
    batch_size: int = option(
        8, "pairs in an update, over all processes; the results do not depend on the number of processes"
    )
    micro_batch_size: int | None = option(None, "pairs that a process computes at a time; default: its whole share")
    lr: float | None = option(
        None, "peak learning rate, with warm-up and cosine decay; default: 1e-2, SpanLift 1e-3, TimeLift 2e-3"
    )
    weight_decay: float = option(0.0, "weight decay of the optimiser")
    clip: float = option(1.0, "largest gradient norm; larger gradients are scaled down to it")
    order: int = option(2, "K, the number of derivatives that a step may use")
    init: str = option("ipndm", "classical solver that a table starts from: ipndm, euler, uniform, adams, ...")
    regression: int = option(
        0, "number of teacher paths that the first weights are fitted to, row by row; 0: start from init"
    )
    horizon: float = option(8.0, "continuous: number of steps from which the solver fades into init or base")
    afs: bool = option(False, "analytical first step: one network evaluation less, for VE and VP models")
    bounded: float = option(
        0.0, "bound b of the time scale, s = 1 + b (2 sigmoid(phi) - 1); the paper uses 0.5 for FLUX; 0: no bound"
    )
    time_shifting: bool = option(
        True, "let levels follow the sums of the weights (DyWeight eq. 9); switch it off for the ablation"
    )
    time_scaling: bool = option(True, "learn the time scale s; switch it off for the ablation")
    learn_base: bool = option(False, "timelift: learn the table of the base together with the offsets")
    path_substeps: int = option(
        0, "teacher steps for each step, to supervise the path (DyWeight eq. A.15); 0: supervise the endpoint only"
    )
    ridge: float = option(0.0, "least_squares: weight of the squared distance from the start; useful with few pairs")
    difference: float | None = option(
        None, "least_squares: step size of the finite differences; default: chosen by precision"
    )
    evaluate_every: int | None = option(
        None, f"updates between held-out evaluations; the best solver is kept; {_SAID['evaluate_every']}"
    )
    patience: int = option(0, "stop after this many held-out evaluations without improvement; 0: never")
    recompute: bool = option(
        True, "keep the activations of one network call at a time; memory then does not grow with the number of steps"
    )
    recompute_blocks: bool = option(
        False, "with recompute: keep the activations of one block at a time, for large networks"
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "precision while learning; default: that of the launcher"
    )
    seed: int = option(0, "seed of the order of the pairs and of the initial weights of the operator")

    def number(self, name: str) -> int:
        """One of ``DEFAULTS``, or what was set instead."""
        return getattr(self, name, None) or DEFAULTS[name][self.optimizer not in OPTIMIZERS]

    @property
    def learning(self) -> dict[str, Any]:
        """What a provenance records of the learning."""
        return {f.name: getattr(self, f.name) for f in fields(LearningConfig)}


@dataclass(frozen=True)
class DistillConfig(LearningConfig):
    """A whole run; every field is explained by ``dywspan distill --help``."""

    model: str = option("", "pipeline: a directory or a Hub id")
    revision: str | None = option(None, "revision of the model on the Hub")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "type of the pipeline's weights")
    fsdp: bool = option(False, "shard the denoiser over the processes, for networks that do not fit on one device")
    call: dict[str, Any] = option({}, 'arguments of the pipeline\'s call, e.g. {"height": 512, "guidance_scale": 4.5}')
    guidance_scale: float | None = option(None, "short for guidance_scale in call")

    prompts: str | list | None = option(
        None, "a file (.txt, .jsonl, .csv), a dataset, a list, or 'default'; leave it out for unconditional models"
    )
    prompt_column: str | None = option(None, "column of the dataset or file; default: 'prompt'")
    prompt_split: str = option("train", "split of the dataset")
    held_out_prompts: str | list | None = option(
        None, "prompts of the held-out pairs; default: the next lines of prompts"
    )
    test_prompts: str | list | None = option(None, "prompts of the test pairs; default: the lines after those held out")
    release_text_encoders: bool = option(False, "encode all prompts, drop the text encoders, then load the denoiser")

    teacher: str = option("ipndm", "teacher: a classical solver, or the class name of a diffusers scheduler")
    teacher_steps: int = option(
        50, "steps of the teacher; each is one network evaluation, or two with a two-stage solver"
    )
    teacher_order: int = option(2, "order of a classical solver as teacher")
    teacher_grid: dict[str, Any] | None = option(
        None, "grid of a classical solver as teacher; default: that of the pipeline"
    )
    teacher_batch_size: int = option(16, "teacher samples computed at a time; halved when memory runs out")
    pairs: int = option(256, "teacher pairs to learn from")
    held_out: int = option(64, "teacher pairs that the best solver is chosen by")
    test: int = option(0, "teacher pairs for the reported error only: not used to learn or to choose")
    on_the_fly: bool = option(False, "compute new training pairs for each update, and do not keep them")
    cache: str | None = option(None, "directory of the teacher pairs, which runs can share; default: inside output")

    solver: Literal["dyweight", "spanlift", "timelift"] = option("dyweight", "kind of solver to learn")
    steps: list[int] = option([5], "numbers of steps to learn for")
    continuous: bool = option(False, "learn one solver for any number of steps, from those in steps")
    late_starts: list[str] = option(
        [], 'continuous: also learn to start in the middle, as img2img does; "3/5" is the last three of five steps'
    )
    variants: dict[str, Any] = option(
        {}, 'continuous: learn for several calls together, e.g. guidance scales or sizes: {"small": {"height": 512}}'
    )
    grid: dict[str, Any] | None = option(None, 'nominal grid of tables, e.g. {"name": "flow", "shift": 3}')
    base: str = option(
        "euler",
        "base of SpanLift and TimeLift: a classical solver or an artefact; lifts in the artefact are learned further",
    )
    layout: str = option("image", f"layout of the latents, for SpanLift and decoding: {', '.join(names.LAYOUTS)}")
    operator: dict[str, Any] = option({}, 'size of the SpanLift operator, e.g. {"width": 32}')
    shared: bool = option(False, "learn one SpanLift operator for all numbers of steps, instead of one for each")

    loss: str = option("mse", f"loss on latents: {', '.join(names.LOSSES)}")
    latent_size: list[int] | None = option(None, "height and width of packed latents that are not square, for features")
    features: str | None = option(
        None,
        f"network whose features of the decoded image are in the loss: {', '.join(names.FEATURES)}, timm:NAME, ...",
    )
    latent_weight: float | None = option(
        None, "c in the loss c * latent loss + feature loss; default: 0.1, or 0 for pixels"
    )

    output: str = option("", "directory of the artefact; re-run the command to resume")
    checkpoint_every: int | None = option(None, f"updates between checkpoints; {_SAID['checkpoint_every']}")
    keep_checkpoints: int = option(2, "checkpoints to keep of each solver")
    trackers: list[str] = option([], "trackers of Accelerate: tensorboard, trackio, wandb, ...")
    pictures: int = option(4, "held-out samples to draw with the teacher, the base and the student")
    push_to_hub: str | None = option(None, "upload the artefact to this Hub repository")
    dry_run: bool = option(False, "print the plan with measured estimates of time and memory, and stop")

    def __post_init__(self) -> None:
        from ..core.bases import multistep
        from ..core.layout import LAYOUTS
        from .losses import LATENT

        check_types(self)
        check_sampling(self)
        if not self.output:
            raise ValueError(missing("output"))
        for name, least in _LEAST.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}: {help_of(self, name)}.")
        for name in ("lr", "clip", "horizon", "difference"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0: {help_of(self, name)}.")
        if not 0 <= self.bounded < 1:
            raise ValueError(f"bounded={self.bounded} must lie between 0 and 1: {help_of(self, 'bounded')}.")
        if not self.steps or min(self.steps) < 1 or len(set(self.steps)) < len(self.steps):
            raise ValueError(f"steps={self.steps} must name numbers of steps, each at least 1 and once.")
        if self.teacher_steps < max(self.steps):
            raise ValueError(
                f"teacher_steps={self.teacher_steps} is fewer than the student's {max(self.steps)}: a teacher must be "
                "more accurate than its students; use several times their steps."
            )
        choices = {"init": multistep(), "layout": LAYOUTS, "loss": LATENT}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"Unknown {name} {getattr(self, name)!r}: use one of {sorted(known)}.")
        if self.continuous and self.solver == "dyweight":
            wrong = {"afs": self.afs, "path_substeps": self.path_substeps}
            wrong |= {"bounded": self.bounded, "time_shifting": not self.time_shifting}
            wrong |= {"time_scaling": not self.time_scaling}
            if named := [f"{name}={getattr(self, name)!r}" for name, is_wrong in wrong.items() if is_wrong]:
                raise ValueError(f"continuous learns DyWeight tables of the usual form: leave out {', '.join(named)}.")
        if self.late_starts and (not self.continuous or self.solver != "dyweight" or self.variants):
            raise ValueError(
                f"late_starts={self.late_starts} are learned by continuous tables for one call: set continuous, and "
                "solver to dyweight, and leave out variants."
            )
        if not all(0 < steps < whole for steps, whole in self.ends) or len({*self.ends}) < len(self.ends):
            raise ValueError(f"late_starts={self.late_starts} must name fewer steps than the whole way has, each once.")
        if calls := [*self.variants.values()]:
            if not self.continuous:
                raise ValueError(f"variants={self.variants} are learned together by continuous: set it.")
            if not all(isinstance(call, dict) for call in calls) or any(calls.count(call) > 1 for call in calls):
                raise ValueError(f"variants={self.variants} must name calls, each by other arguments.")
        if self.regression and (self.solver != "dyweight" or self.afs):
            raise ValueError("regression fits the rows of tables without afs: leave it at 0 for anything else.")
        if self.path_substeps and self.solver != "dyweight":
            raise ValueError(f"path_substeps supervises tables: leave it at 0 for {self.solver}.")
        if self.solver == "timelift" and (self.continuous or self.optimizer == "least_squares" or self.fsdp):
            raise ValueError(
                "timelift is learned by gradients, for each number of steps by itself, on whole networks: use adam or "
                "adamw, and leave out continuous and fsdp."
            )
        if self.learn_base and self.solver != "timelift":
            raise ValueError("learn_base is for timelift: leave it out.")
        if self.optimizer == "least_squares" and self.path_substeps:
            raise ValueError("least_squares learns from endpoints: set path_substeps to 0.")
        if self.test_prompts is not None and not self.test:
            raise ValueError(f"test_prompts={self.test_prompts!r} are for test={self.test} pairs: set test as well.")
        if self.path_substeps and self.on_the_fly:
            raise ValueError("path_substeps needs teacher paths from the cache: set on_the_fly to false.")

    @property
    def groups(self) -> list[list[int]]:
        """Step counts that are learned together: all where they share an operator or a function."""
        together = self.continuous or (self.solver == "spanlift" and self.shared)
        return [self.steps] if together else [[n] for n in self.steps]

    @property
    def calls(self) -> dict[str | None, dict[str, Any]]:
        """Arguments of the pipeline's call for each variant by name; None: the only one."""
        return {name: {**self.call, **own} for name, own in self.variants.items()} or {None: self.call}

    @property
    def prompts_cache(self) -> Path:
        """Of prompts' embeddings."""
        return self.pairs_cache / "prompts"

    @property
    def pairs_cache(self) -> Path:
        """Of teacher pairs."""
        return Path(self.cache or Path(self.output) / "cache")

    @property
    def ends(self) -> list[tuple[int, int]]:
        """(steps, steps of the whole way) of each of ``late_starts``.

        Raises:
            ValueError: one is not of the form "3/5".
        """
        found = [re.fullmatch(r"(\d+)/(\d+)", text) for text in self.late_starts]
        if not all(found):
            raise ValueError(f'late_starts={self.late_starts} must be of the form "3/5": the last three of five steps.')
        return [(int(m[1]), int(m[2])) for m in found if m]

    @property
    def matters(self) -> dict[str, Any]:
        """Every setting that changes what is learned from given pairs: how a run recognises its own checkpoints."""
        return {k: v for k, v in asdict(self).items() if k not in _DO_NOT_MATTER}


def missing(name: str) -> str:
    """What to say of a setting that has to be given."""
    return f"{name} is missing: {help_of(DistillConfig, name)}."


_POSITIVE = (
    *("updates", "batch_size", "micro_batch_size", "order", "evaluate_every", "pairs", "held_out"),
    *("teacher_steps", "teacher_order", "teacher_batch_size", "checkpoint_every", "keep_checkpoints"),
)
_NOT_NEGATIVE = (
    *("patience", "path_substeps", "pictures", "regression", "test"),
    *("weight_decay", "ridge", "latent_weight"),
)
_LEAST = dict.fromkeys(_POSITIVE, 1) | dict.fromkeys(_NOT_NEGATIVE, 0)
_DO_NOT_MATTER = {
    *("output", "cache", "checkpoint_every", "keep_checkpoints", "trackers", "pictures", "push_to_hub", "dry_run"),
    *("steps", "micro_batch_size", "recompute", "recompute_blocks", "fsdp", "release_text_encoders", "guidance_scale"),
    *("model", "revision", "base", "prompts", "held_out_prompts", "prompt_column", "prompt_split"),  # by their contents
    *("test", "test_prompts"),
}
