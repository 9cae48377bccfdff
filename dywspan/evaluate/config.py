"""What an evaluation is told: one flat list of settings, from a YAML file, the command line, or Python."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .. import names
from ..names import slug
from ..settings import check_sampling, check_types, option


@dataclass(frozen=True)
class QualityConfig:
    """A whole evaluation; every field is explained by ``dywspan eval --help``."""

    model: str = option("", "pipeline: a directory or a Hub id")
    revision: str | None = option(None, "revision of the model on the Hub")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "type of the pipeline's weights")
    mixed_precision: Literal["no", "fp16", "bf16"] = option(
        "no", "precision of the solvers; the reference always runs in dtype"
    )
    call: dict[str, Any] = option({}, 'arguments of the pipeline\'s call, e.g. {"height": 512, "guidance_scale": 4.5}')
    guidance_scale: float | None = option(None, "short for guidance_scale in call")
    variants: dict[str, Any] = option(
        {}, 'variants of call by name, each evaluated separately: {"guidance 7": {"guidance_scale": 7}, ...}'
    )

    prompts: str | list | None = option(
        None, "a file (.txt, .jsonl, .csv), a dataset, a list, or 'default'; leave it out for unconditional models"
    )
    prompt_column: str | None = option(None, "column of the dataset or file; default: 'prompt'")
    prompt_split: str = option("train", "split of the dataset")
    samples: int = option(1000, "images that each number is measured on")
    repeat_prompts: bool = option(False, "reuse prompts with new noise where there are fewer prompts than samples")
    seed: int = option(0, "seed of the noise of the first sample; each next sample has the next number")

    solvers: list[str] = option(
        ["all"],
        "solvers to compare: artefacts, all (every classical one that fits), or some of "
        + ", ".join(map(slug, names.BASELINES)),
    )
    steps: list[int] = option([5], "numbers of network evaluations (NFE) to compare at, each with guidance")
    metrics: list[str] = option(["latent_mse"], f"numbers to measure, of: {', '.join(names.METRICS)}")
    metric_options: dict[str, Any] = option(
        {}, 'options of metrics by name, e.g. {"kid": {"reference": "coco/val2014", "size": 512}}'
    )
    gap_from: str | None = option(
        None, "also show how much of the gap between this solver and the reference each solver closes"
    )

    teacher: str = option(
        "ipndm", "solver of the reference: a classical one, or the class name of a diffusers scheduler"
    )
    teacher_steps: int = option(
        50, "steps of the reference; each is one network evaluation, or two with a two-stage solver"
    )
    teacher_order: int = option(2, "order of a classical solver as reference")
    teacher_grid: dict[str, Any] | None = option(
        None, "grid of a classical solver as reference; default: that of the pipeline"
    )
    layout: str | None = option(
        None,
        f"layout of the latents, for decoding: {', '.join(names.LAYOUTS)}; default: packed for tokens, else image",
    )
    latent_size: list[int] | None = option(None, "height and width of packed latents that are not square")

    images: str | None = option(None, "directory of images to measure, instead of sampling")
    batch_size: int = option(16, "images sampled at a time; each file of the cache holds as many")
    cache: str | None = option(None, "directory of finished samples, which runs can share; default: beside output")
    output: str = option("evaluation.json", "file of the results (JSON); re-run the command to resume")
    plot: str | None = option(None, "also draw plots (PNG, SVG or PDF), one file for each metric: NAME-METRIC")
    picture_steps: list[int] = option([], "numbers of evaluations at which to draw samples, one solver in each row")
    pictures: int = option(8, "samples in a picture")
    picture_classical: int = option(1, "classical solvers that a picture shows, the best ones")

    def __post_init__(self) -> None:
        from ..core.layout import LAYOUTS
        from .metrics import METRICS

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
