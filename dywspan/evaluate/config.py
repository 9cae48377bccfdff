"""What an evaluation is told: one flat list of settings, from a YAML file, the command line, or Python."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..core.layout import LAYOUTS
from ..settings import check_sampling, check_types, option
from .baselines import BASELINES, slug
from .metrics import METRICS


@dataclass(frozen=True)
class QualityConfig:
    """A whole evaluation; every field is explained by ``dywspan eval --help``."""

    model: str = option("", "pipeline: a directory or a Hub id")
    revision: str | None = option(None, "of the model on the Hub")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "of the pipeline's weights")
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "of the solvers' evaluations, not of the reference's")
    call: dict[str, Any] = option({}, 'arguments of the pipeline\'s call, e.g. {"height": 512, "guidance_scale": 4.5}')
    guidance_scale: float | None = option(None, "short for call.guidance_scale")
    variants: dict[str, Any] = option(
        {}, 'changes of call by name, each compared alone: {"guidance 7": {"guidance_scale": 7}, ...}'
    )

    prompts: str | list | None = option(
        None, "file (.txt, .jsonl, .csv), a dataset, a list, or 'default'; none for unconditional models"
    )
    prompt_column: str | None = option(None, "of a dataset or file; default 'prompt'")
    prompt_split: str = option("train", "split of the dataset")
    samples: int = option(1000, "images a number is measured on")
    repeat_prompts: bool = option(False, "go through the prompts again, with new noise, where samples are more")
    seed: int = option(0, "of the first sample's noise; each has its own, the next number")

    solvers: list[str] = option(["all"], f"all that fit, or some of: {', '.join(map(slug, BASELINES))}; and artefacts")
    steps: list[int] = option([5], "numbers of guided evaluations (NFE) to compare at")
    metrics: list[str] = option(["latent_mse"], f"of: {', '.join(METRICS)}")
    metric_options: dict[str, Any] = option({}, 'by metric, e.g. {"kid": {"reference": "coco/val2014", "size": 512}}')
    gap_from: str | None = option(None, "solver from which to count the share of the way to the reference of others")

    teacher: str = option("ipndm", "of the reference: a base solver, or a diffusers scheduler's class name")
    teacher_steps: int = option(50, "of the reference; network evaluations, but for two-stage solvers")
    teacher_order: int = option(2, "of a base solver as reference")
    teacher_grid: dict[str, Any] | None = option(None, "of a base solver as reference; the pipeline's own by default")
    layout: str | None = option(
        None,
        f"of the latents, for decoding: {', '.join(sorted(LAYOUTS))}; default: packed if they are tokens, or image",
    )
    latent_size: list[int] | None = option(None, "height and width of packed latents that are no square")

    images: str | None = option(None, "directory of images to measure, instead of sampling")
    batch_size: int = option(16, "images at a time, and in one file of the cache")
    cache: str | None = option(None, "directory of what is finished, to share between runs; default: beside output")
    output: str = option("evaluation.json", "results; the same command continues a run that was stopped")
    plot: str | None = option(
        None, "also draw it here (PNG, SVG or PDF), each metric in a file of its own: NAME-METRIC"
    )
    picture_steps: list[int] = option([], "numbers of evaluations to draw samples at, one solver a row")
    pictures: int = option(8, "samples that a picture shows")
    picture_classical: int = option(1, "classical solvers that a picture shows, the best ones")

    def __post_init__(self) -> None:
        check_types(self)
        check_sampling(self)
        if not self.model and self.images is None:
            raise ValueError("model is missing: name a pipeline (a directory or a Hub id), or give images to measure.")
        for name, least in {
            "samples": 2,
            "batch_size": 1,
            "pictures": 1,
            "picture_classical": 1,
            "teacher_steps": 1,
            "teacher_order": 1,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        for name in ("steps", "solvers", "metrics"):
            if len(set(values := getattr(self, name))) < max(1, len(values)):
                raise ValueError(f"{name}={values} must name at least one, and each once.")
        if min(self.steps) < 1 or max(self.steps) > self.teacher_steps:
            raise ValueError(f"steps={self.steps} must lie between 1 and the reference's {self.teacher_steps}.")
        for name in {*self.metrics, *self.metric_options} - {*METRICS}:
            raise ValueError(f"Unknown metric {name!r}{nearest(name, METRICS)}")
        if unknown := {*self.picture_steps} - {*self.steps}:
            raise ValueError(f"picture_steps {sorted(unknown)} are not among steps={self.steps}.")
        if self.layout not in (None, *LAYOUTS):
            raise ValueError(f"Unknown layout {self.layout!r}{nearest(str(self.layout), LAYOUTS)}")
        if wrong := {name: v for name, v in self.variants.items() if not isinstance(v, Mapping)}:
            raise ValueError(f"variants={wrong} must be arguments of the call by name: {{name: {{argument: value}}}}.")

    @property
    def calls(self) -> dict[str, dict[str, Any]]:
        """Arguments of the pipeline's call by variant; without variants, of the one named ""."""
        return {name: {**self.call, **own} for name, own in (self.variants or {"": {}}).items()}


def nearest(name: str, known: Any) -> str:
    """How a message about an unknown name ends."""
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else f": use one of {sorted(known)}."
