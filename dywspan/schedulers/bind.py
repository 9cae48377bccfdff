"""Tell a scheduler what a pipeline knows and ``step`` is never told: the guidance scale, and packed latents' size."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..core.layout import LAYOUTS, Packed
from .dyweight import DyWeightScheduler
from .spanlift import SpanLiftScheduler


def bind(pipe: Any) -> Any:
    """Make a pipeline tell its scheduler at every call the guidance scale, and SpanLift the latent's height and width.

    The guidance scale is read from the call, height and width from ``prepare_latents``, which every pipeline with
    packed tokens has. Without it a solver is for the guidance scale that it was learned around, and packed tokens are
    taken for a square.

        pipe = dywspan.bind(pipe)

    Raises:
        TypeError: the pipeline knows neither.
    """
    kind, prepare = type(pipe), getattr(type(pipe), "prepare_latents", None)
    if hasattr(kind, "_tells"):
        return pipe
    # Python looks calls up in the class: it gets one of its own, of the same name.
    own: dict[str, Any] = {"_tells": True, "__module__": kind.__module__, "__doc__": kind.__doc__}
    if prepare is not None and {"height", "width"} <= inspect.signature(prepare).parameters.keys():
        own["prepare_latents"] = _telling(prepare, _tell_size)
    if guidance_argument(pipe) is not None:
        call: Any = kind.__call__
        own["__call__"] = told = _telling(call, _tell_guidance)
        # A rollout takes the undecorated call, through which gradients flow.
        told.__wrapped__ = _telling(getattr(call, "__wrapped__", call), _tell_guidance)
    if not own.keys() & {"prepare_latents", "__call__"}:
        raise TypeError(
            f"{kind.__name__} has no prepare_latents that takes height and width, and is not called with a "
            "guidance_scale: use scheduler.set_latent_size(height, width) if its tokens are packed, and "
            "scheduler.set_guidance_scale(g)."
        )
    pipe.__class__ = type(kind.__name__, (kind,), own)
    return pipe


def guidance_argument(pipe: Any) -> str | None:
    """The argument of the call that is the guidance scale: true_cfg_scale where guidance_scale has no effect."""
    known = inspect.signature(type(pipe).__call__).parameters
    order = ("guidance_scale", "true_cfg_scale") if _embeds_guidance(pipe) else ("true_cfg_scale", "guidance_scale")
    return next((name for name in order if name in known), None)


def guidance_scale(pipe: Any, given: Mapping[str, Any]) -> float:
    """g of a call with these arguments, 1 without guidance.

    Where the network is told a guidance scale, this times that of classifier-free guidance on top. Classifier-free
    guidance is none at 1 and below, nor, by a true_cfg_scale, without a negative prompt.
    """
    defaults = {k: p.default for k, p in inspect.signature(type(pipe).__call__).parameters.items()}
    given = {k: v for k, v in {**defaults, **given}.items() if v is not inspect.Parameter.empty}
    own, true = given.get("guidance_scale"), given.get("true_cfg_scale")
    negative = any(v is not None for k, v in given.items() if k.startswith("negative_prompt"))
    if _embeds_guidance(pipe):
        told = float(own) if own and own > 0 else 1.0
    else:
        told = 1.0 if "true_cfg_scale" in given else max(float(own or 1), 1.0)
    return told * (max(float(true or 1), 1.0) if negative else 1.0)


def _embeds_guidance(pipe: Any) -> bool:
    """Whether its network is told the guidance scale, as guidance-distilled ones are."""
    return any(getattr(getattr(m, "config", None), "guidance_embeds", False) for m in pipe.components.values())


def _telling(run: Callable[..., Any], tell: Callable[[Any, Mapping[str, Any]], None]) -> Any:
    """``run`` after ``tell``, which gets the pipeline and the arguments, defaults included."""
    signature = inspect.signature(run)

    @functools.wraps(run)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        tell(self, given.arguments)
        return run(self, *args, **kwargs)

    return told


def _tell_guidance(pipe: Any, given: Mapping[str, Any]) -> None:
    if isinstance(pipe.scheduler, DyWeightScheduler):
        pipe.scheduler.set_guidance_scale(guidance_scale(pipe, given))


def _tell_size(pipe: Any, given: Mapping[str, Any]) -> None:
    scheduler = pipe.scheduler
    layout = LAYOUTS[scheduler.config["layout"]] if isinstance(scheduler, SpanLiftScheduler) else None
    if isinstance(layout, Packed):
        multiple = layout.patch * (getattr(pipe, "vae_spatial_compression_ratio", None) or pipe.vae_scale_factor)
        height, width = (int(given[side]) // multiple * layout.patch for side in ("height", "width"))
        scheduler.set_latent_size(height, width)
