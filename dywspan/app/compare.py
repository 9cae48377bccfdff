"""Solvers side by side on one prompt and one noise: all that the page shows, without the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..artifact import provenances
from ..core.layout import Size
from ..evaluate.baselines import BEST, SLUGS, find_solvers, make_cell
from ..evaluate.metrics import latent_mse
from ..evaluate.pictures import error_maps
from ..evaluate.statistics import Sample
from ..pipelines.decode import to_images, usual_layout
from ..pipelines.inputs import check_call
from ..pipelines.networks import place
from ..pipelines.rollout import load_pipeline, sample
from ..pipelines.teacher import find_teacher
from ..schedulers.apply import load
from ..schedulers.bind import bind, call_arguments, guidance_argument
from ..shipped import artefacts
from .config import SIDE_BY_SIDE, CompareConfig

CLASSICAL = [name for name, full in SLUGS.items() if full != BEST]  # BEST takes many samples to choose
USUAL = 4  # evaluations that a page shows first
KEPT = 8  # references that a subject remembers

Watch = Callable[[str, int, int], None]  # (solver, evaluations done, evaluations in all)


@dataclass(frozen=True)
class Shown:
    """One solver's result.

    Attributes:
        solver: its name; "reference" for the reference.
        nfe: evaluations of the network.
        image: (1, 3, H, W) in [0, 1]; None where the solver does not fit.
        error_map: five times the difference from the reference, see :func:`dywspan.evaluate.pictures.error_maps`.
        error: mean squared error of the latent.
        seconds: from the prompt to the last latent, without decoding.
        refused: why the solver does not fit.
    """

    solver: str
    nfe: int
    image: Tensor | None = None
    error_map: Tensor | None = None
    error: float | None = None
    seconds: float | None = None
    refused: str | None = None


class Subject:
    """A pipeline in which solvers are compared.

    Raises:
        ValueError, OSError: ``model`` is empty, or cannot be loaded.

    Attributes:
        model, pipe: the name, and what was loaded.
        guidance: the argument of the pipeline's call that is the guidance scale; None: it has none.
        has_prompt: whether the pipeline takes a text.
        learned: artefacts on this machine that were learned for this model.
        usual: the first of them that have ``USUAL`` evaluations.
        call, guidance_scale: the arguments that the usual ones were learned for, or the pipeline's own.
    """

    def __init__(self, model: str, dtype: str | None = None, device: str | None = None) -> None:
        if not model.strip():
            raise ValueError("Name a model: a directory that holds a pipeline, or a Hub id such as org/model.")
        kind = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
        try:
            self.model, self.pipe = model, load_pipeline(model, getattr(torch, kind), device)
        except OSError as error:
            way_out = "Name a directory that holds a model_index.json, or a Hub id such as org/model."
            raise OSError(f"The pipeline {model!r} cannot be loaded: {str(error).rstrip('.')}. {way_out}") from error
        with suppress(TypeError):  # nothing about this pipeline need be told to a solver
            bind(self.pipe)
        arguments = call_arguments(self.pipe)
        self.guidance, self.has_prompt = guidance_argument(self.pipe), "prompt" in arguments
        own = (row["artefact"] for row in artefacts() if _is_same(model, row["model"]))
        self.learned = [name for name in own if ", subfolder " not in name]  # these have no name to type
        solvers = {name: load(name) for name in self.learned}
        self.usual = [name for name, solver in solvers.items() if _has(solver, USUAL)][: SIDE_BY_SIDE - 1]
        made = [provenances(solvers[name])[USUAL] for name in self.usual[:1]]
        self.call: dict[str, Any] = dict(made[0].get("call", {})) if made else {}
        scale = self.call.pop(self.guidance, arguments[self.guidance]) if self.guidance else None
        self.guidance_scale = None if scale is None else float(scale)
        self._references: dict[str, tuple[Tensor, float]] = {}

    def config(self, **given: Any) -> CompareConfig:
        """A comparison with this subject's defaults where nothing is given."""
        config = CompareConfig(**{"model": self.model, **given})
        own = {"guidance_scale": self.guidance_scale, "call": self.call}
        missing = {k: v for k, v in own.items() if getattr(config, k) is None}
        if not config.solvers:
            missing["solvers"] = [*self.usual, "dpmpp-2m"]
        return CompareConfig(**{**vars(config), **missing})

    @torch.no_grad()
    def compare(self, config: CompareConfig, watch: Watch = lambda *_: None) -> Iterator[Shown]:
        """The reference, then each solver as soon as it has sampled.

        Args:
            watch: is told of each evaluation of the network.

        Raises:
            ValueError: settings that cannot work, or samples that are no images.
            OSError: a solver that cannot be loaded.
        """
        if not config.solvers:
            raise ValueError("Choose at least one solver.")
        solvers = find_solvers(config.solvers)
        pipe, own = self.pipe, {"prompt": config.prompt} if self.has_prompt else {}
        call = {**(config.call or {}), **self._guided(config)}
        check_call(pipe, [own], call)

        def run(name: str, scheduler: Any, steps: int, nfe: int) -> tuple[Tensor, float]:
            start = perf_counter()
            told = lambda i, _: watch(name, i + 1, nfe)  # noqa: E731
            end, _ = sample(pipe, scheduler, steps, [own], [config.seed], call, watch=told)
            return end.float().cpu(), perf_counter() - start  # the copy waits for the device

        teacher = find_teacher(pipe, "ipndm", config.teacher_steps)
        nfe, key = teacher.num_inference_steps, json.dumps([own, config.seed, call, config.teacher_steps], default=str)
        if key not in self._references:
            while len(self._references) >= KEPT:
                self._references.pop(next(iter(self._references)))
            self._references[key] = run("reference", teacher.scheduler, nfe, nfe)
        target, seconds = self._references[key]
        aim = self._image(target, call)
        yield Shown("reference", nfe, aim, seconds=seconds)
        for solver in solvers:
            try:
                cell = make_cell(pipe, solver, config.steps, own, call)
            except ValueError as error:
                yield Shown(solver.name, config.steps, refused=str(error))
                continue
            latents, seconds = run(solver.name, cell.scheduler, cell.num_inference_steps, cell.nfe)
            image = self._image(latents, call)
            rows = latent_mse().rows(Sample(image, None, latents, aim, target))
            yield Shown(solver.name, cell.nfe, image, error_maps(image, aim), float(rows.mean()), seconds)

    def _guided(self, config: CompareConfig) -> dict[str, Any]:
        if self.guidance is None or config.guidance_scale is None:
            return {}
        found: dict[str, Any] = {self.guidance: config.guidance_scale}
        if self.guidance == "true_cfg_scale" and config.guidance_scale > 1:  # no effect without a negative prompt
            found["negative_prompt"] = (config.call or {}).get("negative_prompt", " ")
        return found

    def _image(self, latents: Tensor, call: Mapping[str, Any]) -> Tensor:
        layout, size = usual_layout(latents), None
        if layout == "packed" and {"height", "width"} <= call.keys():
            size = packed_size(latents.shape[1], call["height"], call["width"])
        try:
            return to_images(self.pipe, latents.to(place(self.pipe)), layout, size).cpu()
        except ValueError as error:
            kind = type(self.pipe).__name__
            raise ValueError(f"The samples of {kind}, {tuple(latents.shape)}, are no single images: {error}") from error


def packed_size(tokens: int, height: int, width: int) -> Size:
    """(height, width) of a latent whose 2 x 2 squares are these tokens, of an image of this shape."""
    rows = round((tokens * height / width) ** 0.5)
    return 2 * rows, 2 * round(tokens / max(rows, 1))


def numbers_picture(solver: str, steps: int) -> bytes:
    """A PNG of an artefact's weights, scalars and noise levels, see :func:`dywspan.plot.plot_tables`.

    Raises:
        ValueError: it has no learned table for ``steps``.
        OSError: it cannot be loaded.
    """
    from ..plot import plot_tables

    file = BytesIO()
    plot_tables(load(solver), file, steps)
    return file.getvalue()


def _is_same(model: str, trained: str) -> bool:
    """Whether an artefact's model is this one: directories move, and are known by their names."""
    return any(model == own or Path(model).name == Path(own).name for own in trained.split(", "))


def _has(scheduler: Any, steps: int) -> bool:
    return steps in (scheduler.time_lifts or getattr(scheduler, "lifts", scheduler.tables))
