"""Tell a scheduler what a pipeline knows and ``step`` is never told: height and width of packed latents."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from ..core.layout import LAYOUTS, Packed
from .spanlift import SpanLiftScheduler


def bind(pipe: Any) -> Any:
    """Make a pipeline pass the latent's height and width to its SpanLift scheduler at every call.

    Read from ``prepare_latents``, which every pipeline with packed tokens has. Square images need no binding.

        pipe = dywspan.bind(pipe)

    Raises:
        TypeError: the pipeline has no ``prepare_latents`` that takes height and width.
    """
    prepare = getattr(pipe, "prepare_latents", None)
    if prepare is None or not {"height", "width"} <= inspect.signature(prepare).parameters.keys():
        raise TypeError(
            f"{type(pipe).__name__} has no prepare_latents that takes height and width: use "
            "scheduler.set_latent_size(height, width) if its tokens are packed."
        )
    signature = inspect.signature(prepare)

    @functools.wraps(prepare)
    def prepare_latents(*args: Any, **kwargs: Any) -> Any:
        scheduler = pipe.scheduler
        layout = LAYOUTS[scheduler.config["layout"]] if isinstance(scheduler, SpanLiftScheduler) else None
        if isinstance(layout, Packed):
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            multiple = layout.patch * (getattr(pipe, "vae_spatial_compression_ratio", None) or pipe.vae_scale_factor)
            height, width = (int(given.arguments[side]) // multiple * layout.patch for side in ("height", "width"))
            scheduler.set_latent_size(height, width)
        return prepare(*args, **kwargs)

    pipe.prepare_latents = prepare_latents
    return pipe
