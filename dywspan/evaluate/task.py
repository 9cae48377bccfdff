"""An evaluation made ready: everything loaded, and whatever is wrong found, before anything is computed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..core.layout import LAYOUTS, Packed
from ..pipelines.decode import to_images, usual_layout
from ..pipelines.embeddings import remembered_prompts
from ..pipelines.hashes import fingerprint
from ..pipelines.inputs import check_call, read_inputs
from ..pipelines.rollout import Inputs, load_pipeline, sample
from ..pipelines.teacher import Teacher, find_teacher
from ..schedulers.bind import bind, guidance_argument
from . import rivals
from .baselines import BEST, Cell, begin, find_solvers, full_name, make_cells, of_ours
from .config import QualityConfig, nearest
from .metrics import METRICS
from .statistics import Metric


@dataclass(frozen=True)
class Task:
    """All an evaluation needs, checked, before anything is computed.

    Attributes:
        cells: what is compared, by cost and then by solver, but for ``BEST``.
        others: inputs of the samples that ``BEST`` is chosen on, those after the measured ones; none where nobody asks.
        notes: which cells stay empty, and why.
        model: hash of the pipeline's weights.
    """

    config: QualityConfig
    pipe: Any
    inputs: Inputs
    teacher: Teacher
    metrics: Sequence[Metric]
    cells: Sequence[Cell]
    others: Inputs
    notes: Sequence[str]
    model: str

    @property
    def seeds(self) -> range:
        return range(self.config.seed, self.config.seed + self.config.samples)

    @property
    def cache(self) -> Path:
        return _cache(self.config)


def _cache(config: QualityConfig) -> Path:
    return Path(config.cache or Path(config.output).parent / "evaluation-cache")


def prepare(config: QualityConfig, device: torch.device | str = "cpu") -> Task:
    """Load what ``config`` names and find whatever is wrong with it.

    Raises:
        ValueError, OSError, ModuleNotFoundError: settings that cannot work, files that cannot be read.
    """
    solvers = find_solvers(config.solvers)
    if (start := config.gap_from) is not None and full_name(start) not in [solver.name for solver in solvers]:
        raise ValueError(f"gap_from={start!r} is not among the solvers{nearest(start, [s.name for s in solvers])}")
    inputs = _inputs(config)
    pipe = load_pipeline(config.model, getattr(torch, config.dtype), device, config.revision)
    if isinstance(LAYOUTS.get(config.layout or "packed"), Packed) or guidance_argument(pipe) is not None:
        with suppress(TypeError):  # it cannot be told: that counts where it must be, and is said there
            bind(pipe)
    for call in config.calls.values():
        check_call(pipe, inputs, call)
    metrics = make_metrics(config, pipe, {"latents", "reference_images", "reference_latents", *sample_fields(inputs)})
    teacher = find_teacher(pipe, config.teacher, config.teacher_steps, config.teacher_order, config.teacher_grid)
    model = fingerprint(pipe)
    first = next(iter(config.calls.values()))
    cells: list[Cell] = []
    notes: list[str] = []
    with remembered_prompts(pipe, _cache(config) / "prompts"):
        begin(pipe, teacher.scheduler, teacher.num_inference_steps, inputs[0], first)
        for solver in (solver for solver in solvers if solver.name != BEST):
            made, refused = make_cells(pipe, solver, sorted(config.steps), inputs[0], first)
            if not made and (solver.name in map(full_name, config.solvers) or solver.learned):
                raise ValueError(f"{refused[0]}. Drop it from solvers, or change steps={config.steps}.")
            cells += made
            notes += refused if made else []  # of "all", those that never fit are nobody's business
        if config.picture_steps or any("latents" not in m.needs for m in metrics):
            config = _decoding(pipe, config, of_ours("euler")(pipe, 2), inputs[0], first)
    order = sorted(cells, key=lambda cell: cell.nfe)  # stable: solvers stay in their order
    others = _others(config, inputs) if BEST in [solver.name for solver in solvers] else []
    return Task(config, pipe, inputs, teacher, metrics, order, others, notes, model)


@torch.no_grad()
def _decoding(
    pipe: Any, config: QualityConfig, scheduler: Any, own: Mapping[str, Any], call: Mapping[str, Any]
) -> QualityConfig:
    """The configuration with its layout; one sample was decoded.

    Raises:
        ValueError: it cannot be.
    """
    latents, _ = sample(pipe, scheduler, 2, [own], [0], call)
    size: Any = config.latent_size and tuple(config.latent_size)
    config = replace(config, layout=config.layout or usual_layout(latents))
    try:
        to_images(pipe, latents.float(), str(config.layout), size)
    except ValueError as error:
        raise ValueError(f"layout={config.layout!r} is not that of {type(pipe).__name__}: {error}") from None
    return config


def _inputs(config: QualityConfig) -> Inputs:
    inputs = read_inputs(config.prompts, config.prompt_column, config.prompt_split, config.samples)
    if inputs is None:
        return [{}] * config.samples
    if len(inputs) < config.samples and not config.repeat_prompts:
        raise ValueError(
            f"prompts={config.prompts!r} has {len(inputs)} prompts, samples={config.samples} are needed: lower "
            "samples, or set repeat_prompts, which goes through them again with new noise."
        )
    if any(own.keys() != inputs[0].keys() for own in inputs):
        raise ValueError(f"All samples must have the same arguments as the first, {sorted(inputs[0])}.")
    return [inputs[i % len(inputs)] for i in range(config.samples)]


def _others(config: QualityConfig, inputs: Inputs) -> Inputs:
    """The prompts after those of all samples, or else these again."""
    count = rivals.SELECT[1]
    more = read_inputs(config.prompts, config.prompt_column, config.prompt_split, config.samples + count) or []
    source = more[config.samples :] if len(more) == config.samples + count else inputs
    return [source[i % len(source)] for i in range(count)]


def sample_fields(inputs: Inputs | None) -> set[str]:
    """The fields of :class:`Sample` that inputs give."""
    return {"prompts"} if inputs and "prompt" in inputs[0] else set()


def make_metrics(config: QualityConfig, pipe: Any, given: set[str]) -> list[Metric]:
    """Every metric, its networks loaded.

    Args:
        given: what samples will have, of the fields of :class:`Sample`.

    Raises:
        ValueError: options that a metric does not take, or samples without what it needs.
        OSError, ModuleNotFoundError: weights or packages are missing.
    """
    metrics = []
    for name in config.metrics:
        options, known = config.metric_options.get(name, {}), inspect.signature(METRICS[name]).parameters
        if unknown := sorted({*options} - {*known}):
            raise ValueError(f"metric_options: {name} does not take {unknown}: it takes {sorted({*known} - {'pipe'})}.")
        metric = METRICS[name](pipe, **options)
        if missing := sorted({*metric.needs} - given):
            raise ValueError(f"{name} needs {missing}, which these samples have not: drop the metric, or give them.")
        metrics.append(metric)
    return metrics
