"""What a run looks like while it learns: the teacher's samples, the start's, and those of the best solver so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..artifact import write_atomically
from ..pipelines.memory import Parts, is_sharded
from ..pipelines.processes import is_main
from ..pipelines.rollout import Inputs, sample
from .setup import HELD_OUT_SEED, Setup

Images = Sequence[Any]  # PIL


class Pictures:
    """Draws ``samples-N.png`` into a run's output anew, whenever there is something new to see.

    Args:
        setup: of the run.
        trackers: Accelerate's; those that take images get them too.
    """

    def __init__(self, setup: Setup, trackers: Sequence[Any] = ()) -> None:
        self.setup, self.trackers = setup, trackers
        self.inputs = setup.held_out_inputs[: setup.config.pictures]
        teacher = setup.teacher
        self.teacher = self._samples(teacher.scheduler, teacher.num_inference_steps)
        self.bases: dict[int, Images | None] = {}

    def show(self, n: int, label: str = "", scheduler: Any = None, update: int | None = None) -> None:
        """Draw the teacher's samples, those of n steps where learning starts, and a solver's.

        Args:
            label, scheduler: of the solver; None: there is none yet.
            update: of the whole run, for trackers.
        """
        if self.teacher is None:
            return
        if n not in self.bases:
            self.bases[n] = self._samples(self.setup.untrained(n), n)
        rows: dict[str, Images | None] = {f"teacher, {self.setup.teacher.num_inference_steps} steps": self.teacher}
        rows[f"base, {n} steps"] = self.bases[n]
        if scheduler is not None:
            rows[f"{label}, {n} steps"] = self._samples(scheduler, n)
        if is_main():
            drawn = draw_samples(rows, self.inputs, Path(self.setup.config.output) / f"samples-{n}.png")
            if update is not None:
                _track(self.trackers, f"samples/{n}", drawn, update)

    def _samples(self, scheduler: Any, steps: int) -> Images | None:
        seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + len(self.inputs))
        return sample_images(self.setup.pipe, scheduler, steps, self.inputs, seeds, self.setup.call)


def sample_images(
    pipe: Any, scheduler: Any, steps: int, inputs: Inputs, seeds: Sequence[int], call: Mapping[str, Any]
) -> Images | None:
    """What a solver samples; None from pipelines that make no images. All processes do, as a sharded network needs."""
    from PIL import Image

    if not inputs:
        return None

    def drawn(positions: Sequence[int]) -> Any:
        own = [inputs[i] for i in positions]
        with torch.no_grad():
            _, output = sample(pipe, scheduler, steps, own, [seeds[i] for i in positions], call, decode=True)
        return getattr(output, "images", output)

    parts = Parts(None, "pictures", "pictures", sharded=is_sharded(pipe)).run(len(inputs), drawn)
    images = [image for part in parts if isinstance(part, list) for image in part]
    return images if images and all(isinstance(image, Image.Image) for image in images) else None


def draw_samples(rows: Mapping[str, Images | None], inputs: Inputs, path: Path) -> Any:
    """One solver a row, one sample a column. Returns the picture."""
    from io import BytesIO

    from ..plot import picture

    shown = [(label, images) for label, images in rows.items() if images is not None]
    drawn, file = picture(shown, [str(own.get("prompt", "")) for own in inputs]), BytesIO()
    drawn.save(file, "PNG")
    write_atomically(path, file.getvalue())
    return drawn


def _track(trackers: Sequence[Any], name: str, image: Any, update: int) -> None:
    import numpy

    for tracker in trackers:
        if hasattr(tracker, "log_images"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: numpy.asarray(image)[None]}, step=update, **options)
