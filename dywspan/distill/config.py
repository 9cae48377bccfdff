"""What a distillation is told: one flat list of settings, from a YAML file, the command line, or Python."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from ..core.bases import multistep
from ..core.layout import LAYOUTS
from ..pipelines.features import FEATURES
from ..settings import check_sampling, check_types, help_of, option
from .losses import LATENT

# By gradients and by least squares, whose updates take more and tell more.
DEFAULTS = {"updates": (300, 30), "evaluate_every": (25, 5), "checkpoint_every": (25, 1)}
_SAID = {name: "default {}, least_squares {}".format(*numbers) for name, numbers in DEFAULTS.items()}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@dataclass(frozen=True)
class LearningConfig:
    """How a solver is learned from pairs. The defaults are DyWeight's where they do not depend on the model.

    Source: DyWeight appendix D.2.
    """

    optimizer: Literal["adam", "adamw", "least_squares"] = option("adamw", "least_squares needs no gradients")
    updates: int | None = option(None, f"for each solver; {_SAID['updates']}")
    batch_size: int = option(8, "pairs an update sees, over all processes: results do not depend on their number")
    micro_batch_size: int | None = option(None, "pairs a process computes at a time; by default all of its share")
    lr: float | None = option(
        None, "peak rate, after warm-up and before cosine decay; default 1e-2, SpanLift 1e-3, TimeLift 2e-3"
    )
    weight_decay: float = option(0.0, "of the optimiser")
    clip: float = option(1.0, "gradient norm")
    order: int = option(2, "K, derivatives a step may use")
    init: str = option("ipndm", "base solver a table starts from: ipndm, euler, uniform, adams, ...")
    regression: int = option(0, "teacher paths that the first weights are fitted to, row by row; 0: start from init")
    horizon: float = option(8.0, "continuous: steps from which on the solver turns into its start, init or base")
    afs: bool = option(False, "analytical first step: one network evaluation less, for VE and VP models")
    bounded: float = option(0.0, "s = 1 + this (2 sigmoid(phi) - 1): 0.5 is the paper's for FLUX; 0: s is free")
    time_shifting: bool = option(True, "levels follow the weights' sums (DyWeight eq. 9); off for the ablation")
    time_scaling: bool = option(True, "learn s; off for the ablation")
    learn_base: bool = option(False, "timelift: learn the base's table together with the offsets")
    path_substeps: int = option(0, "substeps of a teacher for every step (DyWeight eq. A.15); 0: endpoint only")
    ridge: float = option(0.0, "least_squares: weight of the squared distance to the start, for few pairs")
    difference: float | None = option(None, "least_squares: step of the differences; default by precision")
    evaluate_every: int | None = option(
        None, f"updates between held-out evaluations, of which the best is kept; {_SAID['evaluate_every']}"
    )
    patience: int = option(0, "stop after this many evaluations without a better one; 0: never")
    recompute: bool = option(True, "one denoiser call's activations at a time in memory: flat in the number of steps")
    recompute_blocks: bool = option(False, "with recompute: one block's activations at a time, for large networks")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "while learning; default: the launcher's")
    seed: int = option(0, "of the order of the pairs and of the operator's initial weights")

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
    revision: str | None = option(None, "of the model on the Hub")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "of the pipeline's weights")
    fsdp: bool = option(False, "shard the denoiser over the processes: for backbones that do not fit on one")
    call: dict[str, Any] = option({}, 'arguments of the pipeline\'s call, e.g. {"height": 512, "guidance_scale": 4.5}')
    guidance_scale: float | None = option(None, "short for call.guidance_scale")

    prompts: str | list | None = option(
        None, "file (.txt, .jsonl, .csv), a dataset, a list, or 'default'; none for unconditional models"
    )
    prompt_column: str | None = option(None, "of a dataset or file; default 'prompt'")
    prompt_split: str = option("train", "split of the dataset")
    held_out_prompts: str | list | None = option(None, "for held-out pairs; default: the lines after")
    test_prompts: str | list | None = option(None, "for pairs to test on; default: the lines after those held out")
    release_text_encoders: bool = option(
        False, "encode all prompts, drop the text encoders, and only then load the denoiser"
    )

    teacher: str = option("ipndm", "base solver, or a diffusers scheduler's class name")
    teacher_steps: int = option(50, "of the teacher; network evaluations, but for two-stage solvers")
    teacher_order: int = option(2, "of a base solver as teacher")
    teacher_grid: dict[str, Any] | None = option(None, "of a base solver as teacher; the pipeline's own by default")
    teacher_batch_size: int = option(16, "teacher samples computed at a time; fewer once memory does not suffice")
    pairs: int = option(256, "teacher pairs to learn from")
    held_out: int = option(64, "teacher pairs to choose the best solver by")
    test: int = option(0, "teacher pairs after those, for the reported error only: neither learned from nor chosen by")
    on_the_fly: bool = option(False, "fresh training pairs for each update, not kept")
    cache: str | None = option(None, "directory of teacher pairs, to share between runs; by default in output")

    solver: Literal["dyweight", "spanlift", "timelift"] = option("dyweight", "what is learned")
    steps: list[int] = option([5], "numbers of steps to learn for")
    continuous: bool = option(
        False, "learn from steps one function that writes a table, or a lift, for any number of them"
    )
    late_starts: list[str] = option(
        [], 'continuous: learn also to start in the middle, as img2img does; "3/5": the last three of five steps'
    )
    variants: dict[str, Any] = option(
        {}, 'continuous: learn for several calls together, and follow their guidance scales; {"small": {"height": 512}}'
    )
    grid: dict[str, Any] | None = option(None, 'nominal grid of tables, e.g. {"name": "flow", "shift": 3}')
    base: str = option(
        "euler",
        "of SpanLift and TimeLift: a base solver, or a DyWeight or SpanLift artefact; lifts there are gone on with",
    )
    layout: str = option("image", f"of the latents, for SpanLift and decoding: {', '.join(sorted(LAYOUTS))}")
    operator: dict[str, Any] = option({}, 'SpanLift operator, e.g. {"width": 32}')
    shared: bool = option(False, "one SpanLift operator for all steps, not one for each")

    loss: str = option("mse", f"on latents: {', '.join(LATENT)}")
    latent_size: list[int] | None = option(None, "height and width of packed latents that are no square, for features")
    features: str | None = option(None, f"of decoded images, for the loss: {', '.join(FEATURES)}, timm:NAME, ...")
    latent_weight: float | None = option(None, "c of c * latent loss + feature loss; default 0.1, 0 for pixels")

    output: str = option("", "directory of the artefact; the same command continues a run that was stopped")
    checkpoint_every: int | None = option(None, f"updates between checkpoints; {_SAID['checkpoint_every']}")
    keep_checkpoints: int = option(2, "checkpoints kept of each solver")
    trackers: list[str] = option([], "of Accelerate: tensorboard, trackio, wandb, ...")
    pictures: int = option(4, "held-out samples drawn for each solver: teacher, base and student")
    push_to_hub: str | None = option(None, "upload the artefact to this Hub repository")
    dry_run: bool = option(False, "print the plan with measured estimates of time and memory, and stop")

    def __post_init__(self) -> None:
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
