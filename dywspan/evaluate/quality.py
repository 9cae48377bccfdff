"""Quality at equal cost: any solvers on the same prompts and noise, measured by any metrics; a run can resume.

noise(seed_i), prompt_i -> solver at N evaluations -> image_i -> rows of each metric -> number, interval
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from ..artifact import for_every_count, steps_of, write_atomically
from ..core.layout import Size
from ..pipelines.decode import to_images
from ..pipelines.embeddings import remembered_prompts
from ..pipelines.hashes import digest, fingerprint
from ..pipelines.inputs import read_inputs
from ..pipelines.networks import place
from ..pipelines.pairs import Pairs, make_pairs
from ..pipelines.precision import autocast
from ..pipelines.processes import device, is_main
from ..pipelines.rollout import Inputs, load_pipeline, sample
from ..pipelines.teacher import Teacher
from ..schedulers.bind import guidance_scale
from .baselines import BEST, Cell, full_name
from .config import QualityConfig
from .images import find_images, read_image
from .paired import Kept, kept_of, line_of, with_pairs, write_samples
from .pictures import draw_samples, places, plots
from .report import file_stem, table, write_results
from .rivals import best_cells
from .rows import measure
from .statistics import Metric, Sample, numbers
from .task import Task, make_metrics, prepare, sample_fields

KEPT = 2**30  # bytes of decoded reference images


# --------------------------------------------------------------------------------------------------------- one solver


@torch.no_grad()
def evaluate(
    pipe: Any,
    scheduler: Any,
    steps: int,
    inputs: Inputs,
    seeds: Sequence[int],
    metrics: Sequence[Metric],
    *,
    call: Mapping[str, Any],
    batch_size: int = 16,
    cache: Path | str | None = None,
    reference: Pairs | None = None,
    layout: str = "image",
    size: Size | None = None,
    precision: str = "no",
    solver: Mapping[str, Any] | None = None,
    model: str | None = None,
    title: str | None = None,
    shown: dict[int, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Rows of metrics for one solver, each sample from the noise of its own seed.

    The cache has one folder for each (model, call, solver, steps, precision, reference) and, in it, each metric's, with
    one file a batch, named by a hash of the batch's inputs and seeds. See :func:`measure`.

    Args:
        scheduler: what samples; None measures the reference itself.
        reference: the reference solver's endpoints for these inputs and seeds, where a metric needs them.
        layout, size: of the latents, see :func:`dywspan.pipelines.decode.decode`.
        precision: "no", "bf16" or "fp16": autocast of the solver's evaluations.
        solver: all that determines the solver's endpoints; the scheduler's configuration by default.
        model: what stands for the pipeline in the hash; a fingerprint of its weights by default.
        shown: the reference's decoded images by batch, to keep for the next solver; at most 1 GiB of them.

    Returns:
        (N, D) float32 by metric, in the order of ``seeds``.
    """
    needs = {need for m in metrics for need in m.needs}
    seen = any("latents" not in m.needs for m in metrics)
    if scheduler is None and reference is None:
        raise ValueError("scheduler=None measures the reference: give one.")
    parts = [slice(i, i + batch_size) for i in range(0, len(seeds), batch_size)]
    images = partial(to_images, pipe, layout=layout, size=size)

    def show(j: int, target: Tensor) -> Tensor:
        kept = {} if shown is None else shown
        levels = kept[j] if j in kept else (images(target) * 255).round().byte().cpu()
        if sum(v.nbytes for v in kept.values()) < KEPT:
            kept[j] = levels
        return levels / 255

    def make(j: int) -> Sample:
        own, target = parts[j], None if reference is None else reference[parts[j]].endpoints.to(place(pipe))
        if scheduler is None:
            assert target is not None
            latents = target
        else:
            with autocast(pipe, precision):
                latents = sample(pipe, scheduler, steps, inputs[own], seeds[own], call)[0].float()
        prompts = [str(arguments["prompt"]) for arguments in inputs[own]] if "prompt" in inputs[0] else None
        aim = show(j, target) if target is not None and "reference_images" in needs else None
        return Sample(images(latents) if seen else latents[:, :0], prompts, latents, aim, target)

    folder = None
    if cache is not None:
        if solver is None:
            solver = {} if scheduler is None else Teacher(scheduler, steps).describe()
        targets = None if reference is None else reference.targets
        to = digest(targets) if isinstance(targets, Tensor) else targets and targets.files[0].parent.name
        key = {"model": model or fingerprint(pipe), "pipeline": type(pipe).__name__, "call": dict(call), "to": to}
        key |= {"solver": solver, "precision": precision, "diffusers": diffusers.__version__, "layout": [layout, size]}
        folder = Path(cache) / digest(key)
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "key.json", (json.dumps(key, indent=1, default=str) + "\n").encode())
    keys = [digest([list(inputs[part]), list(seeds[part])]) for part in parts]
    return measure(keys, make, metrics, folder, title or f"{type(scheduler).__name__}, {steps} steps")


# ------------------------------------------------------------------------------------------------------------ a run


def run(config: QualityConfig) -> dict[str, Any]:
    """Evaluate what ``config`` says, and write it after every cell.

    Returns:
        What is written: ``rows`` of solver, learned, scheduler, num_inference_steps, nfe, a number for each metric,
        ``interval`` and ``median`` by metric, ``paired`` and ``paired_classical``, see :func:`.paired.with_pairs`, with
        a base ``gap_closed`` by metric, and of solvers for every number of steps ``held_out``, whether they were not
        learned on this one; and all that the numbers depend on. The samples' values lie beside it.

    Raises:
        ValueError, OSError, ModuleNotFoundError: see :func:`prepare`.
    """
    if config.images is not None:
        return _measure_directory(config)
    task = prepare(config, device())
    results = _facts(task.config, task.metrics) | {"reference": task.teacher.summary(), "notes": [*task.notes]}
    rows: list[dict[str, Any]] = []
    kept: list[Kept] = []
    with remembered_prompts(task.pipe, task.cache / "prompts") as memory:
        for variant, call in config.calls.items():
            if memory is not None:
                memory.fill(task.inputs, call, config.batch_size)
            measured = []
            for row, samples, scheduler in _compare(task, call):
                rows.append({"variant": variant} | row if config.variants else row)
                kept.append(samples)
                if scheduler is not None:
                    measured.append((row, samples, scheduler))
                if is_main():
                    write_results(config.output, with_gaps(rows, config.gap_from, task.metrics), **results)
            if config.picture_steps:
                _draw(task, variant, call, measured)
    rows = with_pairs(with_gaps(rows, config.gap_from, task.metrics), kept, task.metrics)
    if is_main():
        write_samples(config.output, rows, kept)
    return _finish(config, results | {"rows": rows})


def _compare(task: Task, call: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], Kept, Any]]:
    """A row for the reference, where metrics say something of it, and one for every cell, as they are measured.

    With each, what every sample adds to its numbers, see :func:`.paired.kept_of`, and the cell's scheduler.
    """
    config, pipe, seeds = task.config, task.pipe, task.seeds
    guidance = guidance_scale(pipe, {**task.inputs[0], **call})
    options: dict[str, Any] = {"call": call, "batch_size": config.batch_size, "model": task.model}
    reference = None
    if config.gap_from or any(n.startswith("reference") for m in task.metrics for n in m.needs):
        reference = _pairs(task, call, task.inputs, seeds)
    options |= {"cache": task.cache, "reference": reference, "layout": config.layout or "image", "shown": {}}
    options["size"] = config.latent_size and tuple(config.latent_size)
    if (alone := [m for m in task.metrics if not _is_paired(m)]) and reference is not None:
        own = {"solver": "reference", "scheduler": type(task.teacher.scheduler).__name__}
        own |= dict.fromkeys(("num_inference_steps", "nfe"), task.teacher.num_inference_steps)
        own |= {"guidance_scale": guidance}
        values = evaluate(pipe, None, 0, task.inputs, seeds, alone, title="reference", **options)
        yield own | numbers(alone, values), kept_of(alone, values), None
    options |= {"precision": config.mixed_precision}
    for cell in sorted([*_best(task, call), *task.cells], key=lambda cell: cell.nfe):  # stable
        steps = cell.num_inference_steps
        own = {"solver": cell.describe(), "title": f"{cell.solver}, {cell.nfe}"}
        values = evaluate(pipe, cell.scheduler, steps, task.inputs, seeds, task.metrics, **own, **options)
        row = {"solver": cell.solver, "learned": cell.learned, "scheduler": type(cell.scheduler).__name__}
        row |= {"line": cell.line} if cell.line else {}
        row |= {"num_inference_steps": steps, "nfe": cell.nfe, "guidance_scale": guidance}
        row |= _held_out(cell.scheduler, steps)
        yield row | numbers(task.metrics, values), kept_of(task.metrics, values), cell.scheduler


def _pairs(task: Task, call: Mapping[str, Any], inputs: Inputs, seeds: Sequence[int]) -> Pairs:
    """The reference's samples, kept one by one."""
    kept: dict[str, Any] = {"cache": task.cache / "pairs", "setting": "batch_size", "model": task.model}
    return make_pairs(task.pipe, task.teacher, inputs, seeds, call=call, batch_size=task.config.batch_size, **kept)


def _best(task: Task, call: Mapping[str, Any]) -> list[Cell]:
    """The best classical solver at each number of evaluations, chosen on the samples after the measured ones."""
    if not task.others:
        return []
    config, pipe, own = task.config, task.pipe, range(task.seeds.stop, task.seeds.stop + len(task.others))
    pairs = _pairs(task, call, task.others, own)
    precision, steps = config.mixed_precision, sorted(config.steps)
    with autocast(pipe, precision):
        return best_cells(pipe, pairs, call, steps, task.cache / "best-classical", task.model, precision)


def _held_out(scheduler: Any, steps: int) -> dict[str, bool]:
    """Of a solver for every number of steps: whether this is one that it was not learned on."""
    function = for_every_count(scheduler)
    if function is None or steps in getattr(scheduler, "lifts", scheduler.tables):
        return {}
    return {"held_out": steps not in map(steps_of, function.provenance.get("held_out_error", ()))}


def _is_paired(metric: Metric) -> bool:
    """Whether it compares with the reference solver, and so is perfect for that one."""
    return any(need.startswith("reference") for need in metric.needs)


def with_gaps(rows: Sequence[Mapping[str, Any]], origin: str | None, metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """Rows with ``gap_closed``: how much of the way from a solver to the reference each other one goes, by metric.

    (v_start - v) / (v_start - v_reference)   at the same NFE; 1 - v / v_start for a distance to the reference

    Args:
        origin: the solver, by name or slug; None: rows as they are.
    """
    if origin is None:
        return [dict(row) for row in rows]
    base = full_name(origin)
    bases = {(row.get("variant"), row["nfe"]): row for row in rows if line_of(row) == base}
    references = {row.get("variant"): row for row in rows if row["solver"] == "reference"}
    result = []
    for row in rows:
        own, variant = dict(row), row.get("variant")
        if (start := bases.get((variant, row["nfe"]))) and line_of(row) not in (base, "reference"):
            reference = references.get(variant, {})
            perfect = {m.name: 0.0 if _is_paired(m) else reference.get(m.name) for m in metrics}
            measured = [
                m.name for m in metrics if perfect[m.name] is not None and (m.lower_is_better or not _is_paired(m))
            ]
            gaps = {name: start[name] - perfect[name] for name in measured}
            own["gap_closed"] = {name: (start[name] - row[name]) / gap for name, gap in gaps.items() if gap}
        result.append(own)
    return result


def _facts(config: QualityConfig, metrics: Sequence[Metric]) -> dict[str, Any]:
    """What the numbers depend on."""
    told = ("model", "revision", "dtype", "call", "prompts", "prompt_column", "prompt_split", "metric_options")
    sampled = (
        "mixed_precision",
        "variants",
        "samples",
        "repeat_prompts",
        "seed",
        "batch_size",
        "layout",
        "latent_size",
    )
    named = {*told, "images", "gap_from", *(sampled if config.images is None else ())}
    settings = {k: v for k, v in asdict(config).items() if k in named}
    facts = {m.name: {"lower_is_better": m.lower_is_better, **m.facts} for m in metrics}
    return {"settings": {k: v for k, v in settings.items() if v not in (None, "", {})}, "metrics": facts}


def _finish(config: QualityConfig, results: dict[str, Any]) -> dict[str, Any]:
    """Write, print and plot."""
    if is_main():
        facts = {k: v for k, v in results.items() if k != "rows"}
        results = write_results(config.output, results["rows"], **facts)
        print(f"\n{table(results)}\n\nWritten to {config.output}")
        if config.plot and len(config.steps) > 1:
            for picture in plots(results, Path(config.plot)):
                print(f"Picture: {picture}")
    return results


@torch.no_grad()
def _draw(
    task: Task, variant: str, call: Mapping[str, Any], measured: Sequence[tuple[dict[str, Any], Kept, Any]]
) -> None:
    """Reference, best classical solver and learned ones, a sheet for every number of evaluations that is asked for.

    Half of the samples are those on which the classical solver errs most, the others those about its median.

    Args:
        measured: of every cell its row, what each sample adds to its numbers, and its scheduler.
    """
    config = task.config
    size: Any = config.latent_size and tuple(config.latent_size)
    paired = next((m for m in task.metrics if _is_paired(m)), None)

    def images(scheduler: Any, steps: int, shown: Sequence[int]) -> Tensor:
        made = []
        for first in range(0, len(shown), config.batch_size):
            part = shown[first : first + config.batch_size]
            inputs, seeds = [task.inputs[i] for i in part], [task.seeds[i] for i in part]
            if scheduler is None:  # the reference, whose samples are kept
                latents = _pairs(task, call, inputs, seeds).endpoints.to(place(task.pipe))
            else:
                with autocast(task.pipe, config.mixed_precision):
                    latents = sample(task.pipe, scheduler, steps, inputs, seeds, call)[0].float()
            made.append(to_images(task.pipe, latents, str(config.layout), size))
        return torch.cat(made)

    for nfe in config.picture_steps:
        there = [one for one in measured if one[0]["nfe"] == nfe]
        classical, learned = ([one for one in there if one[0]["learned"] is ours] for ours in (False, True))
        errors, name = None, "reference"
        if paired is not None and classical:
            sign = 1 if paired.lower_is_better else -1
            classical.sort(key=lambda one: sign * one[0][paired.name])
            errors, name = sign * classical[0][1][paired.name], classical[0][0]["solver"].removesuffix(f" ({BEST})")
            classical = classical[: config.picture_classical]
        worst, typical = places(errors, config.pictures)
        heads = {0: f"where {name} errs most", len(worst): "typical"} if worst else {}
        shown = [*worst, *typical]
        sheet = [(f"reference, {task.teacher.num_inference_steps}", images(None, 0, shown))]
        for row, _, scheduler in [*classical, *learned]:
            sheet.append((f"{row['solver']}, {nfe}", images(scheduler, row["num_inference_steps"], shown)))
        if is_main():
            path = Path(config.plot or config.output)
            prompts = [str(task.inputs[i].get("prompt", "")) for i in shown]
            draw_samples(sheet, prompts, path.with_name(f"{file_stem(path.stem, variant)}-samples-{nfe}.png"), heads)


# ------------------------------------------------------------------------------------------- images already there


def _measure_directory(config: QualityConfig) -> dict[str, Any]:
    """One row for a directory of images. Prompts, if any, are one an image, by the order of the files' names."""
    assert config.images is not None
    files = find_images(config.images, config.batch_size)
    inputs = read_inputs(config.prompts, config.prompt_column, config.prompt_split)
    if inputs is not None and len(inputs) != len(files):
        raise ValueError(
            f"{config.images} has {len(files)} images, {config.prompts} {len(inputs)} prompts: give one each."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_pipeline(config.model, getattr(torch, config.dtype), device, config.revision) if config.model else None
    metrics = make_metrics(config, pipe, sample_fields(inputs))
    parts = [slice(i, i + config.batch_size) for i in range(0, len(files), config.batch_size)]

    def make(j: int) -> Sample:
        images = torch.stack([read_image(file) for file in files[parts[j]]]).to(device)
        return Sample(images, None if inputs is None else [str(own["prompt"]) for own in inputs[parts[j]]])

    with torch.no_grad():
        values = measure([str(j) for j in range(len(parts))], make, metrics, None, config.images)
    row = {"solver": config.images, "samples": len(files), **numbers(metrics, values)}
    return _finish(config, _facts(config, metrics) | {"rows": [row]})
